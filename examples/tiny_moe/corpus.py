"""The byte corpus of the tiny model: text that comes with a Python installation, and a little more where it is there.

Five domains: `python` (the standard library's code), `prose` (its docstrings, its help topics, release notes and
licences), `tables` (character maps, name tables, arithmetic test vectors), `c` (the interpreter's headers) and `perl`
(the modules of a system Perl, optional). A document is held out when a hash of its name says so, so the split needs
no stored state and a docstring is held out together with the file it stands in. What was really read differs between
Python versions; the manifest lists every document with size, hash and split, so that a recording can say what it
used.

Ignored: near-duplicates between files (licence headers, boilerplate) are left in on both sides of the split.
"""

import argparse
import ast
import dataclasses
import hashlib
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

DOMAINS = ("python", "prose", "tables", "c", "perl")
HELD_OUT_ONE_IN = 12
MAX_DOCUMENT_BYTES = 120_000  # so that no single file dominates its domain
MIN_DOCUMENT_BYTES = 400
SEPARATOR = b"\x00\n"  # between documents; text files hold no zero byte


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text of the corpus."""

    domain: str
    name: str
    text: bytes

    @property
    def held_out(self) -> bool:
        """Whether the document is kept from training; depends on its name alone."""
        source = self.name.split("#docstrings")[0]
        return hashlib.sha256(source.encode()).digest()[0] % HELD_OUT_ONE_IN == 0

    @property
    def sha256(self) -> str:
        """Hash of the bytes used."""
        return hashlib.sha256(self.text).hexdigest()


def _files(root: Path, *patterns: str) -> list[Path]:
    found = {path for pattern in patterns for path in root.glob(pattern) if path.is_file()}
    skip = {"site-packages", "dist-packages", "__pycache__", "idle_test", "test", "tests"}
    return sorted(path for path in found if not skip & set(path.relative_to(root).parts[:-1]))


def _read(path: Path) -> bytes | None:
    """Bytes of a text file, or None where it is unreadable, not UTF-8 or holds a zero byte."""
    try:
        raw = path.read_bytes()
        raw.decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return None if b"\x00" in raw else raw


def _docstrings(source: bytes) -> bytes:
    """All docstrings of a module, dedented, separated by blank lines; empty where the file does not parse."""
    try:
        with warnings.catch_warnings(action="ignore"):  # old escapes in somebody else's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return b""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return "\n\n".join(text for text in texts if text and len(text) > 60).encode("utf-8", "replace")


def _standard_library(root: Path) -> Iterator[Document]:
    tables = {"encodings", "lib2to3/pgen2"}
    for path in _files(root, "**/*.py"):
        name = path.relative_to(root).as_posix()
        text = _read(path)
        if text is None or name == "pydoc_data/topics.py":
            continue
        folder = name.rpartition("/")[0]
        if folder in tables or name in {"html/entities.py", "stringprep.py", "token.py", "sre_constants.py"}:
            yield Document(domain="tables", name=f"stdlib/{name}", text=text)
            continue
        yield Document(domain="python", name=f"stdlib/{name}", text=text)
        yield Document(domain="prose", name=f"stdlib/{name}#docstrings", text=_docstrings(text))
    for path in sorted((root / "test" / "decimaltestdata").glob("*.decTest")):
        if text := _read(path):
            yield Document(domain="tables", name=f"stdlib/test/decimaltestdata/{path.name}", text=text)
    for path in _files(root, "*.txt", "idlelib/*.txt", "lib2to3/*.txt"):
        if text := _read(path):
            yield Document(domain="prose", name=f"stdlib/{path.relative_to(root).as_posix()}", text=text)
    topics = root / "pydoc_data" / "topics.py"
    if topics.is_file():
        tree = ast.parse(topics.read_bytes())
        entries = next(node.value for node in ast.walk(tree) if isinstance(node, ast.Assign))
        for key, text_of in sorted(ast.literal_eval(entries).items()):
            yield Document(domain="prose", name=f"stdlib/pydoc_data/topics.py#{key}", text=text_of.encode())


def documents(
    *, perl_root: Path = Path("/usr/share/perl"), licence_root: Path = Path("/usr/share/common-licenses")
) -> list[Document]:
    """The corpus of this machine, sorted by domain and name, cut to `MAX_DOCUMENT_BYTES`, exact duplicates removed."""
    paths = sysconfig.get_paths()
    found = list(_standard_library(Path(paths["stdlib"])))
    headers = Path(paths["include"])
    found += [
        Document(domain="c", name=f"include/{path.relative_to(headers).as_posix()}", text=text)
        for path in _files(headers, "**/*.h")
        if (text := _read(path))
    ]
    if licence_root.is_dir():
        found += [
            Document(domain="prose", name=f"licences/{path.name}", text=text)
            for path in sorted(licence_root.iterdir())
            if path.is_file() and not path.is_symlink() and (text := _read(path))
        ]
    if perl_root.is_dir():
        versions = sorted(path for path in perl_root.iterdir() if path.is_dir() and not path.is_symlink())
        found += [
            Document(domain="perl", name=f"perl/{path.relative_to(versions[-1]).as_posix()}", text=text)
            for path in (_files(versions[-1], "**/*.pm", "**/*.pod") if versions else [])
            if (text := _read(path)) and "unicore" not in path.parts
        ]
    kept: dict[str, Document] = {}
    for document in sorted(found, key=lambda d: (DOMAINS.index(d.domain), d.name)):
        if len(document.text) >= MIN_DOCUMENT_BYTES:
            cut = dataclasses.replace(document, text=document.text[:MAX_DOCUMENT_BYTES])
            kept.setdefault(cut.sha256, cut)
    return list(kept.values())


def joined(found: list[Document], domain: str, *, held_out: bool) -> bytes:
    """All documents of one domain and side of the split in one byte string, `SEPARATOR` between them."""
    return SEPARATOR.join(d.text for d in found if d.domain == domain and d.held_out == held_out)


def manifest(found: list[Document]) -> str:
    """One line per document: domain, split, bytes, SHA-256, name, under a heading that names the Python version."""
    lines = [f"# Python {platform.python_version()}: domain, split, bytes, sha256, name (tab-separated)"]
    for d in found:
        lines.append(
            "\t".join((d.domain, "held-out" if d.held_out else "train", str(len(d.text)), d.sha256[:32], d.name))
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the manifest, or say in how many documents this machine's corpus differs from a written one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--manifest", type=Path, default=Path(__file__).with_name("manifest.tsv"))
    parser.add_argument("--check", action="store_true", help="compare with the manifest, write nothing")
    parser.add_argument(
        "--texts", type=Path, help="write train/DOMAIN.txt and held-out/DOMAIN.txt into this folder, nothing else"
    )
    arguments = parser.parse_args()
    found = documents()
    if arguments.texts:
        for side in ("train", "held-out"):
            (arguments.texts / side).mkdir(parents=True, exist_ok=True)
            for domain in DOMAINS:
                (arguments.texts / side / f"{domain}.txt").write_bytes(
                    joined(found, domain, held_out=side == "held-out")
                )
        return
    text = manifest(found)
    if arguments.check:
        here, there = set(text.splitlines()), set(arguments.manifest.read_text().splitlines())
        equal = sum(not line.startswith("#") for line in here & there)
        print(f"{equal} documents equal, {len(there - here)} missing or different, {len(here - there)} new")
        return
    arguments.manifest.write_text(text)
    for domain in DOMAINS:
        sizes = [len(joined(found, domain, held_out=side)) for side in (False, True)]
        print(f"{domain:8s} train {sizes[0]:>10,} B   held out {sizes[1]:>9,} B")


if __name__ == "__main__":
    main()
