"""Fits of the constants that are bundled: of engines, of kernels, of clusters."""
