"""What a damaged model lost comes back as a LoRA that stock PEFT loads."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import eckart
from eckart.arch import find_sites, get_module
from eckart.checkpoint import Manifest, inspect_folder
from eckart.errors import BudgetError, FileError, InputError, MismatchError
from eckart.linalg import round_groups
from fresh_python import TRANSFORMERS, run

tf = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

IDS = torch.randint(3, 61, (16, 12), generator=torch.Generator().manual_seed(5))
DATA = [{"input_ids": rows} for rows in IDS.split(4)]
TEXT = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}


def llama(seed: int = 0, **extra) -> nn.Module:
    torch.manual_seed(seed)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, num_key_value_heads=2, initializer_range=0.2, **extra)).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = tf.GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=4, n_positions=40, initializer_range=0.2)
    return tf.GPT2LMHeadModel(config).eval()


def rounded(base: nn.Module, bits: int = 3) -> nn.Module:
    model = copy.deepcopy(base)
    for site in find_sites(model):
        weight = get_module(model, site.name).weight.data
        weight.copy_(round_groups(weight, bits=bits).dense())
    return model


def pruned(base: nn.Module) -> nn.Module:
    model = copy.deepcopy(base)
    for site in find_sites(model):
        weight = get_module(model, site.name).weight.data
        weight[weight.abs() < weight.abs().median()] = 0
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def inputs(model: nn.Module, name: str) -> torch.Tensor:
    """(tokens, in): what a map reads, in float64."""
    seen = []
    hook = get_module(model, name).register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    for batch in DATA:
        with torch.no_grad():
            model(**batch)
    hook.remove()
    return torch.cat(seen).double()


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return llama()


@pytest.fixture(scope="module")
def damaged(base) -> nn.Module:
    return rounded(base)


@pytest.fixture(scope="module")
def found(base, damaged):
    return eckart.compensate(damaged, base, data=DATA, rank=4)


# ---- the repair


def test_errors_fall_at_every_map_and_so_does_the_distance_of_the_outputs(base, damaged, found):
    outcome = found.outcome
    assert [layer.site.name for layer in outcome.layers] == [site.name for site in find_sites(base)]
    for layer in outcome.layers:
        assert 0 < layer.after < layer.before < 1
        assert layer.captured == pytest.approx(1 - layer.after / layer.before)
        assert layer.rank == 4
    assert 0 < outcome.loss_after < outcome.loss_before
    assert outcome.parameters == outcome.stored == sum(4 * (s.out_features + s.in_features) for s in find_sites(base))
    want = logits(base)
    assert (logits(found.repaired().model) - want).norm() < 0.8 * (logits(damaged) - want).norm()


def test_errors_are_those_measured_on_the_inputs(base, damaged):
    found = eckart.compensate(damaged, base, data=DATA, rank=4, method="eora")
    for layer in found.outcome.layers:
        name = layer.site.name
        X, W = inputs(base, name), get_module(base, name).weight.detach().double()
        lost = W - get_module(damaged, name).weight.detach().double()
        size = (X @ W.T).square().sum()
        assert layer.before == pytest.approx(float((X @ lost.T).square().sum() / size), rel=1e-6)
        left = lost - found.forms[name].dense().double()
        assert layer.after == pytest.approx(float((X @ left.T).square().sum() / size), rel=1e-5)
        assert layer.loss_before is None
    assert found.outcome.loss_before is None


def test_the_damaged_model_and_the_base_are_left_as_they_were(base):
    mine, bad = copy.deepcopy(base), rounded(base)
    before = {name: tensor.clone() for name, tensor in bad.state_dict().items()}
    eckart.compensate(bad, mine, data=DATA, rank=2).repaired()
    assert all(torch.equal(tensor, before[name]) for name, tensor in bad.state_dict().items())
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in mine.state_dict().items())


def test_full_rank_gives_the_base_back(base, damaged):
    found = eckart.compensate(damaged, base, data=DATA, rank=16)
    torch.testing.assert_close(logits(found.repaired().model), logits(base), rtol=1e-3, atol=1e-3)
    assert {form.rank for form in found.forms.values()} == {8, 16}  # keys and values have 8 outputs


def test_moments_of_a_file_serve_too(base, damaged, found, tmp_path):
    moments = eckart.calibrate(base, DATA)
    moments.save(tmp_path / "m.safetensors")
    again = eckart.compensate(damaged, base, moments=str(tmp_path / "m.safetensors"), rank=4)
    for name, form in again.forms.items():
        torch.testing.assert_close(form.dense(), found.forms[name].dense())


def test_without_data_plain_svd_is_what_there_is(base, damaged):
    found = eckart.compensate(damaged, base, method="svd", rank=4)
    name = "model.layers.0.mlp.up_proj"
    lost = (get_module(base, name).weight - get_module(damaged, name).weight).detach().double()
    U, S, Vh = torch.linalg.svd(lost, full_matrices=False)
    torch.testing.assert_close(found.forms[name].dense(), (U[:, :4] * S[:4] @ Vh[:4]).float())
    assert found.calibration == {}


def test_one_budget_for_all_maps(base, damaged):
    even = eckart.compensate(damaged, base, data=DATA, rank=3).outcome
    found = eckart.compensate(damaged, base, data=DATA, share=(even.parameters + 0.5) / even.repaired, rank=8)
    outcome = found.outcome
    ranks = [layer.rank for layer in outcome.layers]
    assert outcome.parameters <= even.parameters
    assert len(set(ranks)) > 2
    assert outcome.rank == max(ranks) <= 8
    stored = [outcome.rank * (s.out_features + s.in_features) for s in find_sites(base) if s.name in found.forms]
    assert outcome.stored == sum(stored) > outcome.parameters
    assert outcome.loss_after < even.loss_after
    with pytest.raises(BudgetError, match="larger share"):
        eckart.compensate(damaged, base, data=DATA, share=1e-4)


def test_inputs_of_the_damaged_model(base, damaged):
    found = eckart.compensate(damaged, base, data=DATA, rank=4, method="eora", inputs="damaged")
    name = "model.layers.1.mlp.down_proj"
    X = inputs(damaged, name)
    lost = (get_module(base, name).weight - get_module(damaged, name).weight).detach().double()
    U = torch.linalg.eigh(lost @ X.T @ X @ lost.T).eigenvectors
    naive = U[:, -4:] @ U[:, -4:].T @ lost
    torch.testing.assert_close(found.forms[name].dense().double(), naive, rtol=1e-4, atol=1e-5)
    assert found.outcome.inputs == "damaged"


def test_a_changed_bias_is_part_of_what_is_repaired():
    """Eckart's own methods move the mean of what was lost into the bias; a repair must not add it twice."""
    base = gpt2()
    small = eckart.compress(base, data=DATA, keep=0.5, forms=["dense", "lowrank"]).model
    found = eckart.compensate(small, base, data=DATA, method="eora", rank=16)
    name = "transformer.h.0.mlp.c_proj"
    layer, dense = get_module(small, name), get_module(base, name)
    assert not torch.equal(layer.bias, dense.bias)
    X = inputs(base, name)
    target = (X @ (dense.weight.double() - layer.dense().T.double()) - (layer.bias - dense.bias).double()).detach()
    best = torch.linalg.lstsq(X, target).solution
    ours = found.forms[name].dense().T.double()
    floor = (X @ best - target).square().sum()
    assert (X @ ours - target).square().sum() <= 1.001 * floor
    plain = (dense.weight.double() - layer.dense().T.double()).detach()  # the difference of the weights alone
    assert (X @ plain - target).square().sum() > 2 * floor
    row = next(row for row in found.outcome.layers if row.site.name == name)
    size = (X @ dense.weight.detach().double()).square().sum()
    assert row.after == pytest.approx(float((X @ ours - target).square().sum() / size), rel=1e-4)
    assert row.before == pytest.approx(float(target.square().sum() / size), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(base, dtype):
    mine = copy.deepcopy(base).to(dtype)
    found = eckart.compensate(rounded(mine), mine, method="svd", rank=4)
    assert {form.a.dtype for form in found.forms.values()} == {dtype}
    assert all(layer.after < layer.before for layer in found.outcome.layers)


# ---- the files


def test_stock_peft_loads_the_folder_without_a_difference(damaged, found, tmp_path):
    folder = found.save(tmp_path / "lora", command="eckart compensate …")
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "eckart.json",
    ]  # fmt: skip
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(damaged), folder)
    assert torch.equal(logits(loaded), logits(found.repaired().model))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["bias"], config["task_type"]) == (4, 4, "none", "CAUSAL_LM")
    assert config["target_modules"] == sorted(found.forms)
    manifest = Manifest.read(folder)
    assert manifest.command == "eckart compensate …"
    assert manifest.outcome["compensation"] == json.loads(json.dumps(found.to_json()))
    assert (folder / "adapter_model.safetensors").stat().st_mode & 0o077 == (
        folder / "README.md"
    ).stat().st_mode & 0o077


def test_ranks_are_filled_up_with_zeros(base, damaged, tmp_path):
    found = eckart.compensate(damaged, base, data=DATA, share=0.2, rank=8)
    assert len({form.rank for form in found.forms.values()}) > 1
    found.save(tmp_path / "lora")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(damaged), tmp_path / "lora")
    for name, form in found.forms.items():
        layer = get_module(loaded.base_model.model, name)
        assert layer.lora_A["default"].weight.shape[0] == found.outcome.rank
        assert layer.scaling["default"] == 1
        torch.testing.assert_close(layer.get_delta_weight("default"), form.dense())
    untouched = {site.name for site in find_sites(base)} - set(found.forms)
    assert all(isinstance(get_module(loaded.base_model.model, name), nn.Linear) for name in untouched)


def test_the_same_repair_writes_the_same_bytes(found, tmp_path):
    one, two = found.save(tmp_path / "a"), found.save(tmp_path / "b")
    for name in ("adapter_config.json", "adapter_model.safetensors", "eckart.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_a_folder_is_not_replaced_by_accident(found, tmp_path):
    found.save(tmp_path / "lora")
    with pytest.raises(FileError, match="overwrite"):
        found.save(tmp_path / "lora")
    found.save(tmp_path / "lora", overwrite=True)


PLAIN = """
import sys
sys.modules["eckart"] = None
import torch, transformers as tf
from peft import PeftModel
from safetensors.torch import load_file
ids = torch.randint(3, 61, (16, 12), generator=torch.Generator().manual_seed(5))
for name in ("masked", "conv1d", "torchao"):
    model = tf.AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{name}")
    if name == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
        quantize_(model, Int8WeightOnlyConfig())
    model = PeftModel.from_pretrained(model, f"{sys.argv[1]}/{name}-lora")
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, load_file(f"{sys.argv[1]}/{name}.safetensors")["logits"]), name
print("ALL EQUAL")
"""


def test_without_eckart_nothing_differs(base, tmp_path):
    """Masked weights, transformers' Conv1D and torchao's integers, in a process that cannot import Eckart."""
    torchao = pytest.importorskip("torchao.quantization")
    save = pytest.importorskip("safetensors.torch").save_file
    integers = copy.deepcopy(base)
    torchao.quantize_(integers, torchao.Int8WeightOnlyConfig())
    cases = {
        "masked": (pruned(base), base, None),
        "conv1d": (rounded(gpt2()), gpt2(), None),
        "torchao": (integers, base, base),
    }
    for name, (bad, good, files) in cases.items():
        (files or bad).save_pretrained(tmp_path / name)
        found = eckart.compensate(bad, good, data=DATA, rank=3)
        found.save(tmp_path / f"{name}-lora")
        save({"logits": logits(found.repaired().model).contiguous()}, tmp_path / f"{name}.safetensors")
    ran = run(PLAIN, tmp_path, loaded=TRANSFORMERS)
    assert "ALL EQUAL" in ran.stdout, ran.stderr[-3000:]


FACTORED = """
import sys
{imports}
import torch, transformers as tf
from peft import PeftModel
from safetensors.torch import load_file
ids = torch.randint(3, 61, (16, 12), generator=torch.Generator().manual_seed(5))
model = PeftModel.from_pretrained(tf.AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[1] + "-lora")
with torch.no_grad():
    assert torch.equal(model(input_ids=ids).logits, load_file(sys.argv[1] + ".safetensors")["logits"])
print("EQUAL")
"""


def test_factored_layers_after_import_eckart_in_either_order(base, tmp_path):
    save = pytest.importorskip("safetensors.torch").save_file
    made = eckart.compress(base, data=DATA, keep=0.6, forms=["lowrank", "pivoted"], certify=False)
    eckart.save(made, tmp_path / "small")
    found = eckart.compensate(tmp_path / "small", base, data=DATA, rank=3)
    found.save(tmp_path / "small-lora")
    save({"logits": logits(found.repaired().model).contiguous()}, tmp_path / "small.safetensors")
    want = logits(base)
    assert (logits(found.repaired().model) - want).norm() < (logits(made.model) - want).norm()
    for imports in ("import eckart", "import peft, eckart"):
        code = FACTORED.format(imports=imports)
        ran = run(code, tmp_path / "small")
        assert "EQUAL" in ran.stdout, ran.stderr[-3000:]
    assert inspect_folder(tmp_path / "small").kind == "eckart"


# ---- what is refused


def test_wrong_options_are_reported_together(base, damaged):
    with pytest.raises(InputError) as caught:
        eckart.compensate(damaged, base, method="eora", rank=0, share=2.0, inputs="mine")
    message = str(caught.value)
    for part in ("rank counts directions", "(0, 1]", "in units of the loss", "'base' or 'damaged'", "needs data"):
        assert part in message
    moments = eckart.calibrate(base, DATA)
    with pytest.raises(InputError, match="exclude each other"):
        eckart.compensate(damaged, base, data=DATA, moments=moments)
    with pytest.raises(InputError, match="own inputs need data"):
        eckart.compensate(damaged, base, moments=moments, inputs="damaged")
    with pytest.raises(InputError, match="unknown compensation method"):
        eckart.compensate(damaged, base, method="eorra")
    with pytest.raises(InputError, match="bogus"):
        eckart.compensate(damaged, base, data=DATA, options={"bogus": 1})
    with pytest.raises(InputError, match="rank is at most 16"):
        eckart.compensate(damaged, base, data=DATA, rank=17)


def test_nothing_to_repair(base):
    with pytest.raises(InputError, match="nothing to repair"):
        eckart.compensate(copy.deepcopy(base), base, data=DATA)


def test_another_base_is_refused(base, damaged, tmp_path):
    with pytest.raises(MismatchError, match="further from the base's"):
        eckart.compensate(damaged, llama(seed=1), data=DATA)
    made = eckart.compress(base, data=DATA, keep=0.6, certify=False)
    eckart.save(made, tmp_path / "small")
    with pytest.raises(MismatchError, match="was made from LlamaForCausalLM"):
        eckart.compensate(tmp_path / "small", llama(seed=1), data=DATA)


def test_moments_of_another_model_are_refused(base, damaged):
    with pytest.raises(MismatchError, match="these moments were collected on"):
        eckart.compensate(damaged, base, moments=eckart.calibrate(llama(seed=1), DATA))


def test_moments_without_the_head_are_refused_where_the_head_is_damaged(base):
    bad = rounded(base)
    bad.lm_head.weight.data.copy_(round_groups(base.lm_head.weight.data, bits=3).dense())
    with pytest.raises(InputError, match="head=True"):
        eckart.compensate(bad, base, moments=eckart.calibrate(base, DATA), rank=2)
    found = eckart.compensate(bad, base, moments=eckart.calibrate(base, DATA, head=True), rank=2)
    assert "lm_head" in found.forms
