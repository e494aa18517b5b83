"""``eckart evaluate``."""

from __future__ import annotations

import eckart
from eckart.cli import checks, render
from eckart.cli.flags import keywords, takes
from eckart.cli.recipe import EvaluateRecipe
from eckart.cli.terminal import Terminal


@takes(EvaluateRecipe, dry_run=False)
def evaluate(recipe: EvaluateRecipe, terminal: Terminal, dry_run: bool) -> None:
    """Measure MODEL against BASE on DATA: quality with intervals, sizes, speed.

    JSON: evaluation (task, metrics, protocol, model_size, base_size, disk_bytes, latency, warnings).
    """
    checks.refuse(
        checks.required(recipe.model, "MODEL", "model")
        + checks.required(recipe.against, "--against", "against")
        + checks.required(recipe.data.source, "--data", "data.source")
        + checks.data_problems(recipe.data)
    )
    asked = keywords(recipe)
    data = asked.pop("data")
    with terminal.working() as progress:
        found = eckart.evaluate(str(recipe.model), str(recipe.against), data, **asked, progress=progress)
    terminal.result({"evaluation": found}, lambda console: render.evaluation(console, found))
