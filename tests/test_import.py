"""What ``import eckart`` costs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {
    "accelerate",
    "datasets",
    "jinja2",
    "numpy",
    "peft",
    "pydantic",
    "rich",
    "safetensors",
    "scipy",
    "torch",
    "transformers",
    "typer",
    "yaml",
}

PROBE = """
import json, sys, time
start = time.process_time()
{statement}
seconds = time.process_time() - start
print(json.dumps([seconds, sorted({{name.partition(".")[0] for name in sys.modules}})]))
"""


def probe(statement: str) -> tuple[float, set[str]]:
    """CPU seconds of a statement in a fresh Python, and the top-level modules there afterwards."""
    code = PROBE.format(statement=statement)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, modules = json.loads(run.stdout.splitlines()[-1])
    return seconds, set(modules)


def test_import_is_light(capsys: pytest.CaptureFixture[str]) -> None:
    _, bare = probe("pass")
    seconds, modules = probe("import eckart; eckart.__version__")
    with capsys.disabled():
        print(f"\nimport eckart: {seconds:.3f} s of CPU")
    assert "eckart" in modules
    assert not (modules - bare) & HEAVY


@pytest.mark.parametrize("module", ["errors", "records"])
def test_the_first_rooms_need_nothing_heavy(module: str) -> None:
    _, bare = probe("pass")
    _, modules = probe(f"import eckart.{module}")
    assert not (modules - bare) & HEAVY


def test_records_of_a_plan_can_be_named_without_torch() -> None:
    _, modules = probe("from eckart import Budget, Rank; Budget(keep=0.6); Rank(keep=4)")
    assert not modules & {"torch", "transformers"}


def test_the_command_line_loads_no_torch_before_it_is_needed() -> None:
    _, modules = probe("import eckart.cli")
    assert not modules & {"torch", "transformers"}
