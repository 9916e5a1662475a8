# The worker's identity, and all that it may do.

data "google_project" "this" {
  project_id = var.project
}

resource "google_service_account" "worker" {
  account_id   = var.name
  display_name = "Klaviyo worker"
}

resource "google_pubsub_subscription_iam_member" "worker" {
  for_each = toset(["roles/pubsub.subscriber", "roles/pubsub.viewer"])

  subscription = google_pubsub_subscription.worker.name
  role         = each.value
  member       = google_service_account.worker.member
}

resource "google_pubsub_topic_iam_member" "worker_buries" {
  count = var.direct_dead_letter ? 1 : 0

  topic  = google_pubsub_topic.dead.name
  role   = "roles/pubsub.publisher"
  member = google_service_account.worker.member
}

resource "google_service_account_iam_member" "gke" {
  count = var.kubernetes_service_account == "" ? 0 : 1

  service_account_id = google_service_account.worker.name
  role               = "roles/iam.workloadIdentityUser"
  member             = "serviceAccount:${var.project}.svc.id.goog[${var.kubernetes_service_account}]"
}
