"""What activities cost on a machine: measured, fitted, or computed from a roofline.

    cost_model              the roofline, and the interface of all cost models
    fitted_model            the same from a measured profile; `load_costs` chooses
    surface, forms          a cost over its arguments: physical forms and what they leave over
    fit                     samples into a profile
    samples                 raw measurements and their file
    measure                 a whole calibration: which benchmarks, at which sizes
    harness                 how a benchmark is measured
    microbench_*            the benchmarks
    import_*                other tools' measurements as samples
    pass_shape              what the dense part's cost depends on
    standard_shapes         models to calibrate with when none is named
    device, cuda_device     memory, streams, marks and copies of a device
    dense_part              everything of a forward pass but the routed experts
    expert_store            where all experts live
    expert_runner           the routed experts of one layer step (`cpu_experts`, `triton_experts`)

Importing this package, the cost models, samples and fits needs no torch; what measures and runs does.
"""
