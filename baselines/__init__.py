"""Pinned figures: what the product says of a fixed set of scenarios, stored, predicted again and compared."""
