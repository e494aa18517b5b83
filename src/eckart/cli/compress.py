"""``eckart compress``."""

from __future__ import annotations

import contextlib
import shlex
import sys
from pathlib import Path
from typing import Any

import eckart
from eckart.checkpoint.atomic import work_folder
from eckart.checkpoint.claims import claim_output, written
from eckart.cli import checks, render
from eckart.cli.flags import keywords, takes
from eckart.cli.recipe import CompressRecipe
from eckart.cli.stream import stream
from eckart.cli.terminal import Terminal


@takes(CompressRecipe, dry_run=True)
def compress(recipe: CompressRecipe, terminal: Terminal, dry_run: bool) -> None:
    """Make MODEL smaller and save it to a folder that AutoModel.from_pretrained loads.

    Calibrates on DATA unless a moments file is given, plans unless a plan is given. Under torchrun, or with --queue,
    several processes share the work and one of them writes.

    JSON: folder, outcome (sizes before and after, every layer), plan.
    """
    output = recipe.output
    finished = recipe.queue is not None and written(recipe.queue) is not None
    taken_up = bool(recipe.stream and output.folder and work_folder(output.folder).exists())
    checks.refuse(
        checks.required(recipe.model, "MODEL", "model")
        + checks.plan_problems(recipe)
        + checks.source_problems(recipe)
        + checks.kinds_problems(recipe)
        + checks.queue_problems(recipe)
        + checks.stream_problems(recipe, dry_run)
        + (
            []
            if dry_run
            else checks.required(output.folder, "-o", "output.folder")
            if finished or taken_up  # there may be the folder that another worker wrote, or this one just before
            else checks.output_problems(output.folder, output.overwrite, folder=True, sources=[recipe.model])
        )
    )
    checks.refuse(checks.moments_problems(recipe))
    asked = keywords(recipe) | checks.forms_of(recipe)
    budget = checks.budget_of(recipe.budget)
    if budget is not None:
        asked["budget"] = budget
    if recipe.stream:
        stream(recipe, terminal, asked)
        return
    if dry_run:
        asked.pop("certify", None)
        asked.pop("queue", None)
        asked.pop("refit_blend", None)
        with terminal.working() as progress:
            preview = eckart.preview(str(recipe.model), **asked, progress=progress)
        terminal.result(preview.to_json(), lambda console: render.preview(console, preview.to_json()))
        return
    folder = Path(str(output.folder))
    alone = terminal.leading and recipe.queue is None  # of many processes one claims; a queue has a claim of its own
    with terminal.working(folder) as progress, claim_output(folder) if alone else contextlib.nullcontext():
        compressed = eckart.compress(str(recipe.model), **asked, progress=progress)
        how: dict[str, Any] = {"overwrite": bool(output.overwrite)}
        if output.max_shard_size is not None:
            how["max_shard_size"] = output.max_shard_size
        eckart.save(compressed, folder, command=shlex.join(["eckart", *sys.argv[1:]]), **how)
    shared = compressed.queue if recipe.queue is not None else None
    if shared is not None and shared.written is not None and not shared.wrote:
        folder = Path(shared.written["folder"])
        terminal.note(f"{folder} was written by {shared.written['worker']}, which shares the queue {recipe.queue}.")
    payload = {"folder": folder, "outcome": compressed.outcome, "plan": compressed.plan.to_json()}
    terminal.result(payload, lambda console: render.compressed(console, compressed.outcome, folder))
