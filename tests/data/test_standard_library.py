from __future__ import annotations

import re

import pytest

from eckart.data import read_texts
from eckart.data.sentences import sentences
from eckart.data.stdlib import library_files


def test_parts_share_no_module() -> None:
    tops = [{name.partition("/")[0] for name, _ in library_files(part)} for part in ("calibration", "evaluation")]
    assert not tops[0] & tops[1]
    assert min(len(names) for names in tops) > 40
    everything = {name for part in ("calibration", "evaluation") for name, _ in library_files(part)}
    assert {"argparse.py", "asyncio/events.py", "json/decoder.py"} <= everything
    assert not any(re.search(r"(^|/)(test|tests|site-packages|idlelib|__pycache__)/", name) for name in everything)


def test_docstrings_of_the_parts_share_no_sentence() -> None:
    parts = [read_texts("stdlib:docstrings", part=part) for part in ("calibration", "evaluation")]
    words = [{" ".join(re.findall(r"\w+", text.casefold())) for text in data.texts} for data in parts]
    assert not words[0] & words[1]
    for data, seen in zip(parts, words, strict=True):
        assert len(seen) == len(data.texts) > 2000
        assert all(4 <= len(text.split()) <= 64 and "\n" not in text and ">>>" not in text for text in data.texts)


@pytest.mark.parametrize("spec", ["stdlib:docstrings", "stdlib:source"])
def test_draws(spec: str) -> None:
    """The same seed gives the same texts; a limit gives exactly that many, all of them of the part."""
    data = read_texts(spec, limit=60, seed=3)
    assert data == read_texts(spec, limit=60, seed=3)
    other = read_texts(spec, limit=60, seed=4)
    assert len(data.texts) == len(set(data.texts)) == len(other.texts) == 60
    assert set(data.texts) != set(other.texts)
    assert data.sha256 != other.sha256
    assert not set(data.texts) & set(read_texts(spec, part="evaluation", limit=60, seed=3).texts)
    assert data.name.startswith(f"{spec} of Python 3.")


def test_sources_are_whole_files() -> None:
    calibration, evaluation = (read_texts("stdlib:source", part=part) for part in ("calibration", "evaluation"))
    assert not set(calibration.texts) & set(evaluation.texts)
    assert min(len(calibration.texts), len(evaluation.texts)) > 100
    compile(calibration.texts[0], "first", "exec")
    assert calibration.joined == "\n\n".join(calibration.texts)


def test_sentences_of_a_docstring() -> None:
    docstring = """read(size=-1, /) -> bytes

Read up to size bytes, i.e. a block. If the argument is
omitted (e.g. by mistake), read until the end of the file!

>>> f.read(4)
This Is Output That Looks Like A Sentence.

------------------------
  * The first bullet is a sentence.
  * The second one is another.
Too short.
usage: x=[1], y={2: 3}, z=(4, 5, 6) == 7.
"""
    assert list(sentences(docstring)) == [
        "Read up to size bytes, i.e. a block.",
        "If the argument is omitted (e.g. by mistake), read until the end of the file!",
        "The first bullet is a sentence.",
        "The second one is another.",
    ]
    assert list(sentences(" ".join(["Long"] * 65) + ".")) == []
    assert list(sentences("")) == []
