"""Hugging Face `config.json` into a `ModelSpec`: one reader, and one small table for each family of models (`families/`)."""

from . import safetensors as safetensors
from .gguf import is_gguf as is_gguf
from .gguf import read_gguf as read_gguf
from .read import read_config as read_config
