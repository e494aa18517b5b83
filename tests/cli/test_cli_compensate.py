"""``eckart compensate``: what it passes on, what it refuses, and one run from folder to folder."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch

import eckart
from eckart.arch import find_sites, get_module

CONTENT = {
    "damaged": "m",
    "rank": 8,
    "parameters": 100,
    "stored": 120,
    "repaired": 1000,
    "method": "kfac",
    "inputs": "base",
    "seconds": 1.5,
    "loss_before": 0.2,
    "loss_after": 0.05,
    "notes": ["the table stays as it is"],
    "layers": [{"name": "layers.0.q", "rank": 8, "before": 0.2, "after": 0.05, "captured": 0.75}],
}


@pytest.fixture
def asked(monkeypatch):
    """What the verb was called with; its result writes a folder."""
    calls: list[dict] = []

    def save(folder, **how):
        calls[-1]["save"] = how
        folder.mkdir(exist_ok=True)
        (folder / "eckart.json").write_text("{}")

    def fake(damaged, base, **keywords):
        keywords.pop("progress")("stage", 1, 2)
        calls.append({"models": (damaged, base), **keywords})
        return SimpleNamespace(save=save, to_json=lambda: CONTENT)

    monkeypatch.setitem(vars(eckart), "compensate", fake)
    return calls


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("small", "base"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "moments.safetensors").write_text("")
    return tmp_path


def test_what_was_typed_is_passed_on_and_nothing_else(run, asked, place):
    ran = run("compensate", "small", "--against", "base", "--data", "stdlib:source", "-o", "repair")
    assert ran.code == 0, ran.err
    call = asked[0]
    command = call["save"].pop("command")
    assert command == "eckart compensate small --against base --data stdlib:source -o repair"
    assert call == {"models": ("small", "base"), "data": "stdlib:source", "save": {"overwrite": False}}
    for words in ("layers.0.q", "0.750", "the table stays as it is", "saved to repair"):
        assert words in ran.out


def test_every_option_reaches_the_verb(run, asked, place):
    (place / "repair").mkdir()
    (place / "repair" / "eckart.json").write_text("{}")
    ran = run(
        *("compensate", "small", "--against", "base", "--moments", "moments.safetensors", "-o", "repair"),
        *("--method", "kfac", "--option", "gradient_shrinkage=0.25", "--rank", "16", "--share", "0.1"),
        *("--inputs", "base", "--seed", "3", "--dtype", "bfloat16", "--device", "cpu", "--overwrite"),
    )
    assert ran.code == 0, ran.err
    assert asked[0].pop("save")["overwrite"] is True
    assert asked[0] == {
        "models": ("small", "base"),
        "moments": "moments.safetensors",
        "method": "kfac",
        "options": {"gradient_shrinkage": 0.25},
        "rank": 16,
        "share": 0.1,
        "inputs": "base",
        "seed": 3,
        "dtype": "bfloat16",
        "device": "cpu",
    }


def test_json_is_all_there_is_on_stdout(run, asked, place):
    ran = run("compensate", "small", "--against", "base", "--data", "stdlib:source", "-o", "repair", "--json", "-q")
    assert json.loads(ran.out) == {"folder": "repair", "compensation": CONTENT}
    assert ran.err == ""


GOOD = ("compensate", "small", "--against", "base", "--data", "stdlib:source")
CASES = {
    "no model": (("compensate", "--against", "base", "--data", "stdlib:source", "-o", "x"), "MODEL is missing"),
    "no base": (("compensate", "small", "--data", "stdlib:source", "-o", "x"), "--against is missing"),
    "one folder twice": (
        ("compensate", "small", "--against", "./small", "--data", "stdlib:source", "-o", "x"),
        "there is nothing to repair",
    ),
    "no data": (("compensate", "small", "--against", "base", "-o", "x"), "--data or --moments is missing"),
    "data and moments": ((*GOOD, "--moments", "moments.safetensors", "-o", "x"), "exclude each other"),
    "no such data": (("compensate", "small", "--against", "base", "--data", "no.txt", "-o", "x"), "no file no.txt"),
    "no such moments": (
        ("compensate", "small", "--against", "base", "--moments", "no.safetensors", "-o", "x"),
        "--moments: no.safetensors does not exist",
    ),
    "no output": (GOOD, "-o is missing"),
    "output is the damaged model": ((*GOOD, "-o", "small", "--overwrite"), "what the result is made from"),
    "output is the base": ((*GOOD, "-o", "base", "--overwrite"), "what the result is made from"),
    "rank of nothing": ((*GOOD, "-o", "x", "--rank", "0"), "--rank: expected greater than or equal to 1"),
    "share above one": ((*GOOD, "-o", "x", "--share", "60"), "--share: expected less than or equal to 1"),
    "strange inputs": ((*GOOD, "-o", "x", "--inputs", "mine"), "--inputs: unknown value 'mine'"),
}


@pytest.mark.parametrize(("arguments", "message"), CASES.values(), ids=CASES)
def test_wrong_use_is_refused_before_any_work(run, asked, place, arguments, message):
    ran = run(*arguments)
    assert ran.code == 2
    assert message in ran.err
    assert not asked
    assert not (place / "x").exists()


def test_svd_goes_without_data(run, asked, place):
    ran = run("compensate", "small", "--against", "base", "--method", "svd", "-o", "repair")
    assert ran.code == 0, ran.err


def test_from_folder_to_folder(run, tmp_path):
    tf = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=61, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=24
    )
    base = tf.LlamaForCausalLM(config).eval()
    damaged = copy.deepcopy(base)
    for site in find_sites(damaged):
        weight = get_module(damaged, site.name).weight.data
        weight.copy_((weight * 50).round() / 50)
    base.save_pretrained(tmp_path / "base")
    damaged.save_pretrained(tmp_path / "damaged")
    arguments = ("compensate", tmp_path / "damaged", "--against", tmp_path / "base", "--method", "svd", "--json", "-q")
    ran = run(*arguments, "--rank", 16, "-o", tmp_path / "repair")
    assert ran.code == 0, ran.err
    content = json.loads(ran.out)["compensation"]
    assert content["rank"] == 16
    assert all(layer["captured"] > 0.99 for layer in content["layers"])
    assert json.loads((tmp_path / "repair" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "damaged"
    )
    model = peft.PeftModel.from_pretrained(damaged, tmp_path / "repair")
    ids = torch.arange(3, 20).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, base(input_ids=ids).logits, rtol=1e-3, atol=1e-4)
    ran = run(*arguments, "--rank", 17, "-o", tmp_path / "other")
    assert ran.code == 2
    assert "rank is at most 16" in ran.err
    assert not (tmp_path / "other").exists()
    ran = run(
        "compensate", tmp_path / "damaged", "--against", tmp_path / "gone", "--method", "svd", "-o", tmp_path / "x"
    )
    assert ran.code == 1
    assert "there is no folder" in ran.err
