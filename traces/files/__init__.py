"""Files that recordings come in: containers read without running what they hold."""
