"""The standard library of the running Python as data, in two parts that share no module and no text.

A top-level module or package belongs to one part, by a hash of its name. A sentence does too, by a hash of
its words, and is used only where both agree: so a sentence that occurs in modules of either part is in
one part only, and no file has to be read to know.
"""

from __future__ import annotations

import ast
import inspect
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from hashlib import sha256
from itertools import islice
from pathlib import Path
from random import Random

from eckart.data.sentences import sentences
from eckart.data.textdata import PARTS
from eckart.errors import FileError

_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}
)
_GENERATED = ("encodings", "pydoc_data", "_sysconfigdata")
_PER_FILE = 16
_WORD = re.compile(r"\w+")


def library_files(part: str) -> list[tuple[str, Path]]:
    """(path within the library, file) of the Python files of one part, sorted; tests and tables left out.

    Raises FileError where the standard library does not lie in files.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in root.rglob("*.py"):
        inside = path.relative_to(root)
        if _LEFT_OUT.intersection(inside.parts) or inside.parts[0].startswith(_GENERATED):
            continue
        # Without leading underscores, so that a module and its private half stay together.
        if part_of(inside.parts[0].removesuffix(".py").lstrip("_")) == part:
            files.append((inside.as_posix(), path))
    if not files:
        raise FileError(f"no Python files of the standard library under {root}. Give a .txt or .jsonl file.")
    return sorted(files)


def part_of(name: str) -> str:
    """The part that a name belongs to, for good: even hashes calibrate, odd ones evaluate."""
    return PARTS[sha256(name.encode()).digest()[0] % 2]


def read_docstrings(part: str, limit: int | None, seed: int) -> list[str]:
    """Sentences of docstrings, each once, in an order drawn with ``seed``.

    With ``limit``, files are read in random order until there are enough sentences, at most sixteen
    per file before all files have been seen.
    """
    random = Random(seed)
    files = [path for _, path in library_files(part)]
    random.shuffle(files)
    seen: set[str] = set()
    texts: list[str] = []
    spare: list[str] = []
    for path in files:
        found = [text for text in _sentences_of(path, part) if not _known(text, seen)]
        random.shuffle(found)
        texts += found[:_PER_FILE]
        spare += found[_PER_FILE:]
        if limit is not None and len(texts) >= limit:
            break
    random.shuffle(spare)
    texts = (texts + spare)[:limit]
    random.shuffle(texts)
    return texts


def read_sources(part: str, limit: int | None, seed: int) -> list[str]:
    """Whole source files that are not blank, each content once, in an order drawn with ``seed``.

    A content that the other part has too is in neither.
    """
    files = library_files(part)
    Random(seed).shuffle(files)
    foreign = {source_of(path) for other in PARTS if other != part for _, path in library_files(other)}
    own = dict.fromkeys(source_of(path) for _, path in files)
    return list(islice((text for text in own if text.strip() and text not in foreign), limit))


def source_of(path: Path) -> str:
    """A source file, decoded as Python does."""
    with tokenize.open(path) as file:
        return file.read()


def _sentences_of(path: Path, part: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node, clean=False)
            if docstring:
                yield from (t for t in sentences(inspect.cleandoc(docstring)) if part_of(_words(t)) == part)


def _words(text: str) -> str:
    return " ".join(_WORD.findall(text.casefold()))


def _known(text: str, seen: set[str]) -> bool:
    """Whether the same words were seen before; notes them."""
    words = _words(text)
    if words in seen:
        return True
    seen.add(words)
    return False
