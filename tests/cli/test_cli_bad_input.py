"""Wrong use is refused with exit code 2, all problems at once, before anything heavy is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

GOOD = ("compress", "m", "--data", "stdlib:source", "--keep", "0.6")


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("")
    (tmp_path / "plan.json").write_text("{}")
    (tmp_path / "moments.safetensors").write_text("")
    (tmp_path / "recipe.yaml").write_text("budget: {kep: 0.6}\n")
    (tmp_path / "list.yaml").write_text("- a\n")
    (tmp_path / "broken.yaml").write_text("a: [\n")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    return tmp_path


CASES = {
    "no model": (("compress", "--data", "stdlib:source", "--keep", ".6", "-o", "x"), "MODEL is missing"),
    "no budget": (("compress", "m", "--data", "stdlib:source", "-o", "x"), "a budget is missing"),
    "two budgets": ((*GOOD, "-o", "x", "--max-bytes", "40MB"), "2 are given: --keep, --max-bytes"),
    "plan and keep": ((*GOOD, "-o", "x", "--plan", "plan.json"), "--plan already decides what --keep"),
    "plan and method": (
        ("compress", "m", "--data", "stdlib:source", "-o", "x", "--plan", "plan.json", "--method", "svd"),
        "what --method would",
    ),
    "no such plan": (
        ("compress", "m", "--data", "stdlib:source", "-o", "x", "--plan", "plam.json"),
        "--plan: plam.json does not exist",
    ),
    "data and moments": ((*GOOD, "-o", "x", "--moments", "moments.safetensors"), "exclude each other"),
    "no such moments": (
        ("compress", "m", "--moments", "no.safetensors", "--keep", ".6", "-o", "x"),
        "--moments: no.safetensors does not exist",
    ),
    "moments is a folder": (
        ("compress", "m", "--moments", "model", "--keep", ".6", "-o", "x"),
        "model is a folder, a file is expected",
    ),
    "no statistics": (("compress", "m", "--keep", ".6", "-o", "x"), "--data or --moments is missing"),
    "calibration without data": (
        ("compress", "m", "--moments", "moments.safetensors", "--keep", ".6", "-o", "x", "--samples", "3"),
        "--samples have no effect",
    ),
    "no such data file": (("compress", "m", "--data", "no.txt", "--keep", ".6", "-o", "x"), "no file no.txt"),
    "no output": (GOOD, "-o is missing"),
    "output exists": ((*GOOD, "-o", "model"), "--overwrite"),
    "output is a file": ((*GOOD, "-o", "plan.json"), "is a file, a folder is expected"),
    "output is no model": ((*GOOD, "-o", "photos", "--overwrite"), "holds something that is no model"),
    "output is the model": (
        ("compress", "model", "--data", "stdlib:source", "--keep", ".6", "-o", "./model", "--overwrite"),
        "what the result is made from",
    ),
    "no parent": ((*GOOD, "-o", "a/b/c"), "does not exist; make it first"),
    "plan file exists": (
        ("plan", "m", "--moments", "moments.safetensors", "--keep", ".6", "-o", "plan.json"),
        "plan.json exists; give --overwrite",
    ),
    "plan file is a folder": (
        ("plan", "m", "--moments", "moments.safetensors", "--keep", ".6", "-o", "model"),
        "is a folder, a file is expected",
    ),
    "keep is no number": (("compress", "m", "--keep", "half", "-o", "x"), "--keep: expected a valid number"),
    "keep in per cent": (("compress", "m", "--keep", "60", "-o", "x"), "For 60 % write 0.6."),
    "keep is nothing": (("compress", "m", "--keep", "0", "-o", "x"), "--keep: expected greater than 0"),
    "bytes without sense": (
        ("compress", "m", "--max-bytes", "40QB", "-o", "x"),
        "--max-bytes: expected bytes",
    ),
    "no samples": ((*GOOD, "--samples", "0"), "--samples: expected greater than or equal to 1"),
    "half a sample": ((*GOOD, "--samples", "1.5"), "--samples: expected a valid integer"),
    "gradient typo": ((*GOOD, "--gradients", "ful"), "Did you mean 'full'?"),
    "allocation typo": ((*GOOD, "--allocation", "globl"), "Did you mean 'global'?"),
    "form typo": ((*GOOD, "--form", "pivotted"), "--form: unknown value 'pivotted'. Did you mean 'pivoted'?"),
    "option without =": ((*GOOD, "--option", "rho"), "--option: expected name=value"),
    "set without =": ((*GOOD, "--set", "rho"), "--set: expected name=value"),
    "set typo": ((*GOOD, "--set", "budget.kep=.5"), "unknown key of budget 'kep'. Did you mean 'keep'?"),
    "set group typo": ((*GOOD, "--set", "bugdet.keep=.5"), "unknown key 'bugdet'. Did you mean 'budget'?"),
    "set bad value": ((*GOOD, "--set", "data.samples=few"), "--set data.samples: expected a valid integer"),
    "recipe typo": (
        (*GOOD, "--recipe", "recipe.yaml"),
        "recipe.yaml: unknown key of budget 'kep'. Did you mean 'keep'?",
    ),
    "recipe missing": ((*GOOD, "--recipe", "no.yaml"), "there is no file no.yaml"),
    "recipe is a list": ((*GOOD, "--recipe", "list.yaml"), "expected list.yaml to hold groups"),
    "recipe broken": ((*GOOD, "--recipe", "broken.yaml"), "broken.yaml is not YAML"),
    "recipe binary": ((*GOOD, "--recipe", "binary.yaml"), "binary.yaml"),
    "recipe scalar for group": (
        (*GOOD, "--set", "run=3"),
        "expected a group with some of the keys dtype, device",
    ),
    "unknown option": ((*GOOD, "--keeep", ".5"), "--keep"),
    "unknown command": (("compres", "m"), "compress"),
    "export target": (("export", "model", "--to", "dens", "-o", "x"), "Did you mean 'dense'?"),
    "export from nowhere": (("export", "none", "--to", "dense", "-o", "x"), "there is no folder none"),
    "export onto itself": (("export", "model", "--to", "dense", "-o", "model"), "made from"),
    "native from nowhere": (("export", "none", "--to", "native", "-o", "x"), "there is no folder none"),
    "onnx from a file": (("export", "plan.json", "--to", "onnx", "-o", "x"), "there is no folder plan.json"),
    "onnx onto something": (("export", "model", "--to", "onnx", "-o", "photos", "--overwrite"), "that is no model"),
    "native onto a file": (("export", "model", "--to", "native", "-o", "plan.json"), "a folder is expected"),
    "onnx typo": (("export", "model", "--to", "onx", "-o", "x"), "Did you mean 'onnx'?"),
    "opset of another target": (
        ("export", "model", "--to", "native", "-o", "x", "--opset", "20", "--tolerance", "1"),
        "--opset, --tolerance: only for --to onnx",
    ),
    "opset is no number": (("export", "model", "--to", "onnx", "-o", "x", "--opset", "new"), "--opset"),
    "quantise typo": (
        ("export", "model", "--to", "onnx", "-o", "x", "--quantise", "int4"),
        "unknown quantisation 'int4'. Did you mean 'int8'?",
    ),
    "tolerance of nothing": (
        ("export", "model", "--to", "onnx", "-o", "x", "--tolerance", "0"),
        "--tolerance: a relative difference above 0",
    ),
    "export without output": (("export", "model", "--to", "dense"), "--output"),
    "evaluate alone": (("evaluate", "m"), "--against is missing"),
    "demo keep": (("demo", "--keep", "60"), "For 60 % write 0.6."),
    "schema of nothing": (("schema", "plam"), "Did you mean 'plan'?"),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_use(run, verbs, place, case):
    arguments, words = CASES[case]
    ran = run(*arguments)
    assert ran.code == 2, ran
    assert words in " ".join(ran.err.split())
    assert ran.out == ""
    assert verbs.calls == []


def test_all_problems_are_reported_at_once(run, verbs, place):
    ran = run("compress", "--keep", ".5", "--max-loss", "1", "--moments", "no", "--data", "no.txt", "-o", "model")
    assert "6 problems" in ran.err
    for words in ("MODEL", "2 are given", "no.txt", "exclude each other", "--overwrite", "no does not exist"):
        assert words in ran.err
    ran = run("compress", "m", "--keep", "half", "--samples", "x", "--set", "a=1")
    assert "3 problems" in ran.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_not_writable(run, verbs, place):
    (place / "closed").mkdir(mode=0o555)
    ran = run(*GOOD, "-o", place / "closed" / "x")
    assert ran.code == 2
    assert "not writable" in ran.err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--help",), 0),
        (("compress", "--help"), 0),
        (("--version",), 0),
        (("schema",), 0),
        (CASES["no budget"][0], 2),
        (CASES["recipe typo"][0], 2),
        (CASES["no statistics"][0], 2),
    ],
    ids=str,
)
def test_no_torch_before_there_is_work(place, arguments, code):
    program = (
        "import sys\nfrom eckart.cli import main\n"
        "try:\n    main()\nexcept SystemExit as leave:\n"
        "    heavy = {'torch', 'transformers', 'numpy', 'scipy'} & set(sys.modules)\n"
        "    sys.exit(f'{heavy} imported' if heavy else leave.code)"
    )
    ran = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert ran.returncode == code, ran.stderr


def test_python_dash_m(place):
    ran = subprocess.run([sys.executable, "-m", "eckart", "--version"], capture_output=True, text=True)
    assert ran.returncode == 0
    assert ran.stdout.startswith("eckart ")


COMMANDS = (
    *("calibrate", "plan", "compress", "compensate", "evaluate", "export", "methods", "claims", "doctor", "demo"),
    *("schema", "inspect", "dimension", "prune"),
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run, command):
    ran = run(command, "--help")
    assert ran.code == 0
    assert "Usage: eckart " + command in ran.out
    assert command in run("--help").out
    if command != "schema":
        assert "--json" in ran.out
        assert "--quiet" in ran.out
        assert "JSON: " in ran.out
