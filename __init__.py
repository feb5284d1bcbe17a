"""moeplan: rehearse Mixture-of-Experts inference before you run it."""

from __future__ import annotations

__version__ = "0.1.0"

__all__ = ["__version__"]
