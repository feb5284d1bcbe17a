"""Pages and figures of predictions beside measurements."""
