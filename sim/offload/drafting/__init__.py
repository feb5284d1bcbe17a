"""Drafted tokens on one device: which passes verify them, and what drafting costs."""
