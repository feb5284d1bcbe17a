"""Costs: a machine's constants, or the curves fitted to its samples, as seconds with an uncertainty."""
