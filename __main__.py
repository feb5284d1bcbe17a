"""`python -m moeplan`: the same front door as the command `moeplan`. Ignored: everything else (`cli`)."""

from .cli import main

main()
