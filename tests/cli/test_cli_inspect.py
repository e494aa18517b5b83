"""``eckart inspect`` and ``eckart dimension``: what is passed on, printed, written and refused."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import eckart


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"model.layers.{i}.{role}.weight": torch.randn(m, n, generator=generator)
        for i in range(2)
        for role, m, n in (("q", 24, 24), ("up", 48, 24))
    }
    save_file(weights | {"norm.weight": torch.ones(24)}, tmp_path / "w.safetensors")
    weights["model.layers.0.q.weight"] = weights["model.layers.0.q.weight"] + 0.5
    save_file(weights, tmp_path / "base.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:-9])
    save_file({"other": torch.ones(3, 5)}, tmp_path / "other.safetensors")
    draw = np.random.default_rng(0)
    np.save(tmp_path / "X.npy", draw.random((300, 2)) @ draw.normal(size=(2, 8)))
    np.save(tmp_path / "nan.npy", np.full((9, 2), np.nan))
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "page.html").write_text("old")
    (tmp_path / "folder").mkdir()
    return tmp_path


def test_a_file_of_weights_is_shown_and_its_page_written(run, place) -> None:
    ran = run("inspect", "w.safetensors", "-o", "new.html")
    assert ran.code == 0, ran.err
    assert "model.layers.1.up" in ran.out
    assert "not measured: 1 (1-D" in " ".join(ran.out.split())
    assert "page saved to new.html" in ran.out
    page = (place / "new.html").read_text(encoding="utf-8")
    assert "eckart inspect w.safetensors -o new.html" in page
    assert sorted(path.name for path in place.iterdir() if path.name.startswith(".")) == []


def test_json_is_all_there_is_on_stdout(run, place) -> None:
    ran = run("inspect", "w.safetensors", "--json", "--tier", "quick")
    assert ran.code == 0, ran.err
    content = json.loads(ran.out, parse_constant=pytest.fail)
    assert set(content) == {"inspection", "page"}
    assert len(content["inspection"]["matrices"]) == 5
    assert content["page"] is None
    ran = run("dimension", "X.npy", "--json")
    content = json.loads(ran.out, parse_constant=pytest.fail)
    assert content["dimension"]["n"] == 300
    assert content["dimension"]["curves"]["two_nn"][0]["value"] == pytest.approx(2, abs=0.5)


def test_a_base_gives_columns_of_the_change(run, place) -> None:
    ran = run("inspect", "w.safetensors", "--against", "base.safetensors", "--json")
    assert ran.code == 0, ran.err
    matrices = {m["name"]: m for m in json.loads(ran.out)["inspection"]["matrices"]}
    assert matrices["model.layers.0.q.weight"]["findings"]["delta_rank_99"]["value"] == 1
    text = " ".join(run("inspect", "w.safetensors", "--against", "base.safetensors").out.split())
    assert "LoRA rank" in text
    assert "not compared: 3 (equal)" in text


def test_what_is_typed_reaches_the_verb(run, place, monkeypatch) -> None:
    asked = {}

    class Found:
        def to_json(self):
            return {}

    def stand_in(model, **keywords):
        asked.update(keywords, model=model)
        return Found()

    monkeypatch.setitem(vars(eckart), "inspect", stand_in)
    ran = run(
        *("inspect", "folder", "--tier", "full", "--against", "b", "--data", "stdlib:source", "--samples", "3"),
        *("--field", "f", "--length", "9", "--batch-size", "2", "--include", "*.q", "--include", "*.k"),
        *("--exclude", "x", "--cache", "c", "--seed", "5", "--dtype", "float32", "--device", "cpu", "--json"),
    )
    assert ran.code == 0, ran.err
    asked.pop("progress")
    assert asked.pop("command").startswith("eckart inspect folder --tier full")
    assert asked == {
        "model": "folder",
        "tier": "full",
        "against": "b",
        "data": "stdlib:source",
        "samples": 3,
        "field": "f",
        "length": 9,
        "batch_size": 2,
        "include": ("*.q", "*.k"),
        "exclude": ("x",),
        "cache": "c",
        "seed": 5,
        "dtype": "float32",
        "device": "cpu",
    }


def test_include_leaves_the_others_listed(run, place) -> None:
    ran = run("inspect", "w.safetensors", "--include", "*.q", "--json", "--tier", "quick")
    matrices = json.loads(ran.out)["inspection"]["matrices"]
    assert len(matrices) == 5
    assert sum(not m["skipped"] for m in matrices) == 2


def test_the_dimension_is_shown_and_its_page_written(run, place) -> None:
    ran = run("dimension", "X.npy", "-o", "d.html", "--at-most", "200", "--neighbours", "10", "--seed", "3")
    assert ran.code == 0, ran.err
    assert ran.out.startswith("Dimension about")
    assert "200 of 300 different rows were drawn" in ran.out
    assert "page saved to d.html" in ran.out
    assert "eckart dimension X.npy" in (place / "d.html").read_text(encoding="utf-8")


CASES = {
    "no model": (("inspect",), "MODEL is missing"),
    "no such file": (("inspect", "no.safetensors"), "MODEL: no.safetensors does not exist"),
    "tier typo": (("inspect", "w.safetensors", "--tier", "ful"), "Did you mean 'full'?"),
    "data for a file": (
        ("inspect", "w.safetensors", "--data", "stdlib:source"),
        "w.safetensors is a file of weights: name its folder",
    ),
    "no such data": (("inspect", "folder", "--data", "no.txt"), "there is no file no.txt"),
    "options without data": (
        ("inspect", "w.safetensors", "--samples", "3", "--seed", "1"),
        "--samples, --seed have no effect without --data",
    ),
    "base of other shapes": (("inspect", "w.safetensors", "--against", "other.safetensors"), "another model"),
    "no such base": (("inspect", "w.safetensors", "--against", "no.safetensors"), "--against: no.safetensors"),
    "page exists": (("inspect", "w.safetensors", "-o", "page.html"), "page.html exists; give --overwrite"),
    "page is a folder": (("inspect", "w.safetensors", "-o", "folder"), "folder is a folder, a file is expected"),
    "page is the model": (
        ("inspect", "w.safetensors", "-o", "w.safetensors", "--overwrite"),
        "what the result is made from",
    ),
    "page in no folder": (("inspect", "w.safetensors", "-o", "a/b.html"), "does not exist; make it first"),
    "cache is a file": (("inspect", "w.safetensors", "--cache", "notes.txt"), "--cache: notes.txt is a file"),
    "pattern of nothing": (("inspect", "w.safetensors", "--include", "zzz"), "zzz"),
    "no data": (("dimension", "no.npy"), "DATA: no.npy does not exist"),
    "data of another kind": (("dimension", "notes.txt"), "expected a .npy or .safetensors file"),
    "data is a folder": (("dimension", "folder"), "is a folder, a file is expected"),
    "one neighbour": (("dimension", "X.npy", "--neighbours", "1"), "--neighbours: at least 2"),
    "at most two": (("dimension", "X.npy", "--at-most", "2"), "--at-most: at least 3"),
    "dimension page exists": (("dimension", "X.npy", "-o", "page.html"), "give --overwrite"),
    "several tensors": (("dimension", "w.safetensors"), "say which one: --name"),
    "a vector": (("dimension", "w.safetensors", "--name", "norm.weight"), "expected a matrix"),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_use(run, place, case) -> None:
    arguments, words = CASES[case]
    ran = run(*arguments)
    assert ran.code == 2, ran
    assert words in " ".join(ran.err.split())
    assert ran.out == ""
    assert (place / "page.html").read_text() == "old"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("inspect", "cut.safetensors"), "cut short"),
        (("inspect", "folder"), "holds neither"),
        (("dimension", "nan.npy"), "NaN or Inf in 9 of 9 rows"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_what_cannot_be_read_fails(run, place, arguments, words) -> None:
    ran = run(*arguments)
    assert ran.code == 1, ran
    assert words in ran.err


def test_an_output_that_cannot_be_written_is_refused_before_the_work(run, place, monkeypatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the work began")

    monkeypatch.setitem(vars(eckart), "inspect", never)
    monkeypatch.setitem(vars(eckart), "dimension", never)
    for command in (("inspect", "w.safetensors"), ("dimension", "X.npy")):
        assert run(*command, "-o", "page.html").code == 2
        assert run(*command, "-o", "none/page.html").code == 2


def test_overwrite_replaces_the_page(run, place) -> None:
    assert run("inspect", "w.safetensors", "--tier", "quick", "-o", "page.html", "--overwrite").code == 0
    assert (place / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize("command", ["inspect", "dimension"])
def test_the_commands_have_help_without_torch(place, command) -> None:
    program = (
        "import sys\nfrom eckart.cli import main\n"
        "try:\n    main()\nexcept SystemExit as leave:\n"
        "    heavy = {'torch', 'transformers', 'numpy', 'scipy'} & set(sys.modules)\n"
        "    sys.exit(f'{heavy} imported' if heavy else leave.code)"
    )
    ran = subprocess.run([sys.executable, "-c", program, command, "--help"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    for words in (f"Usage: eckart {command}", "--json", "--quiet", "JSON: "):
        assert words in ran.stdout


def test_a_recipe_can_be_kept(run, place) -> None:
    (place / "recipe.yaml").write_text("model: w.safetensors\ntier: quick\noutput: {file: r.html}\n")
    assert run("inspect", "--recipe", "recipe.yaml").code == 0
    assert (place / "r.html").exists()
    assert "tier" in json.loads(run("schema", "inspect").out)["properties"]
