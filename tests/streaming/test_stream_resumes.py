"""A run that was killed anywhere goes on where it was, and ends in the same bytes."""

from __future__ import annotations

import json

import pytest
import torch
from streamed_tiny_models import ASKED, contents, tiny

import eckart
from eckart.checkpoint import claim_output
from eckart.checkpoint.atomic import work_folder
from eckart.errors import FileError, MismatchError
from eckart.records import Budget
from eckart.streaming import Journal
from eckart.streaming import journal as journal_module
from eckart.verbs import stream as verb


class Killed(BaseException):
    """Stands for a process that is gone: nothing catches it."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def uninterrupted(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "small"
    eckart.compress_stream(model, folder, **ASKED)
    return contents(folder)


def kill_after(monkeypatch, units: int) -> list[str]:
    """The process ends just before it notes its ``units``-th unit; returns the list of those it noted."""
    noted: list[str] = []
    usual = Journal.done

    def done(self, unit, files, **facts):
        if len(noted) == units:
            raise Killed
        noted.append(unit)
        usual(self, unit, files, **facts)

    monkeypatch.setattr(Journal, "done", done)
    return noted


@pytest.mark.parametrize("units", [0, 1, 3, 6, 7, 8, 10, 11, 12, 14, 16])
def test_killed_once(units, model, uninterrupted, tmp_path, monkeypatch):
    out = tmp_path / "small"
    with monkeypatch.context() as patch:
        noted = kill_after(patch, units)
        with pytest.raises(Killed):
            eckart.compress_stream(model, out, **ASKED)
    assert len(noted) == units
    assert not out.exists()
    made = eckart.compress_stream(model, out, **ASKED)
    assert made.resumed
    assert contents(out) == uninterrupted
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("mixtral", {}),
        ("llama", {"keep": None, "budget": Budget(bytes=143_000), "exclude": ["*.0.*", "*.2.*"]}),
        ("llama", {"method": "modules", "keep": 0.8}),
    ],
    ids=["experts", "bits", "modules"],
)
def test_other_requests_end_in_the_same_bytes_too(name, asked, tmp_path, monkeypatch):
    folder = tiny(name, tmp_path / "model")
    asked = {**ASKED, **asked}
    whole = eckart.compress_stream(folder, tmp_path / "whole", **asked)
    assert any(step.bits for step in whole.plan.steps) == ("budget" in asked)
    for units in (8, 4, 3):  # of 2 + 5 + 1 + 4 + 5: in the backward pass, then twice while writing
        with monkeypatch.context() as patch:
            kill_after(patch, units)
            with pytest.raises(Killed):
                eckart.compress_stream(folder, tmp_path / "out", **asked)
    eckart.compress_stream(folder, tmp_path / "out", **asked)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_killed_again_and_again_makes_every_unit_once(model, uninterrupted, tmp_path, monkeypatch):
    out = tmp_path / "small"
    noted: list[str] = []
    for _ in range(40):
        with monkeypatch.context() as patch:
            this_time = kill_after(patch, 2)
            try:
                eckart.compress_stream(model, out, **ASKED)
                break
            except Killed:
                noted += this_time
    noted += this_time
    assert len(noted) == len(set(noted)) == 2 + 5 + 1 + 4 + 5
    assert contents(out) == uninterrupted


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_around_the_swap(moment, model, uninterrupted, tmp_path, monkeypatch):
    out = tmp_path / "small"
    name = "put_in_place" if moment == "before" else "set_aside"
    with monkeypatch.context() as patch:
        patch.setattr(verb, name, lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            eckart.compress_stream(model, out, **ASKED)
    assert out.exists() == (moment == "after")
    eckart.compress_stream(model, out, **ASKED)
    assert contents(out) == uninterrupted
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def flip(path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-40] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("unit", "file", "damage"),
    [
        (7, "inputs-0002.safetensors", flip),
        (9, "gradients-0004.safetensors", flip),
        (10, "gradients-0003.safetensors", flip),
        (14, "block-0001-003.safetensors", flip),
        (14, "block-0002-000.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-8])),
        (14, "inputs-0003.safetensors", lambda path: path.unlink()),
        (14, "model/model-00001-of-00005.safetensors", flip),
        (8, "journal.jsonl", lambda path: path.write_bytes(path.read_bytes()[:-5])),
        (8, "journal.jsonl", lambda path: path.write_bytes(path.read_bytes() + b'{"unit": "inp')),
        (4, ".inputs-0003.safetensors.part", lambda path: path.write_bytes(b"half")),
    ],
)
def test_damaged_scratch_is_made_again(unit, file, damage, model, uninterrupted, tmp_path, monkeypatch):
    out = tmp_path / "small"
    with monkeypatch.context() as patch:
        kill_after(patch, unit)
        with pytest.raises(Killed):
            eckart.compress_stream(model, out, **ASKED)
    damage(work_folder(out) / file)
    eckart.compress_stream(model, out, **ASKED)
    assert contents(out) == uninterrupted


def begun(model, out, monkeypatch, **asked) -> None:
    with monkeypatch.context() as patch:
        kill_after(patch, 5)
        with pytest.raises(Killed):
            eckart.compress_stream(model, out, **{**ASKED, **asked})


def test_another_command_model_or_data_is_refused_and_nothing_lost(model, uninterrupted, tmp_path, monkeypatch):
    out = tmp_path / "small"
    begun(model, out, monkeypatch)
    other = tiny("llama-tied-bf16", tmp_path / "other")
    for changed, words in (
        ({"keep": 0.6}, "budget: keep 0.5"),
        ({"method": "whitened"}, "method: kfac then, whitened now"),
        ({"data": [text.upper() for text in ASKED["data"]]}, "data: "),
        ({"seed": 1, "rank_multiple": 2}, "rank_multiple: 1 then, 2 now"),
    ):
        with pytest.raises(MismatchError, match="start over") as error:
            eckart.compress_stream(model, out, **{**ASKED, **changed})
        assert words in str(error.value)
    with pytest.raises(MismatchError, match="model: "):
        eckart.compress_stream(other, out, **ASKED)
    eckart.compress_stream(model, out, **ASKED, command="what is typed the second time does not matter")
    assert contents(out) == uninterrupted


def test_the_number_of_threads_stays_that_of_the_beginning(model, tmp_path, monkeypatch):
    out = tmp_path / "small"
    begun(model, out, monkeypatch)
    first = torch.get_num_threads()
    seen = []
    usual = verb.stream

    def told(*args, **keywords):
        seen.append(torch.get_num_threads())
        return usual(*args, **keywords)

    monkeypatch.setattr(verb, "stream", told)
    torch.set_num_threads(first + 1)
    try:
        eckart.compress_stream(model, out, **ASKED)
        assert torch.get_num_threads() == first + 1
    finally:
        torch.set_num_threads(first)
    assert seen == [first]


def test_an_output_that_appeared_meanwhile_is_not_replaced(model, tmp_path, monkeypatch):
    out = tmp_path / "small"
    begun(model, out, monkeypatch)
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(FileError, match="overwrite"):
        eckart.compress_stream(model, out, **ASKED)
    assert contents(out) == {"precious.txt": b"mine"}
    eckart.compress_stream(model, out, **ASKED, overwrite=True)
    assert (out / "config.json").exists()


def test_two_runs_on_one_output(model, tmp_path, monkeypatch):
    with claim_output(tmp_path / "small"), pytest.raises(FileError, match="another run"):
        eckart.compress_stream(model, tmp_path / "small", **ASKED)
    assert list(tmp_path.iterdir()) == []


def test_the_journal_is_lines_that_people_can_read(model, tmp_path, monkeypatch):
    out = tmp_path / "small"
    begun(model, out, monkeypatch)
    lines = [json.loads(line) for line in (work_folder(out) / journal_module.FILE).read_text().splitlines()]
    assert lines[0]["identity"]["method"] == "kfac"
    assert [line["unit"] for line in lines[1:]] == ["begun", "inputs-0000", "inputs-0001", "inputs-0002", "inputs-0003"]
