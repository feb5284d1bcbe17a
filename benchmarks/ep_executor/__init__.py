"""Expert-parallel schedules run for real beside their predictions, on ranks of this machine."""
