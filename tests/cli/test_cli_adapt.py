"""``eckart adapt`` and ``eckart convert``: what they pass on, what they refuse, and one run from file to adapter."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

import eckart
from eckart.cli.amounts import parse_budget
from eckart.data.examples import Fields
from eckart.records import Budget, Interval
from eckart.verbs.adapt import AdaptedLayer, AdaptOutcome, AdaptPlan
from eckart.verbs.convert import Converted

PLAN = AdaptPlan(
    method="eva",
    layers=(AdaptedLayer(name="layers.0.q", rank=3, parameters=60),),
    parameters=60,
    whole={"classifier": 10},
    model_parameters=12_000,
    kind="label",
    rows=90,
    held_out="10 of 100 rows of train.jsonl, drawn with seed 0",
    held_out_rows=10,
    steps=12,
    rate=5e-4,
    batch_size=8,
    length=256,
    notes=("2 examples were cut to 256 tokens",),
)
LOSS = Interval(mean=0.5, low=0.4, high=0.6, n=10, unit="nats per example")
OUTCOME = AdaptOutcome(
    plan=PLAN,
    before=LOSS,
    after=LOSS,
    change=Interval(mean=-0.25, low=-0.3, high=-0.2, n=10, unit="nats per example"),
    accuracy_before=LOSS,
    accuracy_after=LOSS,
    history=({"step": 1, "loss": 0.7},),
    resumed_from=4,
    seconds=1.0,
)


@pytest.fixture
def asked(monkeypatch):
    """What the verbs were called with; the result writes a folder."""
    calls: list[dict] = []

    def save(folder, **how):
        calls[-1]["save"] = how
        folder.mkdir(exist_ok=True)
        (folder / "eckart.json").write_text("{}")

    def adapt(*given, **keywords):
        keywords.pop("progress")("train", 1, 2)
        calls.append({"given": given, **keywords})
        content = {"plan": PLAN, **{n: getattr(OUTCOME, n) for n in vars(OUTCOME) if n != "plan"}, "labels": ["a", "b"]}
        plain = {**content, "plan": {**vars(PLAN), "share": PLAN.share}}
        return SimpleNamespace(save=save, to_json=lambda: plain)

    def adapt_plan(*given, **keywords):
        keywords.pop("progress")
        calls.append({"given": given, **keywords})
        return PLAN

    def convert(*given, **keywords):
        keywords.pop("progress")
        calls.append({"given": given, **keywords})
        given[2].mkdir()
        names = {"folder": given[2], "to": given[1], "exact": False, "rank": 8, "error": 0.02, "bytes": 10}
        return Converted(**names, weight_errors={"q": 0.1}, tried={4: 0.2, 8: 0.02}, measured_on="256 random tokens")

    for verb in (adapt, adapt_plan, convert):
        monkeypatch.setitem(vars(eckart), verb.__name__, verb)
    return calls


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    for name in ("train.jsonl", "test.jsonl", "moments.safetensors"):
        (tmp_path / name).write_text("{}")
    return tmp_path


def test_what_was_typed_is_passed_on_and_nothing_else(run, asked, place):
    ran = run("adapt", "m", "--method", "eva", "--data", "train.jsonl", "--budget", "0.5%", "-o", "adapter")
    assert ran.code == 0, ran.err
    (call,) = asked
    assert call.pop("save") == {
        "overwrite": False,
        "command": "eckart adapt m --method eva --data train.jsonl --budget 0.5% -o adapter",
    }
    assert call == {
        "given": ("m", "train.jsonl"),
        "method": "eva",
        "budget": Budget(model_keep=0.005),
        "work": place / ".adapter.training",
    }
    for words in ("10 of 100 rows", "-0.2500", "went on from step 4", "were cut to 256 tokens", "saved to adapter"):
        assert words in ran.out


def test_every_option_reaches_the_verb(run, asked, place):
    ran = run(
        *("adapt", "m", "--data", "train.jsonl", "--held-out", "test.jsonl", "--moments", "moments.safetensors"),
        *("--method", "sorsa", "--option", "strength=1e-3", "--rank", "4", "--target", "q", "--target", "v"),
        *("--text-field", "body", "--prompt-field", "q", "--completion-field", "a", "--label-field", "y"),
        *("--epochs", "2", "--lr", "1e-3", "--batch", "4", "--save-every", "7", "--length", "64"),
        *("--seed", "3", "--dtype", "float32", "--device", "cpu", "-o", "adapter"),
    )
    assert ran.code == 0, ran.err
    (call,) = asked
    del call["save"]
    assert call == {
        "given": ("m", "train.jsonl"),
        "held_out": "test.jsonl",
        "moments": "moments.safetensors",
        "method": "sorsa",
        "options": {"strength": 1e-3},
        "rank": 4,
        "targets": ("q", "v"),
        "fields": Fields(text="body", prompt="q", completion="a", label="y"),
        "epochs": 2.0,
        "rate": 1e-3,
        "batch_size": 4,
        "save_every": 7,
        "length": 64,
        "seed": 3,
        "dtype": "float32",
        "device": "cpu",
        "work": place / ".adapter.training",
    }


def test_a_recipe_and_its_changes(run, asked, place):
    (place / "r.yaml").write_text(
        "model: m\ndata: {source: train.jsonl}\nadapter: {name: eva, budget: 300k, spread: weight}\n"
        "train: {steps: 5}\noutput: {folder: adapter}\n"
    )
    ran = run("adapt", "--recipe", "r.yaml", "--set", "train.rate=1e-2", "--set", "adapter.budget=1%")
    assert ran.code == 0, ran.err
    assert asked[0]["budget"] == Budget(model_keep=0.01)
    assert (asked[0]["steps"], asked[0]["rate"], asked[0]["spread"]) == (5, 1e-2, "weight")


def test_json_is_the_result(run, asked, place):
    ran = run("adapt", "m", "--data", "train.jsonl", "-o", "adapter", "--json")
    content = json.loads(ran.out)
    assert content["adaptation"]["change"]["mean"] == -0.25
    assert content["adaptation"]["plan"]["layers"][0]["rank"] == 3


def test_a_dry_run_writes_nothing(run, asked, place):
    ran = run("adapt", "m", "--data", "train.jsonl", "--budget", "300k", "--dry-run")
    assert ran.code == 0, ran.err
    assert asked == [{"given": ("m", "train.jsonl"), "budget": Budget(parameters=300_000)}]
    for words in ("layers.0.q", "classifier", "drawn with seed 0"):
        assert words in ran.out
    assert not (place / "adapter").exists()


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["m"], ["--data is missing", "-o is missing"]),
        (["m", "--data", "no.jsonl", "-o", "a"], ["--data: no.jsonl does not exist"]),
        (["m", "--data", "train.jsonl", "-o", "a", "--budget", "0.5"], ["such as 0.5%", "got '0.5'"]),
        (["m", "--data", "train.jsonl", "-o", "a", "--budget", "200%"], ["at most 100%"]),
        (["m", "--data", "train.jsonl", "-o", "a", "--lr", "0", "--batch", "x"], ["--lr", "--batch"]),
        (
            [
                *("m", "--data", "train.jsonl", "-o", "a", "--rank", "2", "--budget", "1%"),
                "--steps",
                "1",
                "--epochs",
                "1",
            ],
            ["--rank and --budget exclude", "--steps and --epochs exclude"],
        ),
        (["m", "--data", "train.jsonl", "-o", "m"], ["is what the result is made from"]),
        (["m", "--data", "train.jsonl", "-o", "a", "--spread", "weight"], ["give --budget"]),
    ],
)
def test_wrong_use(run, asked, place, typed, words):
    ran = run("adapt", *typed)
    assert ran.code == 2
    assert not asked
    for each in words:
        assert each in ran.err, ran.err


def test_ctrl_c_says_how_to_go_on(run, place, monkeypatch):
    def stopped(*given, work, **keywords):
        (work / "checkpoint-6").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setitem(vars(eckart), "adapt", stopped)
    ran = run("adapt", "m", "--data", "train.jsonl", "-o", "adapter")
    assert ran.code == 130
    assert "adapter was not written. The same command goes on from the last checkpoint" in ran.err


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("0.5%", {"model_keep": 0.005}),
        ("100 %", {"model_keep": 1.0}),
        ("300k", {"parameters": 300_000}),
        (55296, {"parameters": 55_296}),
    ],
)
def test_budgets(given, found):
    assert parse_budget(given) == found


@pytest.mark.parametrize("given", ["0%", "101%", "x%", "0.5", "-3", "many"])
def test_what_is_no_budget(given):
    with pytest.raises(ValueError, match=r"such as 0\.5%"):
        parse_budget(given)


def test_convert_passes_on_what_was_typed(run, asked, place):
    (place / "a").mkdir()
    ran = run("convert", "a", "--to", "lora", "-o", "l", "--max-error", "0.1", "--rank", "8", "--base", "m")
    assert ran.code == 0, ran.err
    (call,) = asked
    assert call["given"][:2] == ("a", "lora")
    assert {n: call[n] for n in call if n != "given"} == {"max_error": 0.1, "rank": 8, "base": "m", "overwrite": False}
    for words in ("exact: no", "0.0200", "256 random tokens", "saved to l"):
        assert words in ran.out


def test_convert_refuses_all_at_once(run, asked, place):
    ran = run("convert", "nowhere", "--to", "onxx", "-o", "l", "--max-error", "0", "--rank", "0")
    assert ran.code == 2
    assert not asked
    for words in ("unknown form of an adapter 'onxx'", "no folder nowhere", "--max-error", "--rank"):
        assert words in ran.err


def test_bad_data_is_named_before_the_model(run, place):
    (place / "train.jsonl").write_text('{"text": "a"}\n\n{"txt": "b"}\n')
    ran = run("adapt", "m", "--data", "train.jsonl", "-o", "adapter")
    assert ran.code == 2
    assert "line 2: empty" in ran.err
    assert "line 3: no field 'text'; it has txt" in ran.err
