terraform {
  required_version = ">= 1.5"

  required_providers {
    commercetools = {
      source  = "labd/commercetools"
      version = "~> 1.19"
    }
    google = {
      source  = "hashicorp/google"
      version = ">= 6.0, < 8.0"
    }
  }
}

provider "google" {
  project = var.project
}

# Configured by CTP_CLIENT_ID, CTP_CLIENT_SECRET, CTP_PROJECT_KEY, CTP_SCOPES, CTP_API_URL and CTP_AUTH_URL.
provider "commercetools" {}
