"""Fitting: from samples to a machine profile."""
