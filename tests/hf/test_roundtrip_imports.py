"""What happens in a fresh interpreter: with Eckart, in either order of imports, and without it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from factored_tiny_models import build, factor, factor_experts, output
from safetensors.torch import save_file

import eckart  # noqa: F401
from eckart.hf.registry import prepare_for_saving
from fresh_python import TRANSFORMERS, run


def start(code: str) -> subprocess.CompletedProcess[str]:
    """In a Python of its own, from its start."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_import_eckart_touches_neither_torch_nor_transformers():
    done = start("import eckart, sys; assert not {'torch', 'transformers', 'scipy', 'numpy'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


def test_lazy_names():
    done = start(
        "import eckart, sys\n"
        "assert set(eckart.__all__) <= set(dir(eckart))\n"
        "assert 'torch' not in sys.modules\n"
        "try: eckart.nothing\n"
        "except AttributeError as e: assert 'nothing' in str(e)\n"
        "else: raise SystemExit(1)"
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    model = build("llama")
    factor(model)
    prepare_for_saving(model)
    model.save_pretrained(path)
    save_file({"logits": output(model)}, path / "expected.bin")
    return path


@pytest.mark.parametrize(
    "imports",
    [
        "import eckart, transformers as tf",
        "import transformers as tf, eckart",
        "import transformers as tf; tf.LlamaForCausalLM; import eckart",
        "import eckart; from transformers import AutoModelForCausalLM; import transformers as tf",
        "import eckart.hf.quantizer, transformers as tf",
        "import eckart.hf.registry, transformers as tf; import eckart; eckart.hf.registry.register()",
        "import importlib, eckart, transformers as tf; importlib.reload(eckart)",
    ],
)
def test_both_orders_of_import(folder, imports):
    begin = start if imports == "import transformers as tf, eckart" else run
    done = begin(
        f"{imports}\n"
        "import torch\n"
        "from safetensors.torch import load_file\n"
        f"model = tf.AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        f"want = load_file({str(folder / 'expected.bin')!r})['logits']\n"
        "ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(5))\n"
        "with torch.no_grad(): assert torch.equal(model(ids).logits, want)\n"
    )
    assert done.returncode == 0, done.stderr


def load_without_eckart(path, cls="AutoModelForCausalLM"):
    return run(
        "import sys; sys.modules['eckart'] = None\n"
        "import transformers as tf\n"
        f"tf.{cls}.from_pretrained({str(path)!r})\n"
        "print('LOADED')",
        loaded=TRANSFORMERS,
    )


@pytest.mark.parametrize("cls", ["AutoModelForCausalLM", "AutoModel", "AutoModelForSequenceClassification"])
def test_without_eckart_loading_fails(folder, cls):
    done = load_without_eckart(folder, cls)
    assert done.returncode != 0
    assert "LOADED" not in done.stdout
    assert "mismatch" in done.stderr.lower()


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "bert", "t5", "vit", "mixtral"])
def test_without_eckart_loading_fails_for_every_family(name, tmp_path):
    model = build(name)
    factor(model)
    prepare_for_saving(model)
    model.save_pretrained(tmp_path)
    done = load_without_eckart(tmp_path, type(model).__name__)
    assert "LOADED" not in done.stdout
    assert "mismatch" in done.stderr.lower()


def test_without_eckart_factored_experts_alone_fail(tmp_path):
    model = build("mixtral")
    factor_experts(model, "model.layers.1.mlp.experts.gate_up_proj", 3, "lowrank")
    prepare_for_saving(model)
    model.save_pretrained(tmp_path)
    done = load_without_eckart(tmp_path)
    assert "LOADED" not in done.stdout
    assert "mismatch" in done.stderr.lower()
