"""``eckart plan``."""

from __future__ import annotations

from pathlib import Path

import eckart
from eckart.cli import checks, render
from eckart.cli.flags import keywords, takes
from eckart.cli.recipe import PlanRecipe
from eckart.cli.terminal import Terminal


@takes(PlanRecipe, dry_run=True)
def plan(recipe: PlanRecipe, terminal: Terminal, dry_run: bool) -> None:
    """Decide rank and form of every map of MODEL under a budget, and write them as JSON to edit.

    JSON: plan (the content of the file), file.
    """
    checks.refuse(
        checks.required(recipe.model, "MODEL", "model")
        + checks.file_problems("--moments", recipe.moments)
        + checks.budget_problems(recipe.budget)
        + checks.kinds_problems(recipe)
        + ([] if dry_run else checks.output_problems(recipe.output.file, recipe.output.overwrite, folder=False))
    )
    checks.refuse(checks.moments_problems(recipe))
    asked = {**keywords(recipe), **checks.forms_of(recipe), "budget": checks.budget_of(recipe.budget)}
    if dry_run:
        with terminal.working() as progress:
            preview = eckart.preview(str(recipe.model), **asked, progress=progress)
        terminal.result(preview.to_json(), lambda console: render.preview(console, preview.to_json()))
        return
    path = Path(str(recipe.output.file))
    moments = asked.pop("moments", None)
    with terminal.working(path) as progress:
        made = eckart.plan(str(recipe.model), moments, **asked, progress=progress)
        if terminal.leading:
            made.save(path)
    payload = {"plan": made.to_json(), "file": path}
    terminal.result(payload, lambda console: render.plan(console, made.steps, path))
