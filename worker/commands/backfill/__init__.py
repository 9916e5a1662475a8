"""`klaviyo-worker backfill`: sends existing records through the worker's own stages. Start with backfill.py.

docs/decisions/0023-backfill.md
"""
