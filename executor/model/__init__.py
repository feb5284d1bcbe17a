"""Runs a real model whose experts do not all lie on the device: transformers computes, a schedule moves experts."""
