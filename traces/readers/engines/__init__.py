"""Readers of what inference engines record."""
