"""Checkpoints as safetensors files hold them: headers read, bytes of experts and of the rest counted as stored."""

from .file import INDEX as INDEX
from .file import files_of as files_of
from .file import tensors_of as tensors_of
from .stored import as_stored as as_stored
