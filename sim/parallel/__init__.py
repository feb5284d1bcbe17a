"""Expert parallelism over many devices: two simulators of one layer's step, and all that turns loads into their tables."""
