"""A checkpoint from disk: its files, the model without its experts, its experts in stores, its text as ids."""
