"""Costs of a measured machine: its tables, and the operations that are read from them."""
