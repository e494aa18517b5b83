"""Recipe files, ``--set`` and flags become one recipe; the later source wins."""

from __future__ import annotations

import inspect
import json

import pytest
from pydantic import BaseModel

import eckart
from eckart.cli.flags import keywords, leaves
from eckart.cli.recipe import RECIPES
from eckart.records import Budget
from eckart.verbs.plan import DEFAULT_METHOD

RECIPE = """
model: org/name
data: {source: "stdlib:docstrings", samples: 64, length: 32}
budget: {keep: 0.6}
method: {name: kfac, options: {rho: 0.5, mode: fast}}
sites: {include: ["*.q"], embeddings: true}
output: {folder: small, overwrite: false}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return ("compress", "--recipe", "recipe.yaml")


def test_a_recipe_alone_is_enough(run, verbs, recipe):
    ran = run(*recipe)
    assert ran.code == 0, ran.err
    assert verbs.calls[0][1] == ("org/name",)
    assert verbs.asked("compress") == {
        "data": "stdlib:docstrings",
        "samples": 64,
        "length": 32,
        "budget": Budget(keep=0.6),
        "method": "kfac",
        "options": {"rho": 0.5, "mode": "fast"},
        "include": ("*.q",),
        "embeddings": True,
    }


def test_settings_win_over_the_recipe_and_flags_over_both(run, verbs, recipe):
    ran = run(
        *recipe, "other", "--set", "data.samples=16", "--set", "data.length=8", "--length", "4",
        *("--set", "method.options.rho=0.25", "--option", "mode=slow"),
        *("--include", "*.k", "--no-embeddings", "--set", "data.source=stdlib:source", "-o", "there"),
    )  # fmt: skip
    assert ran.code == 0, ran.err
    asked = verbs.asked("compress")
    assert verbs.calls[0][1] == ("other",)
    assert (asked["samples"], asked["length"], asked["data"]) == (16, 4, "stdlib:source")
    assert asked["options"] == {"rho": 0.25, "mode": "slow"}
    assert asked["include"] == ("*.k",)
    assert asked["embeddings"] is False
    assert "saved to there" in ran.out


def test_null_takes_a_value_of_the_recipe_back(run, verbs, recipe):
    ran = run(*recipe, "--set", "budget.keep=null", "--max-parameters", "15M")
    assert ran.code == 0, ran.err
    assert verbs.asked("compress")["budget"] == Budget(parameters=15_000_000)


def test_another_budget_does_not_silently_replace_the_one_of_the_recipe(run, verbs, recipe):
    ran = run(*recipe, "--max-parameters", "15M")
    assert ran.code == 2
    assert "one budget is needed" in ran.err


def test_sizes_in_a_recipe(run, verbs, tmp_path):
    (tmp_path / "r.yaml").write_text("budget: {max_bytes: 40MB}\ndata: {source: 'stdlib:source'}\n")
    ran = run("compress", "m", "--recipe", tmp_path / "r.yaml", "-o", tmp_path / "small")
    assert ran.code == 0, ran.err
    assert verbs.asked("compress")["budget"] == Budget(bytes=40_000_000)


def test_an_empty_recipe_is_one(run, verbs, tmp_path):
    (tmp_path / "r.yaml").write_text("# nothing yet\n")
    ran = run(
        "compress",
        "m",
        "--recipe",
        tmp_path / "r.yaml",
        "--dry-run",
        "--keep",
        ".6",
        "--data",
        "stdlib:source",
    )
    assert ran.code == 0, ran.err


@pytest.mark.parametrize("verb", RECIPES)
def test_the_schema_names_every_field(run, verb):
    schema = json.loads(run("schema", verb).out)
    assert schema["additionalProperties"] is False
    for leaf in leaves(RECIPES[verb]):
        node = schema
        for name in leaf.path:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]] if "$ref" in node else node
            node = node["properties"][name]
        assert node["description"] == leaf.help


@pytest.mark.parametrize("verb", RECIPES)
def test_an_empty_recipe_asks_for_nothing(verb):
    recipe: type[BaseModel] = RECIPES[verb]
    assert keywords(recipe()) == {}


@pytest.mark.parametrize("verb", RECIPES)
def test_flags_are_keywords_of_the_verb_with_the_defaults_that_help_shows(verb):
    function = getattr(eckart, {"prune": "prune_model"}.get(verb, verb))  # eckart.prune is the room
    parameters = inspect.signature(function).parameters
    for leaf in leaves(RECIPES[verb]):
        if not leaf.flag.keyword:
            continue
        assert leaf.flag.keyword in parameters, leaf.flag.name
        default = parameters[leaf.flag.keyword].default
        if leaf.flag.keyword == "method" and verb != "adapt":
            default = DEFAULT_METHOD
        if default in (None, (), inspect.Parameter.empty):
            shown = None
        elif isinstance(default, bool):
            shown = "yes" if default else "no"
        else:
            shown = ", ".join(default) if isinstance(default, tuple) else str(default)
        said = leaf.flag.default == (shown or "") or any(
            words in leaf.help for words in (f"{shown} to", f"By default {shown};")
        )
        assert said, leaf.flag.name
