"""The order of the rooms: a room imports only from rooms above it, and nothing goes in circles."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "eckart"

ORDER = [
    "errors",
    "records",
    "linalg",
    "forms",
    "data",
    "arch",
    "moments",
    "evidence",
    "spectra",
    "landscape",
    "geometry",
    "optim",
    "layers",
    "checkpoint",
    "compression",
    "modules",
    "compensation",
    "adaptation",
    "prune",
    "planning",
    "apply",
    "training",
    "evaluation",
    "inspection",
    "hf",
    "streaming",
    "report",
    "verbs",
    "cli",
]
# Modules of the package itself that are no rooms. Each may name any room, but only lazily; see below.
LOBBY = {"", "__main__", "hooks"}
ONLY_HF = {"transformers", "peft", "datasets", "accelerate"}
WITHOUT_TORCH = {"", "errors", "records", "cli", "hooks", "__main__"}
NEVER = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def module_of(path: Path) -> str:
    """Dotted name inside of the package: ``linalg.svd``; a package by its own name, eckart itself ``""``."""
    parts = list(path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {module_of(path): ast.parse(path.read_bytes()) for path in sorted(SOURCE.rglob("*.py"))}


def room_of(module: str) -> str:
    return module.partition(".")[0]


def imports(module: str, node: ast.AST) -> Iterator[str]:
    """Absolute dotted names that one import statement names; ``from a import b`` gives ``a`` and ``a.b``.

    ``importlib.import_module`` of a name in quotes is one too.
    """
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = ["eckart", *(part for part in module.split(".") if part)]
            is_package = (SOURCE / Path(*module.split(".")) / "__init__.py").is_file()
            up = package[: len(package) - node.level + is_package]
            base = ".".join([*up, base] if base else up)
        yield base
        yield from (f"{base}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        if isinstance(node.func, ast.Attribute):
            called = node.func.attr
        else:
            called = node.func.id if isinstance(node.func, ast.Name) else ""
        if called in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
            yield node.args[0].value


def own_imports(module: str, tree: ast.AST) -> set[str]:
    """The modules of this package that ``tree`` imports, without the package in front."""
    found: set[str] = set()
    for node in ast.walk(tree):
        statement = [name for name in imports(module, node) if name.partition(".")[0] == "eckart"]
        modules = [name.removeprefix("eckart").lstrip(".") for name in statement]
        modules = [name for name in modules if name in TREES]
        # ``from eckart.linalg import svd`` with a module svd means that module, else the package.
        longer = [name for name in modules if name and any(name.startswith(f"{other}.") for other in modules)]
        found.update(longer or modules)
    return found


def foreign_imports(module: str, tree: ast.AST) -> set[str]:
    return {name.partition(".")[0] for node in ast.walk(tree) for name in imports(module, node)} - {
        "eckart",
        "",
    }


MODULES = sorted(TREES)


def test_every_room_is_in_the_order() -> None:
    assert {room_of(module) for module in TREES} - LOBBY == set(ORDER)


@pytest.mark.parametrize("module", [m for m in MODULES if room_of(m) not in LOBBY])
def test_a_room_imports_only_from_above(module: str) -> None:
    place = ORDER.index(room_of(module))
    below = {
        name
        for name in own_imports(module, TREES[module])
        if room_of(name) not in LOBBY and ORDER.index(room_of(name)) > place
    }
    assert not below, f"{module} imports from rooms below it: {sorted(below)}"


def test_no_cycles_between_modules() -> None:
    graph = {}
    for module, tree in TREES.items():
        needed = own_imports(module, tree) - {module}
        # Importing ``linalg.svd`` runs ``linalg`` first; inside of the room that is no dependency.
        graph[module] = {name for name in needed if name and not (module.startswith(f"{name}."))}
        inward = {name for name in needed if name and module.startswith(f"{name}.")}
        assert not inward, f"{module} imports from the package that holds it: {sorted(inward)}"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' → '.join(reversed(error.args[1]))}")


@pytest.mark.parametrize("module", [m for m in MODULES if room_of(m) not in LOBBY])
def test_no_import_of_eckart_inside_a_function(module: str) -> None:
    hidden = {
        f"line {node.lineno}: {name}"
        for scope in ast.walk(TREES[module])
        if isinstance(scope, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda))
        for node in ast.walk(scope)
        for name in imports(module, node)
        if name.partition(".")[0] == "eckart"
    }
    assert not hidden, f"{module} imports Eckart out of sight: {sorted(hidden)}"


@pytest.mark.parametrize("module", [m for m in MODULES if room_of(m) not in LOBBY | {"cli"}])
def test_only_the_command_line_uses_the_package_as_a_whole(module: str) -> None:
    """``eckart.plan(…)`` in a room would reach every room below it."""
    allowed = {"eckart.__version__", "eckart"}
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            assert "eckart" not in imports(module, node), f"{module}, line {node.lineno}"
        elif isinstance(node, ast.ImportFrom) and next(imports(module, node)) == "eckart":
            modules = {f"eckart.{name}" for name in TREES}
            assert set(imports(module, node)) <= allowed | modules, f"{module}, line {node.lineno}"


@pytest.mark.parametrize("module", MODULES)
def test_who_imports_what(module: str) -> None:
    foreign = foreign_imports(module, TREES[module])
    assert not foreign & NEVER
    if room_of(module) != "hf":
        assert not foreign & ONLY_HF
    if room_of(module) in WITHOUT_TORCH:
        assert "torch" not in foreign


@pytest.mark.parametrize("module", MODULES)
def test_nothing_loads_pickles(module: str) -> None:
    """No ``torch.load`` and no ``allow_pickle=True``, by whatever name torch goes."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Attribute) and node.attr == "load" and isinstance(node.value, ast.Name):
            assert node.value.id not in {"torch", *NEVER}, f"{module}, line {node.lineno}"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert isinstance(node.value, ast.Constant), f"{module}, line {node.value.lineno}"
            assert node.value.value is False, f"{module}, line {node.value.lineno}"


def test_the_checks_see_what_they_should() -> None:
    """The walk itself, on made-up modules."""
    tree = ast.parse("from eckart.linalg import svd, truncated_svd\nimport torch.nn\nfrom . import roots")
    assert {"linalg.svd", "linalg.roots"} <= own_imports("linalg.weighted", tree)
    assert foreign_imports("linalg.weighted", tree) == {"torch"}
    inner = ast.parse("def f():\n    from eckart.cli import main\n")
    assert own_imports("errors", inner) == {"cli"}
    named = ast.parse("importlib.import_module('eckart.hf')\nimport_module('peft')\n__import__('pickle')")
    assert own_imports("errors", named) == {"hf"}
    assert foreign_imports("errors", named) == {"peft", "pickle"}
