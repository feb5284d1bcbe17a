"""Studies: one question asked over a grid of inputs, each run kept as it finishes, so that a study goes on where it was stopped."""
