"""One module per engine: its table of flags and keys, what it is given for a plan, and the check of what it is given."""
