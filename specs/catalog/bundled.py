"""Bundled files by name, files of one's own by path.

Modelled: a bare word is a name, and an unknown one is answered with the names there are. Ignored: what the files hold.
"""

from __future__ import annotations

import os
from pathlib import Path

from ...base.errors import UnknownName


def resolve(what: str, name_or_path: str | os.PathLike[str], folder: Path, names: list[str], more: str = "") -> Path:
    """Return the file that a bundled name or a path stands for; raises UnknownName for a bare word that is neither.

    more: what else would do, for the message.
    """
    text = os.fspath(name_or_path)
    if text in names:
        return folder / f"{text}.json"
    path = Path(text)
    if not os.path.exists(path) and path.suffix not in (".json", ".gguf") and os.sep not in text:
        raise UnknownName(what, text, names, more=more)
    return path
