"""Calibrating by runs: what kernels and copies cost inside a schedule that really runs."""
