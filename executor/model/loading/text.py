"""Text into tokens and back: the tokenizer beside a model, or single bytes where its vocabulary is the 256 bytes.

Modelled: tokenizers that transformers finds in the model's folder. Ignored: chat templates; a prompt is continued as it stands.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ....base.errors import InputError, one_line
from .assembly import require_transformers

_BYTES = 256
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")


class Text:
    """Turns text into ids and ids into text."""

    def __init__(self, folder: str | os.PathLike[str], vocab_size: int) -> None:
        """Raises InputError where there is no tokenizer and the vocabulary is not bytes."""
        self._tokenizer: Any = None
        if any((Path(folder) / name).is_file() for name in _FILES):
            try:
                self._tokenizer = require_transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
                rule = f"its tokenizer cannot be read ({one_line(str(error), 200)})"
                raise InputError("--model", os.fspath(folder), rule, "check its tokenizer files") from None
        elif vocab_size != _BYTES:
            rule = f"has no tokenizer beside it, and {vocab_size} tokens are no bytes"
            raise InputError("--model", os.fspath(folder), rule, "put the model's tokenizer files into the folder")

    def ids(self, text: bytes, what: str) -> list[int]:
        """Return the ids of a text; raises InputError where it is not UTF-8, unless ids are bytes."""
        if self._tokenizer is None:
            return list(text)
        try:
            return list(self._tokenizer(text.decode("utf-8"))["input_ids"])
        except UnicodeDecodeError:
            raise InputError(what, "(bytes)", "not UTF-8 text", "give text") from None

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""
        if self._tokenizer is None:
            return bytes(ids).decode("utf-8", "replace")
        return str(self._tokenizer.decode(list(ids)))

    @property
    def stop(self) -> frozenset[int]:
        """Ids that end a text."""
        end = getattr(self._tokenizer, "eos_token_id", None)
        return frozenset([end] if isinstance(end, int) else end or [])
