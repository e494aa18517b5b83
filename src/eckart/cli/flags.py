"""From a recipe to the options of a command, and from what was typed back to a recipe.

Three sources are merged, the later wins: the recipe file, ``--set a.b=c``, the flags. Every value remembers
where it came from, so that a complaint names the flag that was typed or the line of the recipe.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import typer
import yaml
from pydantic import BaseModel, ValidationError

from eckart.cli.amounts import parse_pair
from eckart.cli.recipe import Flag, Section
from eckart.cli.terminal import Terminal
from eckart.errors import InputError, problems, unknown

R = TypeVar("R", bound=Section)
Path_ = tuple[str, ...]


@dataclass(frozen=True)
class Leaf:
    """One field of a recipe."""

    path: Path_
    flag: Flag
    help: str
    annotation: Any

    @property
    def parameter(self) -> str:
        """Name of the parameter of the command."""
        return "_".join(self.path)

    @property
    def repeated(self) -> bool:
        return any(str(part).startswith(("list", "dict")) for part in get_args(self.annotation))

    @property
    def switch(self) -> bool:
        return bool in get_args(self.annotation)


def leaves(recipe: type[BaseModel], above: Path_ = ()) -> Iterator[Leaf]:
    """Every field of a recipe, in the order of its definition, groups opened."""
    for name, field in recipe.model_fields.items():
        annotation = field.annotation
        if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
            yield from leaves(annotation, (*above, name))
            continue
        flag = next(item for item in field.metadata if isinstance(item, Flag))
        yield Leaf((*above, name), flag, field.description or "", annotation)


def keywords(recipe: Section) -> dict[str, Any]:
    """The keywords of the verb that the recipe sets; what it leaves open keeps the verb's default."""
    found: dict[str, Any] = {}
    for leaf in leaves(type(recipe)):
        value: Any = recipe
        for name in leaf.path:
            value = getattr(value, name)
        if leaf.flag.keyword and value is not None:
            found[leaf.flag.keyword] = tuple(value) if isinstance(value, list) else value
    return found


Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel="Output")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes.", rich_help_panel="Output")]
RecipeFile = Annotated[
    str | None,
    typer.Option("--recipe", metavar="FILE", help="YAML file with these options in groups; see `eckart schema`."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Change one value of the recipe. Repeatable."),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Write nothing; show ranks, bytes, multiply-adds, memory and disk.",
        rich_help_panel="Output",
    ),
]


def takes(recipe: type[R], *, dry_run: bool) -> Callable[[Callable[[R, Terminal, bool], None]], Callable[..., None]]:
    """Give a function of (recipe, terminal, dry run) the options of ``recipe``, as a Typer command."""

    def decorate(run: Callable[[R, Terminal, bool], None]) -> Callable[..., None]:
        known = tuple(leaves(recipe))

        @wraps(run)
        def command(**given: Any) -> None:
            terminal = Terminal(json=given["as_json"], quiet=given["quiet"])
            flags = {leaf: given[leaf.parameter] for leaf in known}
            asked = gather(recipe, flags, given["recipe_file"], given["settings"] or ())
            run(asked, terminal, bool(given.get("dry_run")))

        parameters = [_parameter(leaf) for leaf in known]
        extra: dict[str, Any] = {"recipe_file": RecipeFile, "settings": Settings}
        extra |= {"dry_run": DryRun} if dry_run else {}
        extra |= {"as_json": Json, "quiet": Quiet}
        for name, annotation in extra.items():
            default = None if name in ("recipe_file", "settings") else False
            parameters.append(
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            )
        # Typer reads both: the signature for order and defaults, the annotations for the types.
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def _parameter(leaf: Leaf) -> inspect.Parameter:
    """The option of one field. Values stay text here: the recipe checks them, with all the others."""
    flag = leaf.flag
    text = leaf.help + (f" Default: {flag.default}." if flag.default else "")
    kind: Any = str | None
    if not flag.name:
        info: Any = typer.Argument(metavar=flag.metavar, help=text, show_default=False)
    else:
        names = [flag.name] if not leaf.switch else [f"{flag.name}/--no-{flag.name[2:]}"]
        kind = bool | None if leaf.switch else list[str] | None if leaf.repeated else kind
        panel = leaf.path[0].capitalize() if len(leaf.path) > 1 else "Options"
        info = typer.Option(
            *names,
            *([flag.short] if flag.short else []),
            metavar=flag.metavar or None,
            help=text,
            show_default=False,
            rich_help_panel=panel,
        )
    return inspect.Parameter(
        leaf.parameter, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, info]
    )


def gather(recipe: type[R], flags: Mapping[Leaf, Any], file: str | None, settings: Sequence[str]) -> R:
    """The recipe out of its file, the settings and the flags.

    Raises InputError with every unknown key and every value that does not fit.
    """
    found: list[str] = []
    merged: dict[str, Any] = {}
    origins: dict[Path_, str] = {}
    if file is not None:
        merged = _read(file)
        origins[()] = file
    for text in settings:
        try:
            dotted, value = parse_pair(text)
        except ValueError as error:
            found.append(f"--set: {error}")
            continue
        path = tuple(dotted.split("."))
        _put(merged, path, value)
        origins[path] = f"--set {dotted}"
    for leaf, value in flags.items():
        if value is None or value == []:
            continue
        if leaf.flag.name == "--option":
            pairs = {}
            for text in value:
                try:
                    name, pairs_value = parse_pair(text)
                except ValueError as error:
                    found.append(f"--option: {error}")
                    continue
                pairs[name] = pairs_value
            value = {**_at(merged, leaf.path, {}), **pairs}
        _put(merged, leaf.path, value)
        origins[leaf.path] = leaf.flag.name or leaf.flag.metavar
    try:
        result = recipe.model_validate(merged)
    except ValidationError as error:
        found += [_complaint(recipe, detail, origins) for detail in error.errors(include_url=False)]
    if found:
        raise InputError(problems("these options cannot be used", found))
    return result


def _read(file: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(file).read_text("utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"--recipe: there is no file {file}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--recipe: {file} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        raise InputError(f"--recipe: {file} is not YAML: {' '.join(str(error).split())}.") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"--recipe: expected {file} to hold groups such as `budget:`; see `eckart schema`.")
    return content


def _put(tree: dict[str, Any], path: Path_, value: Any) -> None:
    """Set ``tree[a][b]``; a group that is missing, empty or no group is made."""
    for name in path[:-1]:
        if not isinstance(tree.get(name), dict):
            tree[name] = {}
        tree = tree[name]
    tree[path[-1]] = value


def _at(tree: Any, path: Path_, default: Any) -> Any:
    for name in path:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else default


def _complaint(recipe: type[BaseModel], detail: Mapping[str, Any], origins: Mapping[Path_, str]) -> str:
    """One sentence out of one finding of pydantic."""
    location = tuple(str(part) for part in detail["loc"])
    given = detail["input"]
    origin = next((origins[location[:n]] for n in range(len(location), -1, -1) if location[:n] in origins), "")
    dotted = ".".join(location)
    where = origin if origin.startswith("-") or origin.isupper() else f"{origin}: {dotted}".removeprefix(": ")
    kind = detail["type"]
    if kind == "extra_forbidden":
        group = _group(recipe, location[:-1])
        name = "key" if not location[:-1] else f"key of {'.'.join(location[:-1])}"
        return f"{origin}: {unknown(name, location[-1], group.model_fields)}"
    if kind == "literal_error":
        choices = re.findall("'([^']*)'", detail["ctx"]["expected"])
        return f"{where}: {unknown('value', str(given), choices)}"
    if kind in ("model_type", "model_attributes_type"):
        known = ", ".join(_group(recipe, location).model_fields)
        return f"{where}: expected a group with some of the keys {known}; got {given!r}."
    message = detail["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    message = re.sub(r", unable to parse.*", "", message)
    hint = " For 60 % write 0.6." if kind == "less_than_equal" and location[-1] in ("keep", "model_keep") else ""
    return f"{where}: {message}; got {given!r}.{hint}"


def _group(recipe: type[BaseModel], path: Path_) -> type[BaseModel]:
    for name in path:
        annotation = recipe.model_fields[name].annotation
        if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
            recipe = annotation
    return recipe
