"""An emulator of Klaviyo's HTTP API that enforces its documented rules. Read api.py first."""
