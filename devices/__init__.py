"""What really runs on a device: memory, streams, stores of weights, runners of experts, the dense part."""
