"""What happens to files: flipped bits, lost ends, other types, numbers without end, nesting, control characters, keys twice.

Modelled: changes that keep a file's container whole (one value of a JSON document, one member of an archive, the header of a
safetensors file), because changes that break it are refused at once, and changes of bytes. Ignored: several files at a time.
"""

from __future__ import annotations

import copy
import io
import json
import random
import zipfile
from pathlib import Path
from typing import Any

_NUMBERS = (0, -1, 1, 2, 3, 7, 255, 256, 65536, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**12, 10**30, 10**400,
            -(10**12), 0.5, -0.0, 1e-300, 1e25, 1e300, -1e300)  # fmt: skip
_LITERALS = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "1" * 5000,
    "[" * 3000 + "]" * 3000,
    '{"a":' * 2000 + "1" + "}" * 2000,
    '"\\ud800"',
)
_TEXTS = ("", " ", "\x1b[2J\x07", "\u202etxet", "a\nb\rc", "x" * 10_000, "/dev/zero", "../../etc/passwd", "nan", "1", "\0", "日本", "\udc80",
          "<script>alert(1)</script>", "%s{}", "tiny-moe", "float16", "lru")  # fmt: skip
_HERE = "@@here@@"


def mutated(rng: random.Random, name: str, raw: bytes) -> bytes:
    """Return the contents of a file called `name`, changed."""
    kind = Path(name).suffix
    if rng.random() < 0.75:
        try:
            if kind in (".json", ".jsonl", ".ipynb"):
                return _json_lines(rng, raw) if kind == ".jsonl" else _json(rng, raw)
            if kind in (".pt", ".npz"):
                return _archive(rng, raw)
            if kind == ".safetensors":
                return _safetensors(rng, raw)
            if kind in (".yaml", ".csv", ".txt", ".log"):
                return _words(rng, raw)
        except ValueError:
            pass  # what an earlier mutation left is no longer of its kind
    return _bytes(rng, raw)


def _bytes(rng: random.Random, raw: bytes) -> bytes:
    changed = bytearray(raw)
    how = rng.choice(("flip", "flip", "flip", "cut", "insert", "number", "zeros", "twice", "empty"))
    at = rng.randrange(len(changed) + 1) if rng.random() < 0.5 else rng.randrange(min(len(changed), 300) + 1)
    if how == "flip":
        for _ in range(rng.choice((1, 1, 2, 8))):
            if changed:
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del changed[at:]
    elif how == "insert":
        changed[at:at] = rng.choice(_TEXTS).encode("utf-8", "surrogatepass")
    elif how == "number":
        width = rng.choice((1, 2, 4, 8))
        changed[at : at + width] = rng.choice(
            (0, 1, 2**7, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)
        ).to_bytes(8, "little")[:width]
    elif how == "zeros":
        changed[at : at + 64] = bytes(len(changed[at : at + 64]))
    elif how == "twice":
        changed += bytes(changed)
    else:
        changed.clear()
    return bytes(changed)


def _json(rng: random.Random, raw: bytes) -> bytes:
    document = json.loads(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        document = _edited(rng, document)
    text = json.dumps(document)
    if f'"{_HERE}"' in text:
        text = text.replace(f'"{_HERE}"', rng.choice(_LITERALS), 1)
    if rng.random() < 0.05 and text.startswith("{") and len(text) > 2:
        key = next(iter(document))
        text = "{" + json.dumps(key) + ": null, " + text[1:]
    return text.encode("utf-8", "surrogatepass")


def _json_lines(rng: random.Random, raw: bytes) -> bytes:
    lines = raw.split(b"\n")
    full = [at for at, line in enumerate(lines) if line.strip()]
    if not full:
        raise ValueError
    at = rng.choice(full)
    if rng.random() < 0.15:
        lines[at:at] = [lines[at]] * rng.choice((1, 3))
    else:
        lines[at] = _json(rng, lines[at])
    return b"\n".join(lines)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the places in a JSON value, few of them below long lists."""
    found = [path]
    if isinstance(value, dict):
        for key, inner in value.items():
            found += _paths(inner, (*path, key))
    elif isinstance(value, list):
        for at in sorted({*range(min(3, len(value))), len(value) - 1} - {-1}):
            found += _paths(value[at], (*path, at))
    return found


def _edited(rng: random.Random, document: Any) -> Any:
    """Return a copy with one place changed."""
    document = copy.deepcopy(document)
    paths = [path for path in _paths(document) if path]
    if not paths or rng.random() < 0.02:
        return _leaf(rng, document)
    *above, last = rng.choice(paths)
    inside = document
    for key in above:
        inside = inside[key]
    how = rng.choice(("replace", "replace", "replace", "near", "near", "remove", "double", "rename", "wrap", "new"))
    if how == "remove":
        del inside[last]
    elif how == "double" and isinstance(inside[last], list):
        inside[last] = inside[last] * 2 if rng.random() < 0.5 else inside[last][: len(inside[last]) // 2]
    elif how == "rename" and isinstance(inside, dict):
        inside[rng.choice(_TEXTS)] = inside.pop(last)
    elif how == "wrap":
        inside[last] = [inside[last]] if rng.random() < 0.5 else {"a": inside[last]}
    elif how == "new" and isinstance(inside, dict):
        inside[rng.choice(_TEXTS)] = _leaf(rng, None)
    elif how == "near" and isinstance(inside[last], (int, float)) and not isinstance(inside[last], bool):
        number = inside[last]
        inside[last] = rng.choice(
            (
                number + 1,
                number - 1,
                -number,
                number * 1000,
                number * 10**9,
                str(number),
                float(number),
                [number],
                number / 7,
            )
        )
    else:
        inside[last] = _leaf(rng, inside[last])
    return document


def _leaf(rng: random.Random, before: Any) -> Any:
    return rng.choice(
        (None, True, False, [], {}, [[]], [before], {"a": before}, _HERE, _HERE, rng.choice(_NUMBERS), rng.choice(_NUMBERS), rng.choice(_NUMBERS),
         rng.choice(_TEXTS), rng.choice(_TEXTS), [rng.choice(_NUMBERS)] * 3, [[1, 2], [3]], [None], ["a", 1])
    )  # fmt: skip


def _archive(rng: random.Random, raw: bytes) -> bytes:
    """Return a zip archive with one member changed and every checksum right again."""
    out = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
            chosen = rng.choice(archive.namelist())
            for name in archive.namelist():
                content = archive.read(name)
                if name == chosen:
                    how = rng.choice(("bytes", "bytes", "bytes", "drop", "rename", "header"))
                    if how == "drop":
                        continue
                    if how == "rename":
                        name = rng.choice(_TEXTS).replace("\0", "0").replace("\udc80", "") or "a"
                    elif how == "header" and b"shape" in content:
                        content = content.replace(b"(", rng.choice((b"(9", b"(1000000000,", b"(-", b"((")), 1)
                    else:
                        content = _bytes(rng, content)
                packed.writestr(name, content)
    except zipfile.BadZipFile:
        raise ValueError from None
    return out.getvalue()


def _safetensors(rng: random.Random, raw: bytes) -> bytes:
    """Return a safetensors file whose header is changed and whose length field is right again, or whose numbers are."""
    length = int.from_bytes(raw[:8], "little")
    if rng.random() < 0.4:
        at = 8 + length + rng.randrange(max(1, len(raw) - 8 - length))
        return raw[:at] + _bytes(rng, raw[at:])[: len(raw) - at].ljust(len(raw) - at, b"\xff")
    header = _json(rng, raw[8 : 8 + length])
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + raw[8 + length :]


def _words(rng: random.Random, raw: bytes) -> bytes:
    """Return text with one word or line changed."""
    lines = raw.decode("utf-8", "replace").split("\n")
    at = rng.randrange(len(lines))
    words = lines[at].split(" ")
    how = rng.choice(("word", "word", "word", "number", "twice", "drop", "indent"))
    if how in ("word", "number"):
        with_text = [i for i, word in enumerate(words) if word] or [0]
        value = (
            rng.choice(_TEXTS)
            if how == "word"
            else rng.choice((*map(_shown, _NUMBERS), "1" * 5000, "1:30", "[1,2", "&a [1]", "*a", "!!python/name:os"))
        )
        words[rng.choice(with_text)] = value
        lines[at] = " ".join(words)
    elif how == "twice":
        lines[at:at] = [lines[at]]
    elif how == "drop":
        del lines[at]
    else:
        lines[at] = "  " + lines[at]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _shown(number: float) -> str:
    return "1" + "0" * 400 if number == 10**400 else str(number)
