"""The decisions, as compiled functions over explicit state arrays, on a logical clock that knows no time."""
