"""Plans survive the way to disk, and say everything that is wrong with them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from curves_of_random_models import REST, random_curves, whole
from hypothesis import given
from hypothesis import strategies as st

from eckart.compression import get_method
from eckart.errors import FileError, InputError, MismatchError
from eckart.planning import Plan, Step, check, make_plan
from eckart.records import Budget, Site

SITES = tuple(curve.site for curve in random_curves(0))


def made(**changes: Any) -> Plan:
    plan = make_plan(
        random_curves(0),
        Budget(keep=0.6),
        REST,
        method="kfac",
        options=get_method("kfac").options(),
        fingerprint="f00d" * 16,
        base="a/model",
    )
    return replace(plan, **changes)


def edited(row: dict[str, Any], **changes: Any) -> Plan:
    data = made().to_json()
    data["steps"][1] = row
    return Plan.from_json({**data, **changes})


def test_plan_says_what_was_planned() -> None:
    plan = made()
    assert [step.site for step in plan.steps] == [site.name for site in SITES]
    assert plan.totals is not None
    assert plan.totals.sites_before == whole(random_curves(0))
    assert plan.totals.sites_after.parameters <= 0.6 * plan.totals.sites_before.parameters
    assert plan.totals.model_after == plan.totals.sites_after + REST
    assert plan.steps[0].options == plan.options != {}


@given(st.sampled_from(["keep", "loss", "bytes", None]), st.booleans(), st.booleans())
def test_json_both_ways(unit: str | None, own_method: bool, totals: bool) -> None:
    plan = made()
    if own_method:
        step = Step(site="x.y", form="lowrank", rank=3, method="svd", options={})
        bare = Step(site="x.z", form="lowrank", rank=3, method="kfac", options={})
        plan = replace(plan, steps=(*plan.steps, step, bare))
    value = 10 if unit == "bytes" else 0.25
    plan = replace(plan, budget=None if unit is None else Budget(**{unit: value}))
    plan = plan if totals else replace(plan, totals=None)
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(json.loads(plan.dumps())) == plan


def test_file_both_ways_over_an_old_one(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    made().save(path)
    assert Plan.load(path) == made()
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    lines = path.read_text().splitlines()
    assert sum('"site"' in line and '"rank"' in line for line in lines) == len(SITES)


def test_a_person_changes_a_rank_and_leaves_the_rest_out(tmp_path: Path) -> None:
    data = {
        "format_version": 1,
        "method": "whitened",
        "steps": [
            {"site": SITES[0].name, "form": "lowrank", "rank": 1},
            {"site": SITES[1].name, "form": "dense"},
            {"site": SITES[2].name, "form": "lowrank", "rank": 2, "method": "svd"},
        ],
    }
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    plan = Plan.load(path)
    assert [step.rank for step in plan.steps] == [1, 0, 2]
    assert [step.method for step in plan.steps] == ["whitened", "whitened", "svd"]
    assert plan.budget is None
    check(plan, SITES)
    plan.check_model("any")


def test_every_problem_of_a_file_is_told_at_once() -> None:
    data = made().to_json()
    data["stepz"] = []
    data["format_version"] = 7
    data["allocation"] = "globl"
    data["budget"] = {"keep": 3, "bites": 4}
    data["totals"]["objective"] = "low"
    data["steps"][0]["rnak"] = 3
    data["steps"][1]["rank"] = 2.5
    data["steps"][2]["form"] = "pivot"
    data["steps"][3] = {"form": "lowrank"}
    data["steps"][4] = 5
    data["steps"].append(data["steps"][5])
    with pytest.raises(InputError) as caught:
        Plan.from_json(data)
    text = str(caught.value)
    for words in (
        "unknown key 'stepz'. Did you mean 'steps'",
        "format_version 7",
        "unknown allocation 'globl'. Did you mean 'global'",
        "unknown key 'bites'. Did you mean 'bytes'",
        "is a share in (0, 1]",
        "'objective' expects a number; got 'low'",
        "unknown key 'rnak'. Did you mean 'rank'",
        "'rank' expects a whole number; got 2.5",
        "unknown form 'pivot'. Did you mean 'pivoted'",
        "'site' is missing",
        "'rank' is missing",
        "step 5: expected an object with keys; got int",
        "has 2 steps",
    ):
        assert words in text, (words, text)


@pytest.mark.parametrize("data", [None, [], "plan", 3, {}])
def test_what_is_no_plan_at_all(data: Any) -> None:
    with pytest.raises(InputError, match="not a plan"):
        Plan.from_json(data)


def test_true_is_no_rank() -> None:
    with pytest.raises(InputError, match="expects a whole number; got True"):
        edited({"site": SITES[1].name, "form": "lowrank", "rank": True})


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(FileError, match="cannot be read"):
        Plan.load(path)
    path.write_text(made().dumps()[:-20])
    with pytest.raises(FileError, match="not whole JSON: line"):
        Plan.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileError, match="cannot be read"):
        Plan.load(path)
    path.write_text('{"method": 1}')
    with pytest.raises(InputError, match=r"plan\.json: this is not a plan"):
        Plan.load(path)


def test_a_folder_that_does_not_exist_is_refused_and_a_failed_write_leaves_the_old(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot be written"):
        made().save(tmp_path / "no" / "plan.json")
    folder = tmp_path / "plan.json"
    folder.mkdir()
    with pytest.raises(FileError, match="cannot be written"):
        made().save(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_of_another_model_is_refused() -> None:
    plan = made()
    plan.check_model("f00d" * 16)
    with pytest.raises(MismatchError, match="made for a/model"):
        plan.check_model("beef" * 16)


def test_check_passes_what_was_made_and_sites_without_a_step() -> None:
    plan = made()
    check(plan, SITES)
    check(replace(plan, steps=plan.steps[:2]), SITES)


def test_check_tells_every_misfit_at_once() -> None:
    grouped = Site(name="conv", kind="conv", out_features=4, in_features=9, slices=2)
    full = SITES[1].full_rank
    steps = (
        Step(site="block.0.mpa0", form="lowrank", rank=1, method="svd"),
        Step(site=SITES[1].name, form="lowrank", rank=full + 1, method="svd"),
        Step(site=SITES[1].name, form="dense", method="svd"),
        Step(site=SITES[2].name, form="lowrank", rank=0, method="svd"),
        Step(site=SITES[3].name, form="lowrank", rank=1, method="kfak"),
        Step(site=SITES[4].name, form="lowrank", rank=1, method="svd", options={"what": 1}),
        Step(site="conv", form="pivoted", rank=1, method="svd"),
    )
    with pytest.raises(InputError) as caught:
        check(made(steps=steps), (*SITES, grouped))
    text = str(caught.value)
    for words in (
        "7 problems",
        "unknown site 'block.0.mpa0'. Did you mean 'block.0.map0'",
        f"rank {full + 1} is not from 1 to the full rank {full}",
        "more than one step",
        "rank 0 is not from 1",
        "unknown method 'kfak'. Did you mean 'kfac'",
        "unknown option 'what'",
        "the form pivoted does not fit a conv site of 2 slices",
    ):
        assert words in text, (words, text)
