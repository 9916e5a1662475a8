output "queue_url" {
  description = "QUEUE_URL of the worker."
  value       = "pubsub://${var.project}/${google_pubsub_subscription.worker.name}"
}

output "service_account" {
  description = "Google service account of the worker; null on GKE."
  value       = one(google_service_account.worker[*].email)
}

output "dead_letter_queue_url" {
  description = "DEAD_LETTER_QUEUE_URL of `klaviyo-worker dlq`, for users whose only permissions are on the dead letters."
  value       = "pubsub://${var.project}/${google_pubsub_subscription.dead.name}"
}

output "commercetools_subscription" {
  description = "Id of the commercetools subscription; GET /PROJECT/subscriptions/ID/health returns its health."
  value       = commercetools_subscription.worker.id
}
