"""Pages of studies: how the answer changes over a grid of inputs."""
