"""``eckart adapt``."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

import eckart
from eckart.cli import checks, render
from eckart.cli.flags import keywords, takes
from eckart.cli.recipe import AdaptRecipe
from eckart.cli.terminal import Interrupted, Terminal
from eckart.data.examples import Fields
from eckart.records import Budget, as_plain


@takes(AdaptRecipe, dry_run=True)
def adapt(recipe: AdaptRecipe, terminal: Terminal, dry_run: bool) -> None:
    """Fine-tune MODEL with few parameters, and measure it on rows that were held out.

    Writes an adapter for PEFT, a plain-LoRA copy of it, and a model card. Checkpoints lie in a hidden folder beside the
    output: after a kill or Ctrl-C the same command goes on from the last one.

    JSON: folder, adaptation (plan: layers, ranks, parameters; before, after, change on the held-out part; history).
    """
    output = recipe.output
    found = checks.required(recipe.model, "MODEL", "model") + checks.required(
        recipe.data.source, "--data", "data.source"
    )
    found += checks.file_problems("--data", recipe.data.source) + checks.file_problems(
        "--held-out", recipe.data.held_out
    )
    found += checks.file_problems("--moments", recipe.moments) + _exclusions(recipe)
    if not dry_run or output.folder:
        found += checks.output_problems(
            output.folder, output.overwrite or dry_run, folder=True, sources=[recipe.model, recipe.data.source]
        )
    checks.refuse(found)
    asked = keywords(recipe)
    if recipe.adapter.budget is not None:
        given: dict[str, Any] = {str(name): value for name, value in recipe.adapter.budget.items()}
        asked["budget"] = Budget(**given)
    names = {name: value for name in ("text", "prompt", "completion", "label") if (value := getattr(recipe.data, name))}
    if names:
        asked["fields"] = Fields(**names)
    if recipe.adapter.targets == ["all-linear"]:
        asked["targets"] = "all-linear"
    if dry_run:
        with terminal.working() as progress:
            plan = eckart.adapt_plan(str(recipe.model), str(recipe.data.source), **asked, progress=progress)
        content = {**as_plain(plan), "share": plan.share}
        terminal.result({"plan": content}, lambda console: _draw_plan(console, content))
        return
    folder = Path(str(output.folder))
    work = folder.absolute().with_name(f".{folder.name}.training")
    try:
        with terminal.working(folder) as progress:
            result = eckart.adapt(str(recipe.model), str(recipe.data.source), **asked, work=work, progress=progress)
            if terminal.leading:
                command = shlex.join(["eckart", *sys.argv[1:]])
                result.save(folder, overwrite=bool(output.overwrite), command=command)
    except Interrupted as error:
        if any(work.glob("checkpoint-*")):
            raise Interrupted(f"{error} The same command goes on from the last checkpoint, in {work}.") from error
        shutil.rmtree(work, ignore_errors=True)
        raise
    content = as_plain(result.to_json())
    terminal.result({"folder": folder, "adaptation": content}, lambda console: _draw(console, content, folder))


def _exclusions(recipe: AdaptRecipe) -> list[str]:
    """What decides the same thing twice, or nothing."""
    found = []
    if recipe.adapter.rank is not None and recipe.adapter.budget is not None:
        found.append("--rank and --budget exclude each other: a budget gives every layer its rank.")
    if recipe.adapter.spread is not None and recipe.adapter.budget is None:
        found.append("--spread says how a budget is spread; give --budget.")
    if recipe.train.steps is not None and recipe.train.epochs is not None:
        found.append("--steps and --epochs exclude each other.")
    if recipe.data.held_out is not None and recipe.data.held_out_share is not None:
        found.append("--held-out and --held-out-share exclude each other.")
    return found


def _draw_plan(console: Console, content: dict[str, Any]) -> None:
    """Ranks and numbers of every layer, then the rest."""
    render.tree(console, {"layers": content["layers"]})
    names = (
        "method",
        "parameters",
        "share",
        "whole",
        "kind",
        "rows",
        "held_out",
        "steps",
        "batch_size",
        "rate",
        "notes",
    )
    render.tree(console, {name: content[name] for name in names if content[name] not in ([], {})})


def _draw(console: Console, content: dict[str, Any], folder: Path) -> None:
    """The plan in short, what was measured, and where it lies."""
    plan = content["plan"]
    render.tree(console, {name: plan[name] for name in ("method", "parameters", "share", "rows", "steps", "rate")})
    unit = content["after"]["unit"]
    console.print(f"\nmeasured on {plan['held_out']}:", markup=False, soft_wrap=True)
    for name in ("before", "after", "change", "accuracy_before", "accuracy_after"):
        value = content[name]
        words = f"{name.replace('_', ' '):16}{value['mean']:9.4f}   95 % {value['low']:.4f} to {value['high']:.4f}"
        console.print(words + (f"   {unit}" if name in ("before", "after", "change") else ""), markup=False)
    for note in plan["notes"]:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    if content["resumed_from"]:
        console.print(f"note: went on from step {content['resumed_from']}", markup=False)
    render.saved(console, folder)
