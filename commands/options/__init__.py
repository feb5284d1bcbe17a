"""What the commands are given: options, their rules, and the model, machine, schedule and recording they name."""
