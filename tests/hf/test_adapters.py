"""Every method × dtype × kind of layer inside PEFT: what is saved comes back, and the base is never changed."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_tiny_models import KINDS, LANGUAGE, build, inputs, outputs, targets
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM, TorchAoConfig

import eckart
from eckart.adaptation import ADAPTATIONS, Layout, adapt_options
from eckart.arch import find_sites, fingerprint
from eckart.checkpoint.spectral_cache import SpectralCache
from eckart.errors import EckartError, EckartWarning, InputError, NotFiniteError
from eckart.hf.adapters.layers import AdapterLayer, layout_of
from eckart.hf.adapters.tuner import adapter_layers, after_step, penalty
from eckart.layers.quantised import QuantisedLinear
from eckart.linalg import round_groups
from eckart.moments import Moments, collect
from eckart.records import Budget
from fresh_python import TRANSFORMERS, run

HERE = Path(__file__).parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RANK = 2
SETTINGS: dict[str, dict[str, Any]] = {"salt": {"rest": 2}}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*has no plain-LoRA copy.*"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*"),
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*"),
    pytest.mark.filterwarnings("ignore:.*Could not.*"),
]


def served(name: str, kind: str) -> bool:
    method = ADAPTATIONS[name]
    if method.needs and kind not in LANGUAGE:
        return False
    options = adapt_options(method, SETTINGS.get(name))
    base = build(kind)
    layer: Any = {"table": "table", "linear": "lm_head", "conv1d": "lm_head"}.get(kind, "middle")
    layout: Layout = layout_of(layer, base.get_submodule(layer))
    return method.delta.fits(layout, options) is None


CASES = [(name, kind) for name in ADAPTATIONS for kind in KINDS if served(name, kind)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for kind in LANGUAGE:
        for name, dtype in DTYPES.items():
            build(kind).to(dtype).save_pretrained(folder / f"{kind}-{name}")
    return folder


def load(kind: str, dtype: torch.dtype, bases: Path) -> nn.Module:
    if kind in LANGUAGE:
        name = next(name for name, known in DTYPES.items() if known is dtype)
        model = build(kind)
        return type(model).from_pretrained(bases / f"{kind}-{name}", dtype=dtype).eval()  # type: ignore[attr-defined]
    return build(kind).to(dtype)


def moments_of(model: nn.Module) -> Moments:
    batches = [{"input_ids": torch.randint(0, 50, (8, 12), generator=torch.Generator().manual_seed(i))} for i in (0, 1)]
    return collect(model, batches, find_sites(model), gradients="none")


def config_of(method: str, kind: str, model: nn.Module, **more: Any) -> Any:
    if ADAPTATIONS[method].needs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EckartWarning)
            more["moments"] = moments_of(model)
    settings = {
        "r": RANK,
        "target_modules": targets(kind),
        "options": SETTINGS.get(method, {}),
        "task_type": "CAUSAL_LM" if kind in LANGUAGE else None,
    }
    return eckart.AdapterConfig(method=method, **(settings | more))


def train(model: nn.Module, kind: str, dtype: torch.dtype, steps: int = 3) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    for step in range(steps):
        optimizer.zero_grad()
        found = model(inputs(kind, dtype))
        loss = (found.logits if kind in LANGUAGE else found).float().square().mean() + penalty(model)
        torch.autograd.backward(loss)
        optimizer.step()
        after_step(model, step + 1)
    model.eval()


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def exportable(method: str, kind: str) -> bool:
    """PEFT's LoRA drops dilations and padding modes, so those layers have no plain copy."""
    return ADAPTATIONS[method].exact and kind not in ("dilated", "circular", "conv1")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
@pytest.mark.parametrize(("method", "kind"), CASES)
def test_saved_loaded_disabled_merged(method: str, kind: str, dtype: torch.dtype, bases: Path, tmp_path: Path) -> None:
    base = load(kind, dtype, bases)
    before = outputs(base, kind, dtype)
    weights = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = get_peft_model(base, config_of(method, kind, base))
    assert off(outputs(model, kind, dtype), before) == 0  # nothing has changed yet
    train(model, kind, dtype)
    trained = outputs(model, kind, dtype)
    assert off(trained, before) > 1e-4
    with model.disable_adapter():
        assert off(outputs(model, kind, dtype), before) == 0

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EckartWarning)
        model.save_pretrained(str(tmp_path))
    assert "default" not in " ".join(load_file(tmp_path / "adapter_model.safetensors"))
    torch.manual_seed(99)
    loaders = {
        "plain": lambda: PeftModel.from_pretrained(load(kind, dtype, bases), str(tmp_path)),
        "name": lambda: PeftModel.from_pretrained(load(kind, dtype, bases), str(tmp_path), adapter_name="x"),
        "low": lambda: PeftModel.from_pretrained(load(kind, dtype, bases), str(tmp_path), low_cpu_mem_usage=True),
    }
    if kind in LANGUAGE:
        loaders["auto"] = lambda: AutoPeftModelForCausalLM.from_pretrained(str(tmp_path), dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error", EckartWarning)  # the base is the same, and the adapter too
        for name, again in loaders.items():
            assert off(outputs(again().eval(), kind, dtype), trained) == 0, name
        if kind in LANGUAGE:
            plain = load(kind, dtype, bases)
            plain.load_adapter(str(tmp_path))  # type: ignore[operator]
            assert off(outputs(plain, kind, dtype), trained) == 0

    if not ADAPTATIONS[method].delta.linear:
        with pytest.raises(EckartError, match="not linear in its input"):
            model.merge_adapter()
        assert not (tmp_path / "lora").exists()
        bare = model.unload()
        assert all(torch.equal(weights[name], p) for name, p in bare.named_parameters())
        return
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = {
        name: layer.get_base_layer().weight.detach().float() + layer.get_delta_weight("default").detach()
        for name, layer in adapter_layers(model)
    }
    model.merge_adapter()
    for name, layer in adapter_layers(model):
        assert torch.equal(layer.get_base_layer().weight, expected[name].to(dtype))  # added in float32, rounded once
    tolerance = 1e-6 if dtype is torch.float32 else 0.03
    assert off(outputs(model, kind, dtype), trained) <= tolerance
    model.unmerge_adapter()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())

    assert (tmp_path / "lora").is_dir() is exportable(method, kind)

    merged = PeftModel.from_pretrained(load(kind, dtype, bases), str(tmp_path)).merge_and_unload()
    assert not any(isinstance(module, AdapterLayer) for module in merged.modules())
    assert off(outputs(merged, kind, dtype), trained) <= tolerance
    bare = model.unload()
    assert all(torch.equal(weights[name], p) for name, p in bare.named_parameters())


STOCK = """
import json, sys, warnings
from pathlib import Path
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
sys.path.insert(0, sys.argv[1])
from adapted_tiny_models import LANGUAGE, build, outputs
warnings.simplefilter("ignore")
found = {}
for folder in sorted(Path(sys.argv[2]).iterdir()):
    method, kind, label = folder.name.split("-")
    dtype = getattr(torch, label)
    base = build(kind).to(dtype)
    if kind in LANGUAGE:  # .to() would round the positions too
        base = type(base).from_pretrained(Path(sys.argv[3]) / f"{kind}-{label}", dtype=dtype)
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    expected = load_file(folder / "expected.safetensors")["outputs"]
    found[folder.name] = float((outputs(model, kind, dtype).double() - expected.double()).abs().max())
try:
    PeftConfig.from_pretrained(sys.argv[4])
    error = ""
except KeyError as caught:
    error = str(caught)
print(json.dumps({"eckart": "eckart" in sys.modules, "off": found, "error": error}))
"""


def test_stock_peft_loads_the_copy_without_eckart(bases: Path, tmp_path: Path) -> None:
    exports, bare = tmp_path / "exports", tmp_path / "bare"
    cases = [(m, k, label) for m, k in CASES if exportable(m, k) for label in DTYPES]
    for method, kind, label in cases:
        base = load(kind, DTYPES[label], bases)
        model = get_peft_model(base, config_of(method, kind, base))
        train(model, kind, DTYPES[label], steps=1)
        folder = tmp_path / f"{method}-{kind}-{label}"
        model.save_pretrained(str(folder))
        exports.mkdir(exist_ok=True)
        (folder / "lora").rename(exports / folder.name)
        save_file({"outputs": outputs(model, kind, DTYPES[label])}, exports / folder.name / "expected.safetensors")
    eckart.AdapterConfig(method="pissa").save_pretrained(str(bare))
    folders = [str(folder) for folder in (HERE, exports, bases, bare)]
    ran = run(STOCK, *folders, loaded=TRANSFORMERS)
    assert ran.returncode == 0, ran.stderr[-3000:]
    result = json.loads(ran.stdout.splitlines()[-1])
    assert not result["eckart"]
    assert "pip install eckart" in result["error"]
    assert len(result["off"]) == len(cases)
    # A grouped convolution is computed by PEFT without groups, over zeros: another order of additions.
    wrong = {name: value for name, value in result["off"].items() if value > (1e-5 if "grouped" in name else 0)}
    assert not wrong


@pytest.fixture
def llama(bases: Path) -> nn.Module:
    return load("linear", torch.float32, bases)


def test_several_adapters_and_deleting(llama: nn.Module) -> None:
    kind, dtype = "linear", torch.float32
    before = outputs(llama, kind, dtype)
    model = get_peft_model(llama, config_of("pissa", kind, llama))
    train(model, kind, dtype)
    first = outputs(model, kind, dtype)
    model.add_adapter("second", config_of("lora", kind, llama))
    model.set_adapter("second")
    assert off(outputs(model, kind, dtype), before) == 0
    train(model, kind, dtype)
    second = outputs(model, kind, dtype)
    model.set_adapter("default")
    assert off(outputs(model, kind, dtype), first) == 0
    model.base_model.set_adapter(["default", "second"])
    both = outputs(model, kind, dtype)
    assert min(off(both, first), off(both, second)) > 1e-4
    weights = {name: layer.get_base_layer().weight.clone() for name, layer in adapter_layers(model)}
    model.merge_adapter(["default"])
    model.merge_adapter(["second"])
    assert off(outputs(model, kind, dtype), both) <= 1e-6
    model.unmerge_adapter()
    assert all(torch.equal(weights[name], layer.get_base_layer().weight) for name, layer in adapter_layers(model))
    model.delete_adapter("second")
    model.set_adapter("default")
    assert off(outputs(model, kind, dtype), first) == 0


def test_ranks_by_pattern_and_by_budget(llama: nn.Module) -> None:
    config = config_of("lora", "linear", llama, rank_pattern={"q_proj": 5})
    model = get_peft_model(llama, config)
    ranks = {name: layer.delta("default").rank for name, layer in adapter_layers(model)}
    assert {rank for name, rank in ranks.items() if name.endswith("q_proj")} == {5}
    assert {rank for name, rank in ranks.items() if not name.endswith("q_proj")} == {RANK}
    for budget in (Budget(parameters=1500), Budget(keep=0.06), Budget(model_keep=0.04)):
        base = build("linear")
        model = get_peft_model(base, config_of("lora", "linear", base, r=8, budget=budget))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in build("linear").parameters())
        linear = sum(p.numel() for n, p in build("linear").named_parameters() if "proj" in n)
        allowed = {"parameters": 1500, "keep": 0.06 * linear, "model_keep": 0.04 * total}[budget.unit]
        assert allowed - 8 * 160 < trained <= allowed  # short of it by less than the costliest direction of each layer
        ranks = config_ranks(model)
        assert max(ranks.values()) <= 8
        assert len(set(ranks.values())) > 1


def config_ranks(model: Any) -> dict[str, int]:
    return dict(model.peft_config["default"].ranks)


def test_budget_by_activation_survives_a_round_trip(bases: Path, tmp_path: Path) -> None:
    base = load("linear", torch.float32, bases)
    model = get_peft_model(base, config_of("eva", "linear", base, r=None, budget=Budget(parameters=1200)))
    train(model, "linear", torch.float32)
    ranks = config_ranks(model)
    assert 0 in ranks.values() or len(set(ranks.values())) > 1
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(load("linear", torch.float32, bases), str(tmp_path))
    assert config_ranks(again) == ranks
    assert off(outputs(again, "linear", torch.float32), outputs(model, "linear", torch.float32)) == 0


def test_another_base_is_named_layer_by_layer(bases: Path, tmp_path: Path) -> None:
    model = get_peft_model(load("linear", torch.float32, bases), config_of("pissa", "linear", build("linear")))
    model.save_pretrained(str(tmp_path))
    other = load("linear", torch.float32, bases)
    with torch.no_grad():
        other.get_submodule("model.layers.1.mlp.up_proj").weight.mul_(1.05)  # type: ignore[operator, union-attr]
    with pytest.warns(EckartWarning, match=r"1 of 14 layers differ.*model\.layers\.1\.mlp\.up_proj"):
        PeftModel.from_pretrained(other, str(tmp_path))
    low = load("linear", torch.float32, bases).to(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error", EckartWarning)  # the same base, rounded
        PeftModel.from_pretrained(low, str(tmp_path))
    damaged = load_file(tmp_path / "adapter_model.safetensors")
    key = next(name for name in damaged if name.endswith("delta.B"))
    save_file({**damaged, key: damaged[key] + 0.1}, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.warns(EckartWarning, match="not the one that was saved: 1 of"):
        PeftModel.from_pretrained(load("linear", torch.float32, bases), str(tmp_path))


def test_settings_of_a_file_start_afresh_only_when_asked(bases: Path, tmp_path: Path) -> None:
    model = get_peft_model(load("linear", torch.float32, bases), config_of("pissa", "linear", build("linear")))
    model.save_pretrained(str(tmp_path))
    config: Any = PeftConfig.from_pretrained(str(tmp_path))
    empty = get_peft_model(load("linear", torch.float32, bases), config)
    with pytest.raises(EckartError, match=r"config\.saved = False"):
        outputs(empty, "linear", torch.float32)
    config.saved, config.inference_mode = False, False
    base = load("linear", torch.float32, bases)
    before = outputs(base, "linear", torch.float32)
    assert off(outputs(get_peft_model(base, config), "linear", torch.float32), before) == 0


def test_modules_to_save_travel_with_both_files(tmp_path: Path) -> None:
    base = build("grouped")
    model = get_peft_model(base, config_of("lora", "grouped", base, modules_to_save=["head"]))
    train(model, "grouped", torch.float32)
    model.save_pretrained(str(tmp_path))
    trained = outputs(model, "grouped", torch.float32)
    for folder, tolerance in ((tmp_path, 0.0), (tmp_path / "lora", 1e-6)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            again = PeftModel.from_pretrained(build("grouped"), str(folder)).eval()
        assert off(outputs(again, "grouped", torch.float32), trained) <= tolerance


def test_a_cache_gives_what_it_gave_before(llama: nn.Module, tmp_path: Path) -> None:
    first = get_peft_model(llama, config_of("pissa", "linear", llama, cache=tmp_path))
    files = sorted(tmp_path.iterdir())
    assert len(files) == 14
    stamps = [file.stat().st_mtime_ns for file in files]
    second = get_peft_model(build("linear"), config_of("pissa", "linear", llama, cache=SpectralCache(tmp_path)))
    assert [file.stat().st_mtime_ns for file in files] == stamps
    for (_, a), (_, b) in zip(adapter_layers(first), adapter_layers(second), strict=True):
        assert torch.equal(a.delta("default").A, b.delta("default").A)  # type: ignore[arg-type]


def test_gradient_checkpointing_and_compile(llama: nn.Module) -> None:
    model: Any = get_peft_model(llama, config_of("sorsa", "linear", llama))
    plain = [p for p in model.parameters() if p.requires_grad]
    x = inputs("linear", torch.float32)
    model.train()
    torch.autograd.backward(model(x).logits.square().mean())
    wanted = [p.grad.clone() for p in plain if p.grad is not None]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    torch.autograd.backward(model(x).logits.square().mean())
    for a, p in zip(wanted, plain, strict=True):
        torch.testing.assert_close(a, p.grad)
    model.gradient_checkpointing_disable()
    model.eval()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x).logits, model(x).logits)


def test_quantised_bases_stay_as_they_are(tmp_path: Path) -> None:
    def load() -> nn.Module:
        model: Any = build("table")
        rounded = round_groups(model.head.weight.detach(), bits=4, group=6)
        model.head = QuantisedLinear.from_linear(model.head, rounded)
        return model.eval()

    base: Any = load()
    codes = base.head.codes.clone()
    before = outputs(base, "table", torch.float32)
    model = get_peft_model(base, eckart.AdapterConfig(method="pissa", r=2))
    assert config_ranks(model) == {"head": 2}
    assert off(outputs(model, "table", torch.float32), before) == 0
    train(model, "table", torch.float32)
    trained = outputs(model, "table", torch.float32)
    model.save_pretrained(str(tmp_path))
    for folder in (tmp_path, tmp_path / "lora"):
        assert off(outputs(PeftModel.from_pretrained(load(), str(folder)), "table", torch.float32), trained) == 0
    with pytest.raises(EckartError, match="cannot be merged into a QuantisedLinear"):
        model.merge_adapter()
    with model.disable_adapter():
        assert off(outputs(model, "table", torch.float32), before) == 0
    assert torch.equal(model.unload().head.codes, codes)


@pytest.mark.parametrize("method", [name for name in ADAPTATIONS if ADAPTATIONS[name].delta.linear])
def test_an_int8_base_is_dequantised_merged_and_put_back(method: str, bases: Path, tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")

    def load() -> nn.Module:
        quantised = TorchAoConfig(torchao.Int8WeightOnlyConfig(version=2))
        return LlamaForCausalLM.from_pretrained(bases / "linear-float32", quantization_config=quantised).eval()

    kind, dtype = "linear", torch.float32
    base = load()
    before = outputs(base, kind, dtype)
    model = get_peft_model(base, config_of(method, kind, build(kind)))
    assert off(outputs(model, kind, dtype), before) == 0
    train(model, kind, dtype)
    trained = outputs(model, kind, dtype)
    model.save_pretrained(str(tmp_path))
    assert off(outputs(PeftModel.from_pretrained(load(), str(tmp_path)), kind, dtype), trained) == 0
    model.merge_adapter()
    assert 0 < off(outputs(model, kind, dtype), trained) < 0.05  # rounded to eight bits again
    model.unmerge_adapter()
    assert off(outputs(model, kind, dtype), trained) == 0
    with model.disable_adapter():
        assert off(outputs(model, kind, dtype), before) == 0
    merged = model.merge_and_unload()
    assert not any(isinstance(module, AdapterLayer) for module in merged.modules())
    assert type(merged.get_submodule("model.layers.0.mlp.up_proj").weight) is not nn.Parameter  # still of eight bits
    assert 0 < off(outputs(merged, kind, dtype), trained) < 0.05


def test_config_is_json_and_pickles(llama: nn.Module) -> None:
    config = config_of("eva", "linear", llama)
    get_peft_model(llama, config)
    json.dumps(config.to_dict())
    assert pickle.loads(pickle.dumps(config)).ranks == config.ranks


def test_settings_that_are_wrong_are_told_at_once() -> None:
    with pytest.raises(InputError) as error:
        eckart.AdapterConfig(method="pisa", r=0, dropout=1.0, spread="weights", rank_pattern={"q": 1.5})
    for part in ("'pissa'", "r counts", "dropout", "spread", "rank_pattern"):
        assert part in str(error.value)
    with pytest.raises(InputError, match="Did you mean 'gamma'"):
        eckart.AdapterConfig(method="sorsa", options={"gama": 1.0})
    base = build("linear")
    with pytest.raises(InputError, match="adapter is Budget"):
        get_peft_model(base, eckart.AdapterConfig(budget=Budget(loss=0.1)))


def test_layers_that_cannot_be_served_are_named(llama: nn.Module) -> None:
    before = {name: type(module) for name, module in llama.named_modules()}
    with pytest.raises(InputError) as error:
        get_peft_model(llama, config_of("lora", "linear", llama, r=40))
    assert "14 problems" in str(error.value)
    assert "rank 40 is above the 16 that this layer has" in str(error.value)
    with pytest.raises(InputError, match="rank_pattern 'nowhere' matches none of the 14 layers"):
        get_peft_model(llama, config_of("lora", "linear", llama, rank_pattern={"nowhere": 3}))
    with pytest.raises(InputError, match="LlamaRMSNorm is no linear layer"):
        get_peft_model(llama, config_of("lora", "linear", llama, target_modules=["norm"]))
    with pytest.raises(InputError, match=r"eckart\.calibrate"):
        get_peft_model(llama, eckart.AdapterConfig(method="eva"))
    with pytest.raises(ValueError, match="not found"):
        get_peft_model(llama, config_of("lora", "linear", llama, target_modules=["nothing"]))
    table, of_table = build("table"), {"target_modules": ["table"], "moments": moments_of(llama)}
    with pytest.raises(InputError, match="frequencies"):
        get_peft_model(table, eckart.AdapterConfig(method="eva", **of_table))
    assert {name: type(module) for name, module in llama.named_modules()} == before
    attention = nn.Sequential(nn.TransformerEncoderLayer(8, 2))
    with pytest.raises(InputError, match="MultiheadAttention reads this weight"):
        get_peft_model(attention, eckart.AdapterConfig(target_modules=["out_proj"]))


def test_a_broken_base_is_refused(llama: nn.Module) -> None:
    with torch.no_grad():
        llama.get_submodule("model.layers.0.mlp.up_proj").weight[0, 0] = torch.nan  # type: ignore[index, union-attr]
    for method in ("lora", "pissa"):
        with pytest.raises(NotFiniteError, match=r"model\.layers\.0\.mlp\.up_proj"):
            get_peft_model(llama, config_of(method, "linear", llama))


def test_registered_where_peft_came_first() -> None:
    """The other order is that of this file."""
    code = "import peft, eckart\nprint(peft.PeftType('ECKART').name)"
    ran = run(code)
    assert ran.stdout.split()[-1:] == ["ECKART"], ran.stderr[-2000:]


def test_fingerprint_of_the_base_does_not_change(llama: nn.Module) -> None:
    before = fingerprint(llama)
    model = get_peft_model(llama, config_of("pissa", "linear", llama))
    train(model, "linear", torch.float32)
    model.merge_adapter()
    model.unmerge_adapter()
    assert fingerprint(model.unload()) == before
