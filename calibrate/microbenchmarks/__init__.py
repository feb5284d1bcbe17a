"""Microbenchmarks: timed work on a device, written down as samples."""
