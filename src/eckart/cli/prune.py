"""``eckart prune``."""

from __future__ import annotations

import contextlib
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

import eckart
from eckart.checkpoint.claims import claim_output
from eckart.cli import checks, render
from eckart.cli.flags import keywords, takes
from eckart.cli.recipe import PruneRecipe, PruneSection, pattern_share
from eckart.cli.terminal import Terminal

WIDTHS = ("neurons", "heads")


@takes(PruneRecipe, dry_run=False)
def prune(recipe: PruneRecipe, terminal: Terminal, dry_run: bool) -> None:
    """Take weights, neurons or heads out of MODEL, fit what stays, and save it to a folder.

    Zeros are for size on disk: the folder holds plain dense weights, and their masks beside. Neurons and heads leave
    whole, so that the model is smaller and faster.

    JSON: folder, pruned (what: zeros, zeros and rank, or width; sizes; every map).
    """
    output = recipe.output
    checks.refuse(
        checks.required(recipe.model, "MODEL", "model")
        + _prune_problems(recipe.prune)
        + _source_problems(recipe)
        + checks.output_problems(output.folder, output.overwrite, folder=True, sources=[recipe.model])
    )
    folder = Path(str(output.folder))
    how: dict[str, Any] = {"overwrite": bool(output.overwrite)}
    if output.max_shard_size is not None:
        how["max_shard_size"] = output.max_shard_size
    with terminal.working(folder) as progress, claim_output(folder) if terminal.leading else contextlib.nullcontext():
        pruned = eckart.prune_model(str(recipe.model), **keywords(recipe), progress=progress)
        pruned.save(folder, command=shlex.join(["eckart", *sys.argv[1:]]), **how)
    content = pruned.to_json()
    terminal.result({"folder": folder, "pruned": content}, lambda console: _draw(console, pruned, content, folder))


def _prune_problems(asked: PruneSection) -> list[str]:
    """What pattern and share say of each other, and what is not for neurons and heads."""
    found = []
    share = pattern_share(asked.pattern)
    if share is None and asked.keep is None:
        found.append("--keep is missing: the share that stays. Only 'keep n of m' says it by itself.")
    if share is not None and asked.keep is not None and abs(asked.keep - share) > 1e-9:
        found.append(f"--pattern {asked.pattern!r} keeps {share:g}, but --keep says {asked.keep:g}; leave out --keep.")
    if asked.pattern in WIDTHS:
        given = [f"--{name}" for name in ("method", "allocation", "rank") if getattr(asked, name)]
        if given:
            found.append(
                f"{', '.join(given)}: for zeros only; {asked.pattern} are scored in one way, equal in all layers."
            )
    elif asked.refit is False and asked.method in (None, "kfac", "alps"):
        found.append("--no-refit: kfac, alps and the default refit as they go; take sparsegpt, wanda or magnitude.")
    elif asked.refit is False and asked.rank:
        found.append("--rank fits a product to what a refit leaves; leave out --no-refit.")
    return found


def _source_problems(recipe: PruneRecipe) -> list[str]:
    """Statistics come from data or from a moments file; magnitude without a refit needs none."""
    asked = recipe.prune
    found = checks.data_problems(recipe.data) + checks.file_problems("--moments", recipe.moments)
    if recipe.moments is not None and recipe.data.source is not None:
        found.append("--data and --moments exclude each other: moments are what calibrating on data gave.")
    elif recipe.moments is None and recipe.data.source is None:
        blind = asked.pattern not in WIDTHS and asked.method == "magnitude" and asked.refit is False
        if not blind or asked.allocation in ("loss", "owl"):
            found.append("--data or --moments is missing; only --method magnitude --no-refit goes without.")
    return found


def _draw(console: Console, pruned: Any, content: dict[str, Any], folder: Path) -> None:
    """What the result is, its sizes, and where it lies."""
    if pruned.narrow is not None:
        render.compressed(console, pruned.outcome, folder)
        return
    maps = [{name: layer[name] for name in ("name", "keep", "rank", "error", "loss")} for layer in content["layers"]]
    render.tree(console, {"maps": maps})
    names = ("means", "pattern", "method", "allocation", "refitted", "keep", "weights", "kept", "loss")
    sizes = ("dense_bytes", "loadable_bytes", "stored_bytes", "seconds")
    render.tree(console, {name: content[name] for name in (*names, *sizes) if content[name] is not None})
    render.saved(console, folder)
