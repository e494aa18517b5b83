"""What docs/generate.py writes: complete, and noticed when stale."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

import eckart

ROOT = Path(__file__).parents[2]
KINDS = ("factors", "modules", "repair", "training", "optimizers", "pruning", "diagnostics")
METHODS = [(kind, method) for kind in KINDS for method in eckart.methods(kind)]


@pytest.fixture
def generate(tmp_path, monkeypatch):
    """The script, working on a copy of what it writes."""
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "README.md", tmp_path)
    for name in ("methods.md", "commands.md"):
        shutil.copy(ROOT / "docs" / name, tmp_path / "docs")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def test_nothing_is_stale(generate, capsys) -> None:
    assert generate.main(["--check"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", ["README.md", "docs/methods.md", "docs/commands.md"])
def test_a_stale_file_is_named_and_repaired(generate, tmp_path, capsys, name: str) -> None:
    path = tmp_path / name
    good = path.read_text(encoding="utf-8")
    path.write_text(good.replace("eckart", "eckhart") if "docs" in name else good.replace("| `svd` |", "| `dvs` |"))
    assert generate.main(["--check"]) == 1
    assert f"{name} is stale" in capsys.readouterr().err
    assert generate.main([]) == 0
    assert path.read_text(encoding="utf-8") == good


def test_missing_markers_are_said(generate, tmp_path) -> None:
    (tmp_path / "README.md").write_text("# Eckart\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="needs exactly one line <!-- methods:begin -->"):
        generate.main([])


def test_the_text_around_the_table_stays(generate) -> None:
    readme = "before\n<!-- methods:begin -->\nold\n<!-- methods:end -->\nafter\n"
    assert generate.with_table(readme, "| new |") == (
        "before\n<!-- methods:begin -->\n| new |\n<!-- methods:end -->\nafter\n"
    )


@pytest.mark.parametrize(("kind", "method"), METHODS, ids=lambda value: getattr(value, "name", value))
def test_every_method_has_its_claim_options_and_docstring(generate, kind, method) -> None:
    page = generate.methods_page()
    section = page.split(f"\n### {generate.heading(kind, method)}\n")[1].split("\n### ")[0]
    assert method.claim.statement in section
    assert method.paper.title in section
    if hasattr(method, "options"):
        meanings = generate.field_docstrings(method.options)
        assert set(meanings) >= set(method.options.__dataclass_fields__)
        assert f"::: {method.options.__module__}" in section
        assert all(f"| `{name}` |" in section and meaning for name, meaning in meanings.items())
    assert f"| `{method.name}` |" in generate.methods_table(kind, eckart.methods(kind))
    assert f"| `{method.name}` |" in generate.all_tables()


def test_every_row_of_a_table_has_the_same_cells(generate) -> None:
    for page in (generate.methods_page(), generate.commands_page()):
        for table in re.findall(r"(?:^\|.*\n)+", page, re.M):
            cells = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
            assert len(cells) == 1, table


def test_commands_have_their_options(generate) -> None:
    page = generate.commands_page()
    for verb in (
        "calibrate",
        "plan",
        "compress",
        "compensate",
        "evaluate",
        "export",
        "methods",
        "claims",
        "doctor",
        "demo",
    ):
        section = page.split(f"\n## eckart {verb}\n")[1].split("\n## ")[0]
        assert "`--json`" in section
    assert "`uniform`, `typewise`, `global`" in page
