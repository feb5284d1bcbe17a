"""Pages and figures of plans for many devices."""
