"""Which rank holds which expert, which experts are copied, and where each token goes: heuristics and our own search."""
