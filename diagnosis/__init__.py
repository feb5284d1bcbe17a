"""Is a measured speed normal: how the engine was started, what that should give, what binds, what would help, what to look for."""
