"""``eckart compensate``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

import eckart
from eckart.cli import checks, render
from eckart.cli.flags import keywords, takes
from eckart.cli.recipe import CompensateRecipe
from eckart.cli.terminal import Terminal


@takes(CompensateRecipe, dry_run=False)
def compensate(recipe: CompensateRecipe, terminal: Terminal, dry_run: bool) -> None:
    """Give MODEL back what it lost against BASE, as a LoRA that PEFT loads beside it.

    MODEL may be quantised, pruned or compressed; it is not changed.

    JSON: folder, compensation (rank, parameters, stored, method, losses, every map with its error before and after).
    """
    output = recipe.output
    checks.refuse(
        checks.required(recipe.model, "MODEL", "model")
        + checks.required(recipe.against, "--against", "against")
        + _one_place(recipe.model, recipe.against)
        + _source_problems(recipe)
        + checks.output_problems(output.folder, output.overwrite, folder=True, sources=[recipe.model, recipe.against])
    )
    folder = Path(str(output.folder))
    with terminal.working(folder) as progress:
        found = eckart.compensate(str(recipe.model), str(recipe.against), **keywords(recipe), progress=progress)
        if terminal.leading:
            command = shlex.join(["eckart", *sys.argv[1:]])
            found.save(folder, overwrite=bool(output.overwrite), command=command)
    content = found.to_json()
    payload = {"folder": folder, "compensation": content}
    terminal.result(payload, lambda console: _draw(console, content, folder))


def _one_place(model: str | None, against: str | None) -> list[str]:
    """A model is not damaged against itself."""
    if not model or not against:
        return []
    same = Path(model).exists() and Path(against).exists() and Path(model).samefile(against)
    if model == against or same:
        return [f"MODEL and --against are both {model}; there is nothing to repair."]
    return []


def _source_problems(recipe: CompensateRecipe) -> list[str]:
    """Statistics come from data or from a moments file; whether any are needed, the verb knows."""
    found = checks.data_problems(recipe.data) + checks.file_problems("--moments", recipe.moments)
    if recipe.moments is not None and recipe.data.source is not None:
        found.append("--data and --moments exclude each other: moments are what calibrating on data gave.")
    elif recipe.moments is None and recipe.data.source is None and recipe.repair.name != "svd":
        found.append("--data or --moments is missing; only --method svd goes without.")
    return found


def _draw(console: Console, content: dict[str, Any], folder: Path) -> None:
    """The maps, what the repair costs, and where it lies."""
    shown = ("name", "rank", "before", "after", "captured")
    render.tree(console, {"maps": [{name: layer[name] for name in shown} for layer in content["layers"]]})
    names = ("method", "rank", "parameters", "stored", "repaired", "loss_before", "loss_after", "seconds", "notes")
    render.tree(console, {name: content[name] for name in names if content[name] not in (None, [])})
    render.saved(console, folder)
