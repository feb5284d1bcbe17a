"""What a prediction takes of the memory of cards and of the host."""
