"""Models as GGUF files hold them: a reader of headers, and their keys under the names of `config.json`."""

from .file import is_gguf as is_gguf
from .file import read_gguf as read_gguf
