"""`python -m moeplan`: the same front door as the command `moeplan`."""

from .cli import main

main()
