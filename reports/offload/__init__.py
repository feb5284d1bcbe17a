"""Pages and figures of plans for one device."""
