"""The nouns that all rooms share: models, machines, schedules, device memory, and their files."""
