"""How people start engines: command lines read with each engine's own flags."""
