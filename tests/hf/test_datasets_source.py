"""Data sets by name: how the name is read, which split and field are taken, what is said when it fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eckart.errors import InputError
from eckart.hf.datasets_source import choose_field, choose_split, parse_spec, read_dataset, texts_of


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("datasets:imdb", ("imdb", None, None)),
        ("datasets:a/b:test", ("a/b", None, "test")),
        ("datasets:wikitext:wikitext-2-raw-v1", ("wikitext", "wikitext-2-raw-v1", None)),
        ("datasets:wikitext:wikitext-2-raw-v1:train", ("wikitext", "wikitext-2-raw-v1", "train")),
    ],
)
def test_names(spec: str, expected: tuple[str, str | None, str | None]) -> None:
    assert parse_spec(spec) == expected


@pytest.mark.parametrize("spec", ["datasets:", "datasets:a:", "datasets:a:b:c:d", "imdb", "datasets::train"])
def test_bad_names(spec: str) -> None:
    with pytest.raises(InputError, match="NAME"):
        parse_spec(spec)


def test_splits() -> None:
    usual = ["train", "test", "validation"]
    assert choose_split(usual, None, "calibration") == ("train", False)
    assert choose_split(usual, None, "evaluation") == ("validation", False)
    assert choose_split(["train"], None, "evaluation") == ("train", True)
    assert choose_split(usual, "test", "calibration") == ("test", False)
    with pytest.raises(InputError, match="Did you mean 'train'"):
        choose_split(usual, "trian", "calibration")
    with pytest.raises(InputError, match="name one"):
        choose_split(["a", "b"], None, "calibration")


def test_fields() -> None:
    assert choose_field(["label", "sentence"], None) == "sentence"
    assert choose_field(["label", "body"], "body") == "body"
    with pytest.raises(InputError, match="Did you mean 'text'"):
        choose_field(["text"], "texts")
    with pytest.raises(InputError, match="which field"):
        choose_field(["label", "body"], None)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    where = tmp_path / "data"
    where.mkdir()
    rows = [json.dumps({"text": f"text number {i}", "label": i}) for i in range(100)]
    (where / "train.jsonl").write_text("\n".join(rows))
    return where


def test_parts_of_one_split_are_disjoint_and_whole(folder: Path) -> None:
    one, two = (set(read_dataset(f"datasets:{folder}", part=part).texts) for part in ("calibration", "evaluation"))
    assert not one & two
    assert one | two == {f"text number {i}" for i in range(100)}
    assert 10 <= len(two) <= 35


def test_limit_seed_and_hash(folder: Path) -> None:
    first, again, other = (texts_of(f"datasets:{folder}", limit=7, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert len(first.texts) == 7
    assert first.texts != other.texts
    assert first.sha256 != other.sha256
    assert first.part == "calibration"


def test_fields_that_are_not_there_or_not_text(folder: Path) -> None:
    with pytest.raises(InputError, match="unknown field 'txt'"):
        read_dataset(f"datasets:{folder}", field="txt")
    with pytest.raises(InputError, match="holds int, expected text"):
        read_dataset(f"datasets:{folder}", field="label")


def test_a_data_set_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="could not be read"):
        read_dataset("datasets:eckart-tests/no-such-data")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'eckart\[hf\]'"):
        read_dataset("datasets:imdb")
