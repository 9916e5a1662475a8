"""The commercetools subscription that sends notifications to the worker's queue: compare, create, change, check.

https://docs.commercetools.com/api/projects/subscriptions
"""
