"""Where experts' weights lie before they are on the device: host memory or a file on disk."""
