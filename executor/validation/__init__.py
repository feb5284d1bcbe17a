"""Validating a plan: predictions beside measured runs."""
