"""Recordings made from a few statistics, and those statistics fitted to a recording."""
