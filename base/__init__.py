"""Ground tools that every room stands on: units, errors, files, compiled code, progress, what commands print."""
