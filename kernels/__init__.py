"""The work itself: kernels for experts on a GPU (Triton) and on a CPU (torch), each beside a slow obvious reference.

    activation       the functions between an expert's two matrices
    slot_layout      where an expert's matrices lie inside one slot of an arena (no torch)
    packing          4-, 3- and 2-bit weights in groups: quantise, pack, unpack
    expert_weights   views of an arena's slots as the matrices of experts
    row_groups       rows sorted by expert, and the tiles that cover them
    permute          sort tokens by expert, gather them, and sum the experts' answers back
    grouped_gemm     rows times the matrices of their experts: gate-up with its activation, and down
    dequant_gemm     the same on packed weights
    dequant_decode   how those become operands
    device_functions what several kernels share
    checks           refusals of arguments that do not fit
    experts          one layer's routed experts from tokens in to tokens out
    cpu              the same work with torch on the host, from the same slots
    reference        what all of them must compute, in float64
    error_bounds     how far a result in a given precision may be off
    tuning           launch configurations as data, by device (no torch)
    search           the search for them on a GPU
    roofline         operations and fewest bytes of each call (no torch)

Importing this package imports neither torch nor triton; its modules do, except where said.
"""
