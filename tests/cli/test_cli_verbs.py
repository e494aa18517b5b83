"""Each command passes on what was asked and prints its result, and only that, on stdout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import pytest
from cli_stand_ins import METHODS, PREVIEW

import eckart
from eckart.errors import BudgetError, FileError, MismatchError, NotFiniteError
from eckart.records import Budget


def test_compress_passes_on_what_was_typed_and_nothing_else(run, verbs, tmp_path):
    out = tmp_path / "small"
    ran = run("compress", "m", "-o", out, "--data", "stdlib:docstrings", "--max-bytes", "40MB", "--samples", 8)
    assert ran.code == 0, ran.err
    assert verbs.asked("compress") == {
        "data": "stdlib:docstrings",
        "samples": 8,
        "budget": Budget(bytes=40_000_000),
    }
    assert verbs.calls[0][1] == ("m",)
    saved = verbs.asked("save")
    assert saved["overwrite"] is False
    assert saved["command"].startswith("eckart compress m -o ")
    assert f"saved to {out}" in ran.out


def test_every_option_of_compress_reaches_the_verb(run, verbs, tmp_path):
    ran = run(
        *("compress", "m", "-o", tmp_path / "small", "--data", "stdlib:source", "--keep", "0.6"),
        *("--field", "text", "--length", "64", "--batch-size", "4", "--gradients", "scale", "--probes", "2"),
        *("--method", "kfac", "--option", "rho=1e-2", "--option", "name=a", "--allocation", "global"),
        *("--include", "*.q", "--include", "re:k$", "--exclude", "x", "--embeddings", "--no-head"),
        *("--form", "dense", "--form", "pivoted", "--rank-multiple", "8", "--min-rank", "2", "--seed", "3"),
        *("--dtype", "bfloat16", "--device", "cpu", "--no-certify", "--max-shard-size", "1GB"),
    )
    assert ran.code == 0, ran.err
    assert verbs.asked("compress") == {
        "data": "stdlib:source",
        "field": "text",
        "length": 64,
        "batch_size": 4,
        "gradients": "scale",
        "probes": 2,
        "budget": Budget(keep=0.6),
        "method": "kfac",
        "options": {"rho": 0.01, "name": "a"},
        "allocation": "global",
        "include": ("*.q", "re:k$"),
        "exclude": ("x",),
        "embeddings": True,
        "head": False,
        "forms": ("dense", "pivoted"),
        "rank_multiple": 8,
        "min_rank": 2,
        "seed": 3,
        "dtype": "bfloat16",
        "certify": False,
        "device": "cpu",
    }
    assert verbs.asked("save")["max_shard_size"] == "1GB"


def test_calibrate_and_plan_write_their_files(run, verbs, tmp_path):
    moments, plan = tmp_path / "moments.safetensors", tmp_path / "plan.json"
    ran = run("calibrate", "m", "--data", "stdlib:docstrings", "-o", moments, "--json")
    assert ran.code == 0, ran.err
    assert moments.read_text() == "moments"
    assert verbs.calls[0][1] == ("m", "stdlib:docstrings")
    assert set(json.loads(ran.out)) == {"moments", "fingerprint", "sites", "meta", "seconds"}

    ran = run("plan", "m", "--moments", moments, "--keep", "0.6", "-o", plan)
    assert ran.code == 0, ran.err
    assert plan.read_text() == "plan"
    assert verbs.asked("plan") == {"budget": Budget(keep=0.6)}
    assert verbs.calls[1][1] == ("m", str(moments))
    assert "layers.0.q" in ran.out


def test_svd_needs_neither_data_nor_moments(run, verbs, tmp_path):
    ran = run("compress", "m", "-o", tmp_path / "small", "--method", "svd", "--keep", "0.6")
    assert ran.code == 0, ran.err
    ran = run("compress", "m", "-o", tmp_path / "other", "--method", "kfac", "--keep", "0.6")
    assert ran.code == 2
    assert "kfac needs statistics" in ran.err
    ran = run("plan", "m", "-o", tmp_path / "plan.json", "--method", "kfac", "--keep", "0.6")
    assert ran.code == 2
    assert "--moments is missing" in ran.err


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (
            ("compress", "m", "-o", "OUT", "--data", "stdlib:source", "--keep", ".6"),
            {"folder", "outcome", "plan"},
        ),
        (("compress", "m", "--data", "stdlib:source", "--keep", ".6", "--dry-run"), set(PREVIEW)),
        (("calibrate", "m", "--data", "stdlib:source", "--dry-run"), set(PREVIEW)),
        (("plan", "m", "--method", "svd", "--keep", ".6", "--dry-run"), set(PREVIEW)),
        (("evaluate", "m", "--against", "b", "--data", "stdlib:source"), {"evaluation"}),
        (("export", "IN", "--to", "dense", "-o", "OUT"), {"folder", "to", "bytes"}),
        (("methods",), {"methods"}),
        (("claims",), {"claims"}),
        (("demo", "-o", "OUT"), {"folder", "report", "outcome", "evaluation", "seconds"}),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_json_is_all_there_is_on_stdout(run, verbs, tmp_path, arguments, keys):
    (tmp_path / "in").mkdir()
    places = {"OUT": str(tmp_path / "out"), "IN": str(tmp_path / "in")}
    ran = run(*(places.get(word, word) for word in arguments), "--json")
    assert ran.code == 0, ran.err
    assert set(json.loads(ran.out, parse_constant=pytest.fail)) == keys


def test_quiet_says_nothing_on_stderr(run, verbs, tmp_path):
    (tmp_path / "in").mkdir()
    arguments = ("export", tmp_path / "in", "--to", "dense", "-o")
    assert "save nothing" in run(*arguments, tmp_path / "a").err
    quiet = run(*arguments, tmp_path / "b", "--quiet")
    assert quiet.err == "a library that chatters on stdout\n"
    assert "saved to" in quiet.out


def test_evaluate_shows_intervals_sizes_and_protocol(run, verbs):
    ran = run("evaluate", "m", "--against", "b", "--data", "stdlib:docstrings", "--no-latency", "--seed", "1")
    assert ran.code == 0, ran.err
    assert verbs.asked("evaluate") == {"latency": False, "seed": 1}
    assert verbs.calls[0][1] == ("m", "b", "stdlib:docstrings")
    for words in ("cosine", "2.00", "sha256: ab", "parameters"):
        assert words in ran.out


def test_a_dry_run_writes_nothing_and_needs_no_output(run, verbs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = run("compress", "m", "--data", "stdlib:source", "--keep", ".6", "--dry-run")
    assert ran.code == 0, ran.err
    assert verbs.asked("preview") == {"data": "stdlib:source", "budget": Budget(keep=0.6)}
    assert [name for name, _, _ in verbs.calls] == ["preview"]
    assert list(tmp_path.iterdir()) == []


def test_methods_list_needs_and_options(run, verbs):
    listed = json.loads(run("methods", "--json").out)["methods"]
    assert [row["name"] for row in listed] == [m.name for m in METHODS]
    assert listed[1]["needs"] == ["gradient", "second"]
    assert listed[0]["options"] == [{"name": "rho", "type": "float", "default": 0.1}]
    shown = run("methods").out
    assert "what kfac does" in shown
    assert "rho=0.1" in shown


def test_a_failed_claim_is_exit_code_1(run, verbs):
    assert run("claims", "svd").code == 0
    assert verbs.calls[0][1] == (("svd",),)
    verbs.verdicts = (True, False)
    ran = run("claims")
    assert ran.code == 1
    assert "FAILED" in ran.out
    assert "a note" in ran.out


@pytest.mark.parametrize(
    ("trouble", "code"),
    [
        (FileError("cut short"), 1),
        (NotFiniteError("NaN in layer 3"), 1),
        (OSError(28, "No space left on device"), 1),
        (BudgetError("too small"), 2),
        (MismatchError("another model"), 2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exit_codes_of_errors_from_the_verbs(run, verbs, tmp_path, trouble, code):
    verbs.trouble = trouble
    ran = run("compress", "m", "-o", tmp_path / "small", "--data", "stdlib:source", "--keep", ".6")
    assert ran.code == code
    assert str(trouble) in ran.err
    assert ran.out == ""
    assert "Traceback" not in ran.err


def test_a_bug_is_not_dressed_up(run, verbs, tmp_path):
    verbs.trouble = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        run("compress", "m", "-o", tmp_path / "small", "--data", "stdlib:source", "--keep", ".6")


def test_an_interrupt_says_what_stands(run, verbs, tmp_path):
    verbs.trouble = KeyboardInterrupt()
    out = tmp_path / "small"
    compress = ("compress", "m", "-o", out, "--data", "stdlib:source", "--keep", ".6")
    ran = run(*compress)
    assert (ran.code, ran.out) == (130, "")
    assert f"{out} was not written" in ran.err
    out.mkdir()
    (out / "config.json").write_text("{}")
    ran = run(*compress, "--overwrite")
    assert ran.code == 130
    assert f"{out} is as it was before" in ran.err
    ran = run("evaluate", "m", "--against", "b", "--data", "stdlib:source")
    assert ran.code == 130
    assert "Nothing was written" in ran.err


def test_only_the_first_process_prints_and_writes(run, verbs, tmp_path, monkeypatch):
    moments = tmp_path / "moments.safetensors"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    ran = run("calibrate", "m", "--data", "stdlib:source", "-o", moments)
    assert ran.code == 0
    assert ran.out == ""
    assert not moments.exists()
    assert verbs.asked("calibrate") == {}
    monkeypatch.setenv("RANK", "0")
    assert run("calibrate", "m", "--data", "stdlib:source", "-o", moments).code == 0
    assert moments.exists()


def test_doctor_fails_where_the_folder_is_not_whole(run, monkeypatch, tmp_path):

    @dataclass
    class State:
        path: str
        whole: bool
        problems: tuple[str, ...] = ()
        weight_files: Mapping[str, int] = field(default_factory=lambda: {"model.safetensors": 2_000_000})

        def to_json(self):
            return asdict(self)

    monkeypatch.setitem(vars(eckart), "doctor", lambda path: State(path, True))
    assert "model.safetensors: 2.00\xa0MB" in run("doctor", tmp_path).out
    monkeypatch.setitem(vars(eckart), "doctor", lambda path: State(path, False, ("x is missing",)))
    ran = run("doctor", tmp_path)
    assert ran.code == 1
    assert "x is missing" in ran.out
