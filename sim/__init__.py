"""Predicts: the SimPy model, the decisions, the compiled simulator, timelines and metrics."""
