"""Predicts: the SimPy model, the decisions, the compiled twin, timelines and metrics."""
