"""Writes what would go stale by hand: docs/methods.md, docs/commands.md and the README's table of methods.

python docs/generate.py           writes them
python docs/generate.py --check   exits with 1 and names those that are stale
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import typer

from eckart.cli.app import app
from eckart.verbs.methods import MethodKind
from eckart.verbs.methods import methods as list_methods

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- methods:begin -->", "<!-- methods:end -->"
NOTICE = "<!-- Written by docs/generate.py; change the docstrings instead. -->"

NEEDS = {
    "mean": "mean input",
    "second": "second moments of the inputs",
    "diagonal": "mean squares of the inputs",
    "gradient": "second moments of the gradients",
    "gradient_scale": "mean squared norm of the gradients",
    "fisher": "sums of the Fisher information",
}
"""What a method may need, in words, in the order in which they are listed."""

INITIALS = re.compile(r"^\s*(?:[A-Z]\.[-\s]*)+")
"""``X. `` of ``X. Wang``, ``Y.-C. `` of ``Y.-C. Hsu``."""


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 where something is stale."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true", help="write nothing, fail where something is stale")
    check = parser.parse_args(arguments).check
    wanted = {
        ROOT / "docs" / "methods.md": methods_page(),
        ROOT / "docs" / "commands.md": commands_page(),
        ROOT / "README.md": with_table((ROOT / "README.md").read_text(encoding="utf-8"), all_tables()),
    }
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if check:
            print(f"{path.relative_to(ROOT)} is stale: run python docs/generate.py", file=sys.stderr)
        else:
            path.write_text(wanted[path], encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
    return 1 if check and stale else 0


KINDS: dict[MethodKind, tuple[str, str]] = {
    "factors": (
        "Factors",
        "A method takes a weight and what calibration knows about it, and gives its best form at every rank. Methods "
        "whose errors are in units of the loss can share one budget over all layers; the others give every layer, or "
        "every type of layer, the same share. `eckart compress --method NAME`.",
    ),
    "modules": (
        "Narrower modules",
        "MLPs lose neurons, attention loses directions of its values and coordinates of its queries and keys. "
        "`eckart compress --method NAME`; the default mixes `modules` with ranks.",
    ),
    "repair": (
        "Repair",
        "A low-rank correction of what quantisation, pruning or compression lost. `eckart compensate --method NAME`.",
    ),
    "adapters": (
        "Fine-tuning with few parameters",
        "A change of a weight with few numbers to train, zero at the start; the base stays as it is. In PEFT as "
        "`eckart.AdapterConfig(method=NAME)`, or `eckart adapt --method NAME`.",
    ),
    "training": (
        "While training",
        "Engines and layers of `eckart.training`, for any PyTorch loop; the engines for ranks also for the Trainer "
        "(`eckart.hf.trainer.RankCallback`).",
    ),
    "optimizers": (
        "Optimizers",
        "Classes and functions of `eckart.optim`: true `torch.optim.Optimizer`s for any loop, and "
        "`eckart.optim.for_trainer(NAME)` for the Trainer.",
    ),
    "pruning": (
        "Pruning",
        "Functions and engines of `eckart.prune`. Those that work from moments alone: `eckart prune --method NAME`.",
    ),
    "diagnostics": (
        "Diagnostics",
        "Functions that take tensors, or a model and its loss, and give a `Finding`: a value with its uncertainty, "
        "sample size and notes. `eckart inspect` runs those of weights on every weight of a model; `eckart dimension` "
        "those of dimension on a file of points.",
    ),
}
"""Heading and introduction of each table."""

ROOMS: dict[MethodKind, str] = {"training": "training", "optimizers": "optim", "pruning": "prune"}
"""Tables of one room whose methods are its classes and functions."""


def methods_table(kind: MethodKind, methods: Sequence[Any]) -> str:
    """The methods of one table as Markdown, one line each."""
    if kind in ROOMS or kind == "diagnostics":
        where = f"in `eckart.{ROOMS[kind]}`" if kind in ROOMS else "in `eckart`"
        lines = [f"| method | {where} | what it does | source |", "|---|---|---|---|"]
        for method in methods:
            entry = method.entry.__name__ if kind in ROOMS else called(method)
            lines.append(table_row((f"`{method.name}`", f"`{entry}`", method.summary, source(method, short=True))))
        return "\n".join(lines)
    if kind == "adapters":
        lines = ["| method | what it does | needs | exactly a LoRA | source |", "|---|---|---|---|---|"]
        for method in methods:
            exact = "yes" if method.exact else "no"
            cells = (f"`{method.name}`", method.summary, needs(method), exact, source(method, short=True))
            lines.append(table_row(cells))
        return "\n".join(lines)
    lines = ["| method | what it does | needs | one budget for all layers | source |", "|---|---|---|---|---|"]
    for method in methods:
        cells = (
            f"`{method.name}`",
            method.summary,
            needs(method),
            "yes" if method.loss_units else "no",
            source(method, short=True),
        )
        lines.append(table_row(cells))
    return "\n".join(lines)


def called(method: Any) -> str:
    """Room and name of the function of a diagnostic: ``geometry.two_nn``."""
    return f"{method.entry.__module__.split('.')[1]}.{method.entry.__name__}"


def all_tables() -> str:
    """Every table under its heading."""
    return "\n\n".join(f"**{KINDS[kind][0]}**\n\n{methods_table(kind, list_methods(kind))}" for kind in KINDS)


def table_row(cells: Iterable[str]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in cells)} |"


def methods_page() -> str:
    """docs/methods.md: the tables, then for each method its claim, its options and its docstring."""
    parts = [
        NOTICE,
        "# Methods",
        "`eckart methods` prints these tables and the options; `eckart claims` runs the claims below and "
        "prints the figures of this machine.",
    ]
    for kind, (heading, words) in KINDS.items():
        parts += [f"## {heading}", words, methods_table(kind, list_methods(kind))]
        for method in list_methods(kind):
            parts += method_parts(kind, method)
    return "\n\n".join(parts) + "\n"


def heading(kind: MethodKind, method: Any) -> str:
    """The method's name, with its kind where another table has the name too."""
    shared = sum(other.name == method.name for other in list_methods()) > 1 and kind != "factors"
    return f"{method.name} ({kind})" if shared else str(method.name)


def method_parts(kind: MethodKind, method: Any) -> list[str]:
    """What the page says of one method."""
    where = inspect.getmodule(method.claim.run)
    parts = [
        f"### {heading(kind, method)}",
        f"{method.summary[:1].upper()}{method.summary[1:]}.",
        f"**Paper.** {source(method)}" + (f"  \n**Needs.** {needs(method)}" if hasattr(method, "needs") else ""),
        f"**Claim.** {method.claim.statement} *({method.claim.source})*",
    ]
    if hasattr(method, "options"):
        parts.append(f"**Options.**\n\n{options_table(method)}")
    parts.append(
        f"::: {where.__name__ if where else ''}\n    options:\n      members: false\n"
        "      show_root_heading: false\n      show_root_toc_entry: false\n      heading_level: 4"
    )
    return parts


def needs(method: Any) -> str:
    """What a method needs to know, in words."""
    return ", ".join(words for need, words in NEEDS.items() if need in method.needs) or "the weight alone"


def source(method: Any, *, short: bool = False) -> str:
    """Authors, title and year, or only surnames and year, linked where there is a link."""
    paper = method.paper
    words = f"{paper.authors}, “{paper.title}”, {paper.year}"
    if short:
        names = [INITIALS.sub("", author).strip() for author in paper.authors.split(",")]
        words = f"{' & '.join(names) if len(names) < 3 else names[0] + ' et al.'} {paper.year}"
    return f"[{words}]({paper.link})" if paper.link else words


def options_table(method: Any) -> str:
    """Options with their defaults and the docstrings under their fields."""
    meanings = field_docstrings(method.options)
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(method.options):
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        lines.append(table_row((f"`{field.name}`", f"`{default}`", meanings.get(field.name, ""))))
    return "\n".join(lines) if len(lines) > 2 else "None."


def field_docstrings(record: type[Any]) -> dict[str, str]:
    """The string under each field of a class."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(record))).body
    found: dict[str, str] = {}
    for field, text in pairwise(getattr(definition, "body", [])):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                found[name] = " ".join(words.split())
    return found


def commands_page() -> str:
    """docs/commands.md: every command with its options, from the same table as ``--help``."""
    group = typer.main.get_command(app)
    parts = [
        NOTICE,
        "# Commands",
        "Results go to stdout, progress and warnings to stderr. Every command takes `--json` for a result "
        "that programs read and `--quiet` for silence. Exit codes: 0 done, 1 failed, 2 wrong use, 130 "
        "interrupted. Options of a run can be kept in a YAML recipe: `--recipe FILE`, single values of it "
        "changed with `--set budget.keep=0.5`; `eckart schema` prints what a recipe may hold.",
    ]
    for name, command in getattr(group, "commands", {}).items():
        parts += [f"## eckart {name}", plain_help(command.help or ""), parameters_table(name, command)]
    return "\n\n".join(part for part in parts if part) + "\n"


def parameters_table(name: str, command: Any) -> str:
    """Usage line and table of the options of one command."""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    names = [(argument.metavar or argument.name).upper() for argument in arguments]
    lines = ["| option | value | meaning |", "|---|---|---|"]
    for argument, shown in zip(arguments, names, strict=True):
        lines.append(table_row((f"`{shown}`", "", argument.help or "")))
    for option in options:
        flags = ", ".join(f"`{flag}`" for flag in [*option.opts, *option.secondary_opts])
        lines.append(table_row((flags, "" if option.is_flag else value_of(option), option.help or "")))
    usage = " ".join([f"eckart {name}", *names, "[OPTIONS]"])
    return f"```sh\n{usage}\n```\n\n" + "\n".join(lines)


def value_of(option: Any) -> str:
    """What follows an option: its choices, or the word that stands for its value."""
    return ", ".join(f"`{choice}`" for choice in (option.metavar or option.name.upper()).split("|"))


def plain_help(text: str) -> str:
    """Help text without the marks of the terminal."""
    return inspect.cleandoc(text.replace("\b", "").replace("\f", "")).strip()


def with_table(readme: str, table: str) -> str:
    """The README with the table between its markers."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise SystemExit(f"README.md needs exactly one line {BEGIN} and one line {END} after it.")
    head, tail = readme.split(BEGIN)[0], readme.split(END)[1]
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"


if __name__ == "__main__":
    sys.exit(main())
