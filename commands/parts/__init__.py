"""What several commands print, write or ask the same way."""
