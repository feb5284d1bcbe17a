"""How a layer step's experts are run: on the host's cores, by Triton kernels, by plain torch."""
