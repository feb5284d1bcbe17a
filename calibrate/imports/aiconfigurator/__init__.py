"""Constants of kernels from AIConfigurator's published tables of measured ones.

tables      where the installed wheel keeps its tables, which of them a fit may read, and what is wrong with some rows
routing     how many rows each expert had in its measurements of experts
loads       tables of experts as loads of the expert form
named       a problem with the place of its answer
expert_problems, problems    every operation of the tables as a problem to fit
fits        the forms of `calibrate.costs.gpu` fitted, with errors on shapes that were left out
kernels     all kernels of an engine fitted
profile     `moeplan calibrate --from aiconfigurator`.
"""
