resource "google_monitoring_alert_policy" "dead_letters" {
  display_name          = "${var.name}: dead letters"
  combiner              = "OR"
  notification_channels = var.notification_channels

  conditions {
    display_name = "there are dead letters"

    condition_threshold {
      filter = join(" AND ", [
        "resource.type = \"pubsub_subscription\"",
        "resource.labels.subscription_id = \"${google_pubsub_subscription.dead.name}\"",
        "metric.type = \"pubsub.googleapis.com/subscription/num_undelivered_messages\"",
      ])
      comparison      = "COMPARISON_GT"
      threshold_value = 0
      duration        = "0s"

      aggregations {
        alignment_period   = "60s"
        per_series_aligner = "ALIGN_MAX"
      }
    }
  }

  documentation {
    mime_type = "text/markdown"
    content   = <<-EOT
      Messages were moved to the dead-letter queue, which keeps them for seven days. The worker's log has the reasons, in
      `message_processed` lines with `"outcome": "dead_lettered"`. `klaviyo-worker dlq list` shows the dead letters without
      removing them. Run it with QUEUE_URL=pubsub://${var.project}/${google_pubsub_subscription.worker.name} and
      DEAD_LETTER_QUEUE_URL=pubsub://${var.project}/${google_pubsub_subscription.dead.name}
    EOT
  }
}

resource "google_monitoring_alert_policy" "old_messages" {
  display_name          = "${var.name}: old messages"
  combiner              = "OR"
  notification_channels = var.notification_channels

  conditions {
    display_name = "a message has waited for more than ${var.max_age} s"

    condition_threshold {
      filter = join(" AND ", [
        "resource.type = \"pubsub_subscription\"",
        "resource.labels.subscription_id = \"${google_pubsub_subscription.worker.name}\"",
        "metric.type = \"pubsub.googleapis.com/subscription/oldest_unacked_message_age\"",
      ])
      comparison      = "COMPARISON_GT"
      threshold_value = var.max_age
      duration        = "300s"

      aggregations {
        alignment_period   = "60s"
        per_series_aligner = "ALIGN_MAX"
      }
    }
  }

  documentation {
    mime_type = "text/markdown"
    content   = <<-EOT
      Klaviyo is behind the shop. Either no worker runs, the worker is parked, Klaviyo or commercetools does not respond, or
      there are too few workers. The worker's `/readyz` and its log lines `parked` and `outage` show the cause.
    EOT
  }
}
