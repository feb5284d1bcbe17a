"""What activities cost on a machine: measured, fitted, or computed from a roofline.

    costs               what work takes: the roofline and the interface of all cost models (`cost_model`), engines, several cards,
                        a measured machine's tables (`fitted`), measured kernels of datacentre cards (`gpu`); `load` chooses
    fitting             samples into a profile, and a profile's constants towards one's own speeds
    imports             other tools' measurements as samples, tables or speeds
    microbenchmarks     what `moeplan calibrate` runs, at which sizes and how
    samples             raw measurements and their file

Importing this package, the cost models, samples and fits needs no torch; what measures and runs does.
"""
