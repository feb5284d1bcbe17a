"""Samples and constants from the output of other tools."""
