"""The standard library of the running Python as data, in two parts that share no module and no text.

A top-level module or package belongs to one part, by a hash of its name. A sentence does too, by a hash of
its words, and is used only where both agree: so a sentence that occurs in modules of either part is in
one part only, and no file has to be read to know.
"""

from __future__ import annotations

import ast
import functools
import inspect
import os
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
_BLOCKS = frozenset({"body", "handlers", "orelse", "finalbody", "cases"})
"""Fields of statements that hold statements."""
_PER_FILE = 16
_WORD = re.compile(r"\w+")


def library_files(part: str) -> list[tuple[str, Path]]:
    """(path within the library, file) of the Python files of one part, sorted; tests and tables left out.

    Raises FileError where the standard library does not lie in files.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [(inside, root / inside) for inside in _modules(root) if _owner(inside.partition("/")[0]) == part]
    if not files:
        raise FileError(f"no Python files of the standard library under {root}. Give a .txt or .jsonl file.")
    return files


@functools.cache
def _modules(root: Path) -> tuple[str, ...]:
    """Paths below ``root``, sorted; found once per process, without a look into what is left out."""
    found = []
    for place, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        inside = Path(place).relative_to(root)
        found += [(inside / name).as_posix() for name in names if name.endswith(".py")]
    return tuple(sorted(path for path in found if not path.startswith(_GENERATED)))


def _owner(top: str) -> str:
    """The part of a top-level module; leading underscores do not count, so that its private half stays with it."""
    return part_of(top.removesuffix(".py").lstrip("_"))


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
    foreign = frozenset[bytes]().union(*(_digests(other) for other in PARTS if other != part))
    own = dict.fromkeys(source_of(path) for _, path in files)
    return list(islice((text for text in own if text.strip() and _digest(text) not in foreign), limit))


@functools.cache
def _digests(part: str) -> frozenset[bytes]:
    """Of the contents of the files of a part, read once per process."""
    return frozenset(_digest(source_of(path)) for _, path in library_files(part))


def _digest(text: str) -> bytes:
    return sha256(text.encode()).digest()


def source_of(path: Path) -> str:
    """A source file, decoded as Python does."""
    with tokenize.open(path) as file:
        return file.read()


@functools.cache
def _sentences_of(path: Path, part: str) -> tuple[str, ...]:
    """Those of a file that belong to the part; a file is parsed once per process."""
    found = []
    for node in _statements(ast.parse(path.read_bytes())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node, clean=False)
            if docstring:
                found += [t for t in sentences(inspect.cleandoc(docstring)) if part_of(_words(t)) == part]
    return tuple(found)


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """What :func:`ast.walk` yields, in its order, without the expressions: no definition lies within one."""
    todo: list[ast.AST] = [tree]
    for node in todo:
        yield node
        for name in node._fields:
            if name in _BLOCKS:
                todo += getattr(node, name)


def _words(text: str) -> str:
    return " ".join(_WORD.findall(text.casefold()))


def _known(text: str, seen: set[str]) -> bool:
    """Whether the same words were seen before; notes them."""
    words = _words(text)
    if words in seen:
        return True
    seen.add(words)
    return False
