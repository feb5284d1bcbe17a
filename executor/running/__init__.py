"""Running a schedule: decisions, copies, kernels, on a device or its stand-in."""
