"""``eckart compress``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import eckart
from eckart.cli import checks, render
from eckart.cli.flags import keywords, takes
from eckart.cli.recipe import CompressRecipe
from eckart.cli.terminal import Terminal


@takes(CompressRecipe, dry_run=True)
def compress(recipe: CompressRecipe, terminal: Terminal, dry_run: bool) -> None:
    """Make MODEL smaller and save it to a folder that AutoModel.from_pretrained loads.

    Calibrates on DATA unless a moments file is given, plans unless a plan is given.

    JSON: folder, outcome (sizes before and after, every layer), plan.
    """
    output = recipe.output
    checks.refuse(
        checks.required(recipe.model, "MODEL", "model")
        + checks.plan_problems(recipe)
        + checks.source_problems(recipe)
        + (
            []
            if dry_run
            else checks.output_problems(output.folder, output.overwrite, folder=True, sources=[recipe.model])
        )
    )
    checks.refuse(checks.moments_problems(recipe))
    asked = keywords(recipe)
    budget = checks.budget_of(recipe.budget)
    if budget is not None:
        asked["budget"] = budget
    if dry_run:
        asked.pop("certify", None)
        with terminal.working() as progress:
            preview = eckart.preview(str(recipe.model), **asked, progress=progress)
        terminal.result(preview.to_json(), lambda console: render.preview(console, preview.to_json()))
        return
    folder = Path(str(output.folder))
    with terminal.working(folder) as progress:
        compressed = eckart.compress(str(recipe.model), **asked, progress=progress)
        if terminal.leading:
            how: dict[str, Any] = {"overwrite": bool(output.overwrite)}
            if output.max_shard_size is not None:
                how["max_shard_size"] = output.max_shard_size
            eckart.save(compressed, folder, command=shlex.join(["eckart", *sys.argv[1:]]), **how)
    payload = {"folder": folder, "outcome": compressed.outcome, "plan": compressed.plan.to_json()}
    terminal.result(payload, lambda console: render.compressed(console, compressed.outcome, folder))
