# Topic, subscription and dead letters; docs/pubsub.md explains them.

resource "google_pubsub_topic" "worker" {
  name = var.name
}

resource "google_pubsub_topic" "dead" {
  name = "${var.name}-dead"
}

resource "google_pubsub_subscription" "dead" {
  name                       = "${var.name}-dead"
  topic                      = google_pubsub_topic.dead.id
  message_retention_duration = "604800s"

  expiration_policy {
    ttl = "" # never
  }
}

resource "google_pubsub_subscription" "worker" {
  name                       = var.name
  topic                      = google_pubsub_topic.worker.id
  ack_deadline_seconds       = 60
  message_retention_duration = "604800s"
  enable_message_ordering    = false # the worker preserves the order of each resource

  dead_letter_policy {
    dead_letter_topic     = google_pubsub_topic.dead.id
    max_delivery_attempts = 10
  }

  retry_policy {
    minimum_backoff = "10s"
    maximum_backoff = "600s"
  }

  expiration_policy {
    ttl = "" # never
  }

  depends_on = [google_pubsub_subscription.dead] # a topic without a subscription drops messages
}

# Permissions with which Pub/Sub moves dead letters.

locals {
  pubsub = "serviceAccount:service-${data.google_project.this.number}@gcp-sa-pubsub.iam.gserviceaccount.com"
}

resource "google_pubsub_topic_iam_member" "pubsub_publishes_dead_letters" {
  topic  = google_pubsub_topic.dead.name
  role   = "roles/pubsub.publisher"
  member = local.pubsub
}

resource "google_pubsub_subscription_iam_member" "pubsub_acknowledges_dead_letters" {
  subscription = google_pubsub_subscription.worker.name
  role         = "roles/pubsub.subscriber"
  member       = local.pubsub
}

resource "google_pubsub_subscription_iam_member" "dead_letter_readers" {
  for_each = toset(var.dead_letter_readers)

  subscription = google_pubsub_subscription.dead.name
  role         = "roles/pubsub.subscriber"
  member       = each.value
}
