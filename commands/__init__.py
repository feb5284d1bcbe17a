"""One module per command or group of commands; `cli.py` registers them.

Modelled: options, their words, and what is printed. Ignored: the work, which commands import only when they run.
"""
