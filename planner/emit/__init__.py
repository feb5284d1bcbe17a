"""Writes a plan as the configuration of the engines people use, one module per engine, and says what an engine cannot express."""
