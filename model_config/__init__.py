"""Hugging Face `config.json` into a `ModelSpec`: one reader, and one small table for each family of models (`families/`)."""

from .read import read_config as read_config
