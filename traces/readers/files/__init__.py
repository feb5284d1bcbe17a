"""Readers of recordings as plain files: tables, arrays, rows of text."""
