"""Adapters beside the fused experts of a mixture: what holds for every other layer holds for them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

import eckart
from eckart.adaptation import ADAPTATIONS
from eckart.arch import find_sites
from eckart.errors import EckartWarning, InputError
from eckart.hf.adapters.convert import Nearest
from eckart.hf.adapters.export import write_factors
from eckart.hf.adapters.layers import AdapterExperts
from eckart.hf.adapters.tuner import adapter_layers, after_step, penalty
from eckart.moments import Moments, collect
from eckart.records import Budget

OPTIONS: dict[str, dict[str, Any]] = {"salt": {"rest": 2}}
METHODS = [name for name in ADAPTATIONS if ADAPTATIONS[name].delta.linear]
TOKENS = torch.randint(0, 20, (4, 9), generator=torch.Generator().manual_seed(1))

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*has no plain-LoRA copy.*"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_disable.*"),
    pytest.mark.filterwarnings("ignore:.*Could not.*"),
]


def mixture(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=20,
        num_local_experts=3,
    )
    return MixtralForCausalLM(config).to(dtype).eval()


def moments(model: nn.Module) -> Moments:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EckartWarning)
        return collect(model, [{"input_ids": TOKENS}], find_sites(model), gradients="none")


def adapted(method: str, model: nn.Module, **more: Any) -> Any:
    if ADAPTATIONS[method].needs:
        more["moments"] = moments(model)
    settings = {"r": 2, "target_modules": ["experts", "q_proj"], "options": OPTIONS.get(method, {})}
    return get_peft_model(model, eckart.AdapterConfig(method=method, task_type="CAUSAL_LM", **(settings | more)))


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def off(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def train(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=3e-2)
    for step in range(2):
        optimizer.zero_grad()
        torch.autograd.backward(model(TOKENS).logits.float().square().mean() + penalty(model))
        optimizer.step()
        after_step(model, step + 1)


CASES = [(name, torch.float32) for name in METHODS] + [(name, torch.bfloat16) for name in ("lora", "pissa", "soka")]


@pytest.mark.parametrize(("method", "dtype"), CASES, ids=[f"{n}-{str(d).removeprefix('torch.')}" for n, d in CASES])
def test_saved_loaded_disabled_merged(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = mixture(dtype)
    before = output(base)
    weights = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = adapted(method, base)
    assert sum(isinstance(layer, AdapterExperts) for _, layer in adapter_layers(model)) == 4
    assert off(output(model), before) == 0
    train(model)
    trained = output(model)
    assert off(trained, before) > 1e-4
    for _, layer in adapter_layers(model):
        assert all(p.grad is not None for p in layer.eckart_delta.parameters())
    with model.disable_adapter():
        assert off(output(model), before) == 0
    model.save_pretrained(str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error", EckartWarning)
        for more in ({}, {"adapter_name": "x"}, {"low_cpu_mem_usage": True}):
            assert off(output(PeftModel.from_pretrained(mixture(dtype), str(tmp_path), **more)), trained) == 0
    assert (tmp_path / "lora").exists() is ADAPTATIONS[method].exact
    if ADAPTATIONS[method].exact:
        # PEFT rounds factors and their product to the dtype of the experts; here the sum is rounded once.
        again = output(PeftModel.from_pretrained(mixture(dtype), str(tmp_path / "lora")))
        assert off(again, trained) <= (1e-6 if dtype is torch.float32 else 0.03)
    tolerance = 1e-6 if dtype is torch.float32 else 0.01
    model.merge_adapter()
    assert off(output(model), trained) <= tolerance
    model.unmerge_adapter()
    assert off(output(model), trained) == 0
    merged = PeftModel.from_pretrained(mixture(dtype), str(tmp_path)).merge_and_unload()
    assert not any(isinstance(module, AdapterExperts) for module in merged.modules())
    assert off(output(merged), trained) <= tolerance
    assert all(torch.equal(weights[name], p) for name, p in model.unload().named_parameters())


def test_the_change_of_each_expert_is_its_own() -> None:
    """A naive twin: the experts of a plain model with W + B A of each written over W."""
    model = adapted("pissa", mixture(), target_modules=["experts"])
    train(model)
    twin = mixture()
    for _, layer in adapter_layers(model):
        delta = layer.delta("default")
        B, A = (part.detach() for part in delta.factors())  # type: ignore[union-attr]
        weight = twin.get_parameter(delta.layout.name)
        assert B.shape[0] == 3
        with torch.no_grad():
            for expert in range(3):
                weight[expert] += B[expert] @ A[expert]
    torch.testing.assert_close(output(twin), output(model), atol=1e-6, rtol=1e-5)


def test_names_do_not_depend_on_what_got_a_rank(tmp_path: Path) -> None:
    """Adapters of one parameter, after and before an adapter of both, and their plain copies."""
    for kept in ("gate_up_proj", "down_proj"):
        model = adapted("lora", mixture(), target_modules=["experts"], rank_pattern={kept: 3})
        config = model.peft_config["default"]
        assert {rank for name, rank in config.ranks.items() if name.endswith(kept)} == {3}
    first = adapted("lora", mixture(), target_modules=["experts"], r=4, budget=Budget(parameters=500))
    ranks = first.peft_config["default"].ranks
    assert 0 in ranks.values()
    train(first)
    alone = output(first)
    config = eckart.AdapterConfig(method="pissa", r=2, target_modules=["experts"], task_type="CAUSAL_LM")
    first.add_adapter("second", config)
    first.set_adapter("second")
    train(first)
    both = output(first)
    first.save_pretrained(str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error", EckartWarning)
        for folder, expected in ((tmp_path, alone), (tmp_path / "second", both)):
            assert off(output(PeftModel.from_pretrained(mixture(), str(folder))), expected) == 0
            assert off(output(PeftModel.from_pretrained(mixture(), str(folder / "lora"))), expected) <= 1e-6


def test_the_nearest_lora_of_what_is_none(tmp_path: Path) -> None:
    model = adapted("soka", mixture())
    train(model)
    nearest = Nearest(model.base_model.model, 16)
    assert max(nearest.weight_errors(16).values()) < 1e-6  # the full rank of each expert
    assert max(nearest.weight_errors(2).values()) > 0.01
    write_factors(nearest.factors(16), tmp_path / "near", model.peft_config["default"], {})
    assert off(output(PeftModel.from_pretrained(mixture(), str(tmp_path / "near"))), output(model)) <= 1e-6


def test_gradient_checkpointing_and_compile() -> None:
    model = adapted("pissa", mixture())
    train(model)
    plain = output(model)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="eager")(TOKENS).logits, plain)
    trained = [p for p in model.train().parameters() if p.requires_grad]
    wanted = torch.autograd.grad(model(TOKENS).logits.square().mean(), trained)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.zero_grad()
    torch.autograd.backward(model(TOKENS).logits.square().mean())
    for gradient, parameter in zip(wanted, trained, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_what_cannot_be_served_says_why() -> None:
    with pytest.raises(InputError, match=r"experts\.gate_up_proj: method 'snnk' cannot serve it: fused experts read"):
        adapted("snnk", mixture())
    with pytest.raises(InputError, match=r"dropout is 0 here; got 0\.1"):
        adapted("lora", mixture(), dropout=0.1)
    other = GptOssConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=20,
        num_local_experts=2,
        head_dim=8,
    )
    with pytest.raises(InputError, match="GptOssExperts stores its weights"):
        adapted("lora", GptOssForCausalLM(other), target_modules=["experts"])
