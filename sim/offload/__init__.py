"""Offloaded experts on one device: two simulators of one schedule, and all that turns a recording into their tables."""
