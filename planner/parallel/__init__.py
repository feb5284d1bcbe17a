"""Plans for many devices with expert parallelism."""
