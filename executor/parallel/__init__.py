"""Runs an expert-parallel step for real: processes that exchange tokens through torch.distributed, in the order that was predicted."""
