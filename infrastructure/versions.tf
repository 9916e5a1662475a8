terraform {
  required_version = ">= 1.5"

  required_providers {
    commercetools = {
      source  = "labd/commercetools"
      version = "1.22.2" # of a third party, and it gets a secret
    }
    google = {
      source  = "hashicorp/google"
      version = "7.45.0"
    }
  }
}

provider "google" {
  project = var.project
}

# Configured by CTP_CLIENT_ID, CTP_CLIENT_SECRET, CTP_PROJECT_KEY, CTP_SCOPES, CTP_API_URL and CTP_AUTH_URL.
provider "commercetools" {}
