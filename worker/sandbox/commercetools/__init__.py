"""commercetools."""
