"""Machines put together from parts, and the serving engines that run on them.

parts       what is sold: GPUs, CPUs, memory, disks, and the words people use for them
catalogue   the parts and engines that are bundled, each constant with its source
engines     how a serving engine uses such parts
compose     parts and an engine become a profile
    load        a machine by whatever people call it
    detect      the parts of this computer.
"""
