"""The commercetools subscription that brings the worker its notifications: what it must ask for, and how it gets there.

https://docs.commercetools.com/api/projects/subscriptions
"""
