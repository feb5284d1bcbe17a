"""What papers print, as data, where it is long."""
