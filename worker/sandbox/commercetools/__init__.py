"""An emulator of commercetools' HTTP API with a sample shop. Read api.py first."""
