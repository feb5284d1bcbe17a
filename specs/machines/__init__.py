"""Machines put together from parts, and the serving engines that run on them.

parts       what is sold: GPUs, CPUs, memory, disks
names       the words that people and systems use for them
notation    a machine written in one line, checked
catalogue   the parts and engines that are bundled, each constant with its source
engines     how a serving engine uses such parts
compose     parts and an engine become a profile
    load        a machine by whatever people call it
    detect      the parts of this computer.
"""
