"""Plans for one device with offloaded experts."""
