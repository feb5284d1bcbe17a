"""Recordings of expert routing: their format, readers of other people's dumps, statistics, conversion and synthesis."""
