"""``eckart inspect``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import eckart
from eckart.cli import checks, render
from eckart.cli.flags import keywords, takes
from eckart.cli.recipe import InspectRecipe
from eckart.cli.terminal import Terminal


@takes(InspectRecipe, dry_run=False)
def inspect(recipe: InspectRecipe, terminal: Terminal, dry_run: bool) -> None:
    """Show what MODEL holds: norms, ranks, noise and tails of every weight, what looks broken, and what to do next.

    MODEL may be a folder or a .safetensors file of any kind; no model class is needed without --data. With -o FILE the
    result is also written as one HTML page that needs no network.

    JSON: inspection (title, source, tier, matrices, observations, panels, meta), page (where one was written).
    """
    output = recipe.output
    checks.refuse(
        checks.required(recipe.model, "MODEL", "model")
        + checks.data_problems(recipe.data)
        + checks.inspect_problems(recipe)
        + (
            checks.output_problems(output.file, output.overwrite, folder=False, sources=[recipe.model])
            if output.file
            else []
        )
    )
    page = Path(output.file) if output.file else None
    with terminal.working(page) as progress:
        found = eckart.inspect(
            str(recipe.model), **keywords(recipe), command=shlex.join(["eckart", *sys.argv[1:]]), progress=progress
        )
        if page is not None and terminal.leading:
            found.save(page)
    payload = {"inspection": found.to_json(), "page": page}
    terminal.result(payload, lambda console: render.inspection(console, found, page))
