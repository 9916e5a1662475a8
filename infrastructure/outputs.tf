output "queue_url" {
  description = "QUEUE_URL of the worker."
  value       = "pubsub://${var.project}/${google_pubsub_subscription.worker.name}"
}

output "service_account" {
  description = "The worker runs as this Google service account; null on GKE."
  value       = one(google_service_account.worker[*].email)
}

output "dead_letter_subscription" {
  description = "Where dead letters are looked at."
  value       = google_pubsub_subscription.dead.name
}

output "commercetools_subscription" {
  description = "Id of the commercetools subscription; GET /PROJECT/subscriptions/ID/health tells how it is."
  value       = commercetools_subscription.worker.id
}
