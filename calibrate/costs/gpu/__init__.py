"""What kernels take on datacentre GPUs: forms with few constants, and the cost model that asks them.

experts       the routed experts of a layer on one GPU, in one operation
products      products with dense weights
attention     grouped and latent attention, decoding and over prompts
exchanges     exchanges between GPUs
layer         the matrices of a decoder layer, one by one
costs         `KernelCosts`: durations of everything a run does, under an engine whose kernels were measured.
"""
