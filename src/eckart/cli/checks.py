"""What can be refused before anything heavy is imported: missing things, and things that exclude each other.

Each function returns the problems that it found, so that a command shows all of them at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import eckart
from eckart.cli.flags import keywords, leaves
from eckart.cli.recipe import (
    KINDS,
    BudgetSection,
    CompressRecipe,
    DataSection,
    FormsSection,
    InspectRecipe,
    MethodSection,
    PlanRecipe,
    Section,
    SitesSection,
)
from eckart.errors import InputError, problems
from eckart.records import Budget

_UNITS = {
    "keep": "keep",
    "model_keep": "model_keep",
    "max_parameters": "parameters",
    "max_bytes": "bytes",
    "max_macs": "macs",
    "max_loss": "loss",
}
STREAMED = frozenset(
    {
        *("data", "field", "samples", "length", "batch_size", "gradients", "probes", "method", "options", "allocation"),
        *("include", "exclude", "forms", "bits", "rank_multiple", "min_rank", "certify", "seed"),
    }
)
"""Keywords of ``compress`` that ``compress_stream`` has too."""
_NOT_STREAMED = {
    "plan": "it calibrates and plans by itself, block by block",
    "moments": "moments of the whole model would not fit into memory either; give --data",
    "queue": "it is the work of one process",
    "embeddings": "only the maps inside of the blocks are compressed",
    "head": "only the maps inside of the blocks are compressed",
    "dtype": "weights are computed with as they are stored",
    "device": "it runs on the CPU",
}
BITS = (8, 4)
"""What ``--options bits`` allows: those that a budget in bytes has by itself."""
_BUDGET_FLAGS = ", ".join(f"--{name.replace('_', '-')}" for name in _UNITS)


def refuse(found: Iterable[str]) -> None:
    """Raises InputError with all of the problems, if there are any."""
    lines = list(found)
    if lines:
        raise InputError(problems("this command cannot run", lines))


def budget_of(section: BudgetSection) -> Budget | None:
    """The budget of a recipe; None where it has none."""
    given = {_UNITS[name]: value for name, value in section if value is not None}
    return Budget(**given) if given else None


def required(value: str | None, flag: str, recipe_key: str) -> list[str]:
    """A value that has no default."""
    if value:
        return []
    return [f"{flag} is missing; give it on the command line or as `{recipe_key}` in a recipe."]


def budget_problems(section: BudgetSection) -> list[str]:
    """A budget is needed, and in one unit."""
    given = _given(section)
    if not given:
        return [f"a budget is missing: give one of {_BUDGET_FLAGS}."]
    if len(given) > 1:
        return [f"one budget is needed, but {len(given)} are given: {', '.join(given)}."]
    return []


def data_problems(section: DataSection, flag: str = "--data") -> list[str]:
    """A text file that does not exist is found before a model is loaded."""
    source = section.source
    if source and Path(source).suffix in (".txt", ".jsonl", ".json") and not Path(source).exists():
        return [f"{flag}: there is no file {source}."]
    return []


def file_problems(flag: str, file: str | None) -> list[str]:
    """A file that is read must be one."""
    if file is None or Path(file).is_file():
        return []
    what = "is a folder, a file is expected" if Path(file).is_dir() else "does not exist"
    return [f"{flag}: {file} {what}."]


def output_problems(
    output: str | None, overwrite: bool | None, *, folder: bool, sources: Iterable[str | None] = ()
) -> list[str]:
    """The output can be written, replaces nothing by accident, and never what it is made from.

    A folder is replaced only where it is empty or holds a ``config.json`` or ``eckart.json``: nobody means to
    overwrite a home folder.
    """
    if not output:
        key = "folder" if folder else "file"
        return [f"-o is missing: name the {key} to write, here or as `output.{key}` in a recipe."]
    path = Path(output)
    for source in sources:
        if source and path.exists() and Path(source).exists() and path.samefile(source):
            return [f"-o: {output} is what the result is made from; name another place."]
    if not path.exists():
        parent = path.absolute().parent
        if not parent.is_dir():
            return [f"-o: the folder {parent} does not exist; make it first."]
        return [] if os.access(parent, os.W_OK) else [f"-o: the folder {parent} is not writable."]
    if path.is_dir() != folder:
        return [f"-o: {output} is a {'file, a folder' if folder else 'folder, a file'} is expected."]
    if folder and any(path.iterdir()) and not any((path / n).exists() for n in ("eckart.json", "config.json")):
        return [f"-o: {output} holds something that is no model and is not replaced; name another folder."]
    if not overwrite and not (folder and not any(path.iterdir())):
        return [f"-o: {output} exists; give --overwrite to replace it, or name another place."]
    return [] if os.access(path, os.W_OK) else [f"-o: {output} is not writable."]


def plan_problems(recipe: CompressRecipe) -> list[str]:
    """A plan decides ranks, forms and methods; whatever else decides them contradicts it."""
    if recipe.plan is None:
        return budget_problems(recipe.budget)
    sections: tuple[BudgetSection | MethodSection | FormsSection | SitesSection, ...] = (
        recipe.budget,
        recipe.method,
        recipe.forms,
        recipe.sites,
    )
    given = [flag for section in sections for flag in _given(section)]
    given += ["--allocation"] if recipe.allocation is not None else []
    found = file_problems("--plan", recipe.plan)
    if given:
        found.append(f"--plan already decides what {', '.join(given)} would; leave out one or the other.")
    return found


def kinds_problems(recipe: CompressRecipe | PlanRecipe) -> list[str]:
    """``--options`` says in words what ``--form`` and ``--bits`` say in detail, and zeros save bytes only."""
    section = recipe.forms
    found = []
    given = [f"--{flag}" for flag, value in (("form", section.allow), ("bits", section.bits)) if value]
    if section.kinds is not None and given:
        found.append(f"--options and {' and '.join(given)} say the same; leave out one or the other.")
    sparse = "sparse" in (*(section.kinds or ()), *(section.allow or ()))
    if sparse and _given(recipe.budget) and recipe.budget.max_bytes is None:
        found.append("sparse: zeros that are not stored save bytes, no multiply-adds and no time; give --max-bytes.")
    return found


def forms_of(recipe: CompressRecipe | PlanRecipe) -> dict[str, object]:
    """The keywords ``forms`` and ``bits`` that ``--options`` stands for; none without it."""
    kinds = recipe.forms.kinds
    if kinds is None:
        return {}
    forms = ("dense", *(form for kind in KINDS if kind in kinds for form in KINDS[kind]))
    if "bits" not in kinds:
        return {"forms": forms, "bits": ()}
    return {"forms": forms, "bits": BITS}


def source_problems(recipe: CompressRecipe) -> list[str]:
    """Statistics come from data or from a moments file, and what is for calibrating needs data."""
    found = data_problems(recipe.data) + file_problems("--moments", recipe.moments)
    if recipe.moments is not None and recipe.data.source is not None:
        found.append("--data and --moments exclude each other: moments are what calibrating on data gave.")
    elif recipe.data.source is None:
        idle = _given(recipe.data) + _given(recipe.calibration)
        if idle:
            found.append(f"{', '.join(idle)} have no effect without --data.")
        if recipe.refit_blend is not None:
            found.append("--refit-blend runs the model on data: give --data.")
    return found


def queue_problems(recipe: CompressRecipe) -> list[str]:
    """Workers of a queue share decompositions, each with the same moments."""
    if recipe.queue is None:
        return []
    found = []
    if recipe.data.source is not None:
        found.append("--queue shares decompositions, not a calibration: calibrate first, and give --moments.")
    if Path(recipe.queue).exists() and not Path(recipe.queue).is_dir():
        found.append(f"--queue: {recipe.queue} is a file, a folder is expected.")
    return found


def stream_problems(recipe: CompressRecipe, dry_run: bool) -> list[str]:
    """What cannot be asked of a model that is never in memory as a whole."""
    if not recipe.stream:
        return []
    asked = keywords(recipe)
    found = []
    for leaf in leaves(CompressRecipe):
        keyword = leaf.flag.keyword
        wanted = asked.get(keyword) or (keyword == "refit_blend" and keyword in asked)  # a blend of 0 is one
        if wanted and keyword not in STREAMED:
            why = _NOT_STREAMED.get(keyword, "it needs the whole model")
            found.append(f"--stream and {leaf.flag.name} exclude each other: {why}.")
    if dry_run:
        found.append(
            "--stream and --dry-run exclude each other: a dry run loads the whole model, and the run itself checks "
            "first whether the disk is large enough."
        )
    return found


def inspect_problems(recipe: InspectRecipe) -> list[str]:
    """A file that is named must be there, and data need a model that runs."""
    found = []
    for flag, given in (("MODEL", recipe.model), ("--against", recipe.against)):
        if given and given.endswith(".safetensors"):
            found += file_problems(flag, given)
    if recipe.model and Path(recipe.model).is_file() and recipe.data.source is not None:
        found.append(f"--data runs the model, but {recipe.model} is a file of weights: name its folder.")
    if recipe.data.source is None:
        idle = _given(recipe.data) + _given(recipe.run)
        if idle:
            found.append(f"{', '.join(idle)} have no effect without --data.")
    if recipe.cache and Path(recipe.cache).is_file():
        found.append(f"--cache: {recipe.cache} is a file, a folder is expected.")
    return found


def moments_problems(recipe: CompressRecipe | PlanRecipe) -> list[str]:
    """Where neither moments nor data are given, the method must need none. Looks the method up last."""
    missing = "--moments is missing" if isinstance(recipe, PlanRecipe) else "--data or --moments is missing"
    if recipe.moments is not None or (isinstance(recipe, CompressRecipe) and (recipe.data.source or recipe.plan)):
        return []
    if recipe.method.name is None:
        return [f"{missing}; only methods that need no statistics, such as --method svd, go without."]
    for method in (*eckart.methods("factors"), *eckart.methods("modules")):
        if method.name == recipe.method.name and method.needs:  # type: ignore[attr-defined]
            needs = ", ".join(sorted(method.needs))  # type: ignore[attr-defined]
            return [f"{missing}: the method {method.name} needs statistics of the model's inputs ({needs})."]
    return []


def _given(section: Section) -> list[str]:
    """Flags of the fields of a section that are set."""
    flags = {"name": "--method", "options": "--option", "allow": "--form", "kinds": "--options"}
    return [flags.get(n, f"--{n.replace('_', '-')}") for n, value in section if value not in (None, [])]
