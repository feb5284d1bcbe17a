"""Measures a machine and turns samples into a `Profile` and a `CostModel`."""
