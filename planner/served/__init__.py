"""Plans for one serving engine: only what it can be told, beside what it does when it is told nothing."""
