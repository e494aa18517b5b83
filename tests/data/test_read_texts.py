from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from eckart.data import TextData, read_texts
from eckart.errors import EckartError, FileError, InputError


def test_lines_of_a_text_file_and_its_running_text(tmp_path: Path) -> None:
    content = "One line.\r\n\n  Another  one.\n\n\n\x0cnot a line end \u2028 here\nlast"
    (tmp_path / "a.txt").write_bytes(content.encode())
    data = read_texts(str(tmp_path / "a.txt"))
    assert data.texts == ("One line.", "  Another  one.", "\x0cnot a line end \u2028 here", "last")
    assert data.joined == content
    assert data.part == "calibration"
    assert data.name == str(tmp_path / "a.txt")
    # Every byte counts, blank lines too: two texts of one hash are one text.
    (tmp_path / "b.txt").write_bytes(content.replace("\n\n\n", "\n\n").encode())
    assert read_texts(str(tmp_path / "b.txt")).texts == data.texts
    assert read_texts(str(tmp_path / "b.txt")).sha256 != data.sha256


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffÄrger".encode())
    assert read_texts(str(tmp_path / "a.txt")).joined == "Ärger"


def test_limit_draws_lines_by_seed_in_order(tmp_path: Path) -> None:
    lines = [f"line {i:03}" for i in range(100)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    spec = str(tmp_path / "a.txt")
    first = read_texts(spec, limit=10, seed=1)
    assert first == read_texts(spec, limit=10, seed=1)
    assert list(first.texts) == sorted(set(first.texts))
    assert len(first.texts) == 10
    assert set(first.texts) < set(lines)
    assert first.texts != read_texts(spec, limit=10, seed=2).texts
    assert first.joined == "\n".join(first.texts)
    assert read_texts(spec, limit=1000).joined == "\n".join(lines)


def test_records(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\\ntwo", "n": 1}\n\n{"text": " ", "n": 2}\n{"text": "three", "title": "x"}\n')
    data = read_texts(str(path), part="evaluation")
    assert data.texts == ("one\ntwo", "three")
    assert data.joined == "one\ntwo\n\nthree"
    assert data.part == "evaluation"


def test_the_field_of_records(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "one", "n": 1}\n{"body": "two", "n": 2}\n')
    assert read_texts(str(path)).texts == read_texts(str(path), field="body").texts == ("one", "two")
    with pytest.raises(InputError, match=r"line 1: unknown field 'boddy'. Did you mean 'body'"):
        read_texts(str(path), field="boddy")
    with pytest.raises(InputError, match="line 1: expected text in the field 'n', got int"):
        read_texts(str(path), field="n")
    path.write_text('{"title": "one", "body": "two"}\n')
    with pytest.raises(InputError, match="title, body"):
        read_texts(str(path))
    path.write_text('{"text": "one"}\n{"body": "two"}\n')
    with pytest.raises(InputError, match="line 2: unknown field 'text'"):
        read_texts(str(path))


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.txt", b"", InputError, "is empty"),
        ("a.txt", b" \n\t\n", InputError, "is empty"),
        ("a.txt", "\ufeff\n".encode(), InputError, "not blank"),
        ("a.txt", b"abc\0def", FileError, "binary"),
        ("a.txt", b"abc \xff\xfe", FileError, "not text in UTF-8 .byte 0xff at 4"),
        ("a.jsonl", b"", InputError, "is empty"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', InputError, "line 2: not JSON"),
        ("a.jsonl", b'["a"]\n', InputError, "line 1: expected a JSON object, got list"),
        ("a.jsonl", b'{"text": ""}\n', InputError, "at least one text"),
        ("a.jsonl", b"\x80\x04\x95\0\0", FileError, "binary"),
        ("a.csv", b"a,b\n", InputError, r"'\.csv' are not read; expected a \.txt or \.jsonl file"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, error: type[EckartError], message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        read_texts(str(tmp_path / name))


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("nowhere.txt", FileError, "no data file nowhere.txt"),
        ("wikitext", InputError, "unknown data 'wikitext'.*Expected a .txt or .jsonl file"),
        ("", InputError, "folder|unknown data"),
        ("datasets:wikitext", InputError, "eckart.hf"),
        ("stdlib:docstring", InputError, "Did you mean 'stdlib:docstrings'"),
    ],
)
def test_bad_specs(spec: str, error: type[EckartError], message: str) -> None:
    with pytest.raises((error, FileError) if not spec else error, match=message):
        read_texts(spec)


def test_a_folder_is_no_data(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="is a folder"):
        read_texts(str(tmp_path))


def test_options_that_cannot_be_honoured_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    for spec in (str(tmp_path / "a.txt"), "stdlib:source"):
        with pytest.raises(InputError, match="Leave out field='text'"):
            read_texts(spec, field="text")
    with pytest.raises(InputError, match="at least 1; got 0"):
        read_texts("stdlib:source", limit=0)
    with pytest.raises(InputError, match="Did you mean 'evaluation'"):
        read_texts("stdlib:source", part="evalution")


def test_texts_in_memory() -> None:
    data = TextData.of(["one", " ", "two"], part="evaluation")
    assert (data.texts, data.joined, data.part) == (("one", "two"), "one\n\ntwo", "evaluation")
    assert data.sha256 == TextData.of(["one", "two"]).sha256
    assert data.sha256 != TextData.of(["onet", "wo"]).sha256
    for wrong, message in (
        ("text", "one string"),
        ([], "not blank"),
        (["  "], "not blank"),
        ([1], "got int"),
    ):
        with pytest.raises(InputError, match=message):
            TextData.of(wrong)  # type: ignore[arg-type]


def test_text_data_is_frozen() -> None:
    data = TextData.of(["one"])
    with pytest.raises(AttributeError):
        data.part = "evaluation"  # type: ignore[misc]
    assert len(bytes.fromhex(data.sha256)) == hashlib.sha256().digest_size
