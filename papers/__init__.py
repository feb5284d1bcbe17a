"""Published tables as data, and their reproduction by the simulator."""
