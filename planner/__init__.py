"""Chooses: placement, replication, search with bounds, explanation, and one writer per engine. Never imports torch."""
