variable "project" {
  description = "Id of the Google Cloud project."
  type        = string
}

variable "name" {
  description = "Name of the topic, the subscription, the service account and the commercetools subscription."
  type        = string
  default     = "klaviyo-worker"
}

variable "direct_dead_letter" {
  description = "Allow the worker to dead-letter messages itself, with the reason: KLAVIYO_WORKER_DEAD_LETTER_MODE=direct."
  type        = bool
  default     = false
}

variable "kubernetes_service_account" {
  description = "Kubernetes service account of the worker on GKE, like {namespace = \"klaviyo\", name = \"klaviyo-worker\"}; null: not on GKE."
  type        = object({ namespace = string, name = string })
  default     = null
}

variable "dead_letter_readers" {
  description = "Members that can read and remove dead letters, like group:operators@example.com."
  type        = list(string)
  default     = []
}

variable "notification_channels" {
  description = "Ids of the Cloud Monitoring channels for alerts; empty: alerts show only in the console."
  type        = list(string)
  default     = []
}

variable "max_age" {
  description = "Age in seconds of the oldest message that raises an alert."
  type        = number
  default     = 900
}
