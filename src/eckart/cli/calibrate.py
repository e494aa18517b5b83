"""``eckart calibrate``."""

from __future__ import annotations

import time
from pathlib import Path

import eckart
from eckart.cli import checks, render
from eckart.cli.flags import keywords, takes
from eckart.cli.recipe import CalibrateRecipe
from eckart.cli.terminal import Terminal


@takes(CalibrateRecipe, dry_run=True)
def calibrate(recipe: CalibrateRecipe, terminal: Terminal, dry_run: bool) -> None:
    """Run MODEL on DATA once and keep the statistics that methods need.

    The file serves every later plan of the same model. Under torchrun the processes share the data.

    JSON: moments (the file), fingerprint, sites, meta, seconds.
    """
    checks.refuse(
        checks.required(recipe.model, "MODEL", "model")
        + checks.required(recipe.data.source, "--data", "data.source")
        + checks.data_problems(recipe.data)
        + ([] if dry_run else checks.output_problems(recipe.output.file, recipe.output.overwrite, folder=False))
    )
    asked = keywords(recipe)
    if dry_run:
        with terminal.working() as progress:
            preview = eckart.preview(str(recipe.model), **asked, progress=progress)
        terminal.result(preview.to_json(), lambda console: render.preview(console, preview.to_json()))
        return
    start = time.perf_counter()
    data = asked.pop("data")
    path = Path(str(recipe.output.file))
    with terminal.working(path) as progress:
        moments = eckart.calibrate(str(recipe.model), data, **asked, progress=progress)
        if terminal.leading:
            moments.save(path)
    payload = {
        "moments": path,
        "fingerprint": moments.fingerprint,
        "sites": moments.names(),
        "meta": moments.meta,
        "seconds": time.perf_counter() - start,
    }
    terminal.result(payload, lambda console: render.moments(console, payload))
