variable "project" {
  description = "Id of the Google Cloud project."
  type        = string
}

variable "name" {
  description = "Name of topic, subscription, service account and commercetools subscription."
  type        = string
  default     = "klaviyo-worker"
}

variable "direct_dead_letter" {
  description = "Let the worker bury messages itself, with the reason: KLAVIYO_WORKER_DEAD_LETTER_MODE=direct."
  type        = bool
  default     = false
}

variable "kubernetes_service_account" {
  description = "What runs the worker on GKE, like {namespace = \"klaviyo\", name = \"klaviyo-worker\"}; null: not on GKE."
  type        = object({ namespace = string, name = string })
  default     = null
}

variable "dead_letter_readers" {
  description = "Who may look at and remove dead letters, like group:operators@example.com."
  type        = list(string)
  default     = []
}

variable "notification_channels" {
  description = "Ids of the Cloud Monitoring channels that alerts go to; empty: they only show in the console."
  type        = list(string)
  default     = []
}

variable "max_age" {
  description = "Seconds that a message may wait before there is an alert."
  type        = number
  default     = 900
}
