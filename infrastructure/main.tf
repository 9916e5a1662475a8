# The worker's identity and its permissions.

data "google_project" "this" {
  project_id = var.project
}

# On GKE the Kubernetes service account has the permissions, elsewhere a Google service account.

locals {
  gke    = "principal://iam.googleapis.com/projects/${data.google_project.this.number}/locations/global/workloadIdentityPools/${var.project}.svc.id.goog"
  worker = var.kubernetes_service_account == null ? one(google_service_account.worker[*].member) : join("/", [local.gke, "subject/ns", var.kubernetes_service_account.namespace, "sa", var.kubernetes_service_account.name])
}

resource "google_service_account" "worker" {
  count = var.kubernetes_service_account == null ? 1 : 0

  account_id   = var.name
  display_name = "Klaviyo worker"
}

resource "google_pubsub_subscription_iam_member" "worker" {
  for_each = toset(["roles/pubsub.subscriber", "roles/pubsub.viewer"])

  subscription = google_pubsub_subscription.worker.name
  role         = each.value
  member       = local.worker
}

resource "google_pubsub_topic_iam_member" "worker_dead_letters" {
  count = var.direct_dead_letter ? 1 : 0

  topic  = google_pubsub_topic.dead.name
  role   = "roles/pubsub.publisher"
  member = local.worker
}
