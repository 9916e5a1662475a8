# The commercetools subscription to everything that the default mapping enables; docs/subscriptions.md. If your mapping
# switches on more handlers, add their types: `klaviyo-worker check` names those that are missing.

resource "google_pubsub_topic_iam_member" "commercetools" {
  topic  = google_pubsub_topic.worker.name
  role   = "roles/pubsub.publisher"
  member = "serviceAccount:subscriptions@commercetools-platform.iam.gserviceaccount.com"
}

resource "commercetools_subscription" "worker" {
  key = var.name

  destination {
    type       = "GoogleCloudPubSub"
    project_id = var.project
    topic      = google_pubsub_topic.worker.name
  }

  format {
    type = "Platform"
  }

  message {
    resource_type_id = "order"
    types = [
      "OrderCreated",
      "OrderImported",
      "OrderCreatedFromRecurringOrder",
      "OrderCustomerSet",
      "OrderCustomerEmailSet",
      "OrderStateChanged",
      "OrderShipmentStateChanged",
      "OrderPaymentAdded",
    ]
  }

  message {
    resource_type_id = "payment"
    types            = ["PaymentCreated", "PaymentTransactionAdded", "PaymentTransactionStateChanged"]
  }

  message {
    resource_type_id = "customer"
    types            = ["CustomerCreated"]
  }

  message {
    resource_type_id = "category"
    types            = ["CategoryCreated"]
  }

  message {
    resource_type_id = "product"
    types = [
      "ProductPublished",
      "ProductUnpublished",
      "ProductDeleted",
      "ProductCreated",
      "ProductPriceAdded",
      "ProductPriceChanged",
      "ProductPriceRemoved",
      "ProductPricesSet",
      "ProductPriceModeSet",
      "ProductPriceDiscountsSet",
      "ProductPriceExternalDiscountSet",
      "ProductVariantAdded",
      "ProductVariantDeleted",
      "ProductImageAdded",
      "ProductAddedToCategory",
      "ProductRemovedFromCategory",
      "ProductSlugChanged",
    ]
  }

  message {
    resource_type_id = "standalone-price"
    types = [
      "StandalonePriceCreated",
      "StandalonePriceDeleted",
      "StandalonePriceValueChanged",
      "StandalonePriceDiscountSet",
      "StandalonePriceExternalDiscountSet",
      "StandalonePriceActiveChanged",
      "StandalonePriceStagedChangesApplied",
      "StandalonePriceValidFromSet",
      "StandalonePriceValidUntilSet",
      "StandalonePriceValidFromAndUntilSet",
    ]
  }

  message {
    resource_type_id = "inventory-entry"
    types            = ["InventoryEntryDeleted"]
  }

  changes {
    resource_type_ids = ["customer", "category", "inventory-entry"]
  }

  depends_on = [
    google_pubsub_subscription.worker,            # or the first messages are lost
    google_pubsub_topic_iam_member.commercetools, # commercetools sends a test notification at once
  ]
}
