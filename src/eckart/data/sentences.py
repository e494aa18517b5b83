"""Prose out of docstrings."""

from __future__ import annotations

import re
from collections.abc import Iterator

MIN_WORDS = 4
MAX_WORDS = 64

_DOCTEST = re.compile(r"^\s*(>>>|\.\.\.|\$ |% )")
_SIGNATURE = re.compile(r"^\s*[\w.]+\(.*\)(\s*->.*)?:?$")
_RULE = re.compile(r"^\s*([-=~*+_#]{3,}|[-=+| ]+)$")
_BULLET = re.compile(r"^\s*([-*+•]|\d+[.)])\s+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")
_WHOLE = re.compile(r"^[A-Z\"'(`*].*[.!?][\"')`*]*$")
_ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|etc|cf|vs|resp|approx|No|Fig|Mr|Dr)\.|\b[A-Z]\.)$")


def sentences(docstring: str) -> Iterator[str]:
    """The sentences of a cleaned docstring of 4 to 64 words, each on one line.

    Doctests with their output, signatures, ruled lines, and what does not begin and end like a sentence or
    is mostly not letters are left out. A bullet starts a new paragraph.
    """
    for paragraph in _paragraphs(docstring):
        for sentence in _split(paragraph):
            letters = sum(c.isalpha() or c.isspace() for c in sentence)
            whole = _WHOLE.match(sentence) and letters >= 0.8 * len(sentence)
            if whole and MIN_WORDS <= len(sentence.split()) <= MAX_WORDS:
                yield sentence


def _paragraphs(docstring: str) -> Iterator[str]:
    lines: list[str] = []
    in_doctest = False
    for line in [*docstring.splitlines(), ""]:
        blank = not line.strip()
        in_doctest = not blank and (in_doctest or _DOCTEST.match(line) is not None)
        dropped = blank or in_doctest or _SIGNATURE.match(line) or _RULE.match(line)
        if lines and (dropped or _BULLET.match(line)):
            yield " ".join(lines)
            lines = []
        if not dropped:
            lines.append(" ".join(_BULLET.sub("", line).split()))


def _split(paragraph: str) -> Iterator[str]:
    start = 0
    for end in _SENTENCE_END.finditer(paragraph):
        if not _ABBREVIATION.search(paragraph, start, end.start()):
            yield paragraph[start : end.start()]
            start = end.end()
    yield paragraph[start:]
