"""Schedules: for one device with offloaded experts, for many devices with expert parallelism, and the published ones by name."""
