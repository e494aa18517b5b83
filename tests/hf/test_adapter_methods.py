"""What single adaptation methods do inside of PEFT beyond what all of them promise."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_tiny_models import build, outputs
from peft import OSFConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.utils.checkpoint import checkpoint

import eckart
from eckart.adaptation import ADAPTATIONS
from eckart.adaptation.fedsvd import server_round
from eckart.adaptation.osf import energy_shares, importance_shares, leak
from eckart.arch import find_sites
from eckart.errors import EckartWarning, InputError
from eckart.hf.adapters.tuner import adapter_layers, after_step
from eckart.moments import collect, sampled_targets
from eckart.records import Budget

KIND, DTYPE = "linear", torch.float32


def train(model: PeftModel, seed: int, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = torch.randint(0, 50, (4, 8), generator=torch.Generator().manual_seed(seed))
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(model(input_ids=tokens, labels=tokens).loss)
        optimizer.step()


class Pair(nn.Module):
    """Two linear layers, run twice for the gradient where asked."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(24, 32), nn.Linear(32, 20)
        self.again = False

    def run(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.down(torch.relu(self.up(x)))
        return found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = checkpoint(self.run, x, use_reentrant=False) if self.again else self.run(x)
        return found


X = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))


def pair(method: str, rank: int = 2) -> tuple[Pair, eckart.AdapterConfig]:
    net = Pair()
    moments = None
    if ADAPTATIONS[method].needs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EckartWarning)
            moments = collect(net, [torch.randn(64, 24)], find_sites(net), gradients="none")
    options = {"rest": 2} if method == "salt" else {}
    settings = {"r": rank, "target_modules": ["up", "down"], "options": options, "moments": moments}
    return net, eckart.AdapterConfig(method=method, **settings)


@torch.no_grad()
def move(model: nn.Module, seed: int = 0) -> None:
    """As training would."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape))


@pytest.mark.parametrize("method", ADAPTATIONS)
def test_compiled_and_checkpointed_gradients(method: str) -> None:
    net, config = pair(method)
    model = get_peft_model(net, config)
    move(model)
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradients(run: Any) -> list[torch.Tensor]:
        y = run(X)
        return [y.detach(), *torch.autograd.grad(y.square().mean(), trained)]

    plain = gradients(model)
    net.again = True
    for a, b in zip(plain, gradients(model), strict=True):
        assert torch.equal(a, b)
    net.again = False
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for a, b in zip(plain, gradients(compiled), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("method", ADAPTATIONS)
def test_two_adapters_of_a_method_and_casts(method: str) -> None:
    """Both at once add what each adds for itself; another dtype of the adapters is not another adapter."""
    net, config = pair(method)
    base = copy.deepcopy(net)
    model = get_peft_model(net, config)
    move(model)
    model.add_adapter("second", pair(method)[1])
    model.set_adapter("second")
    move(model, seed=1)
    layer = next(layer for _, layer in adapter_layers(model) if layer.delta("default").layout.name == "up")
    with torch.no_grad():
        added = []
        for names in (["default"], ["second"], ["default", "second"]):
            model.base_model.set_adapter(names)
            added.append(layer(X) - base.up(X))
        torch.testing.assert_close(added[0] + added[1], added[2], atol=1e-5, rtol=1e-4)
        assert float((added[0] - added[1]).abs().max()) > 1e-3
        model.set_adapter("default")
        y = model(X)
        torch.testing.assert_close(copy.deepcopy(model).double()(X.double()).float(), y, atol=1e-5, rtol=1e-4)
        low = copy.deepcopy(model).to(torch.bfloat16)(X.bfloat16())
        assert float((low.float() - y).abs().max()) < 0.1


def test_a_federated_round_on_state_dicts(tmp_path: Path) -> None:
    """Clients go on from what the server sends, and its record of the base and of ΔW is right without a model."""
    config = eckart.AdapterConfig(method="fedsvd", r=3, target_modules="all-linear")
    clients = []
    for seed in (0, 1):
        model = get_peft_model(build(KIND), config)
        train(model, seed)
        clients.append(model)
    states = [get_peft_model_state_dict(model) for model in clients]
    changes = [{n: s[n] @ s[n.removesuffix("B") + "A"] for n in s if n.endswith(".B")} for s in states]
    new = server_round(states, weights=[1, 3])
    with warnings.catch_warnings():
        # The record of ΔW is linear in it, so the mean of the clients' is that of the mean.
        warnings.simplefilter("error", EckartWarning)
        set_peft_model_state_dict(clients[0], new)
    for name, layer in adapter_layers(clients[0]):
        key = next(n for n in changes[0] if n.startswith(name))
        mean = 0.25 * changes[0][key] + 0.75 * changes[1][key]
        torch.testing.assert_close(layer.delta("default").delta().detach(), mean, atol=1e-6, rtol=1e-5)
    clients[0].save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(build(KIND), str(tmp_path))
    assert torch.equal(outputs(again.eval(), KIND, DTYPE), outputs(clients[0].eval(), KIND, DTYPE))


def test_one_vector_is_trained_and_stays_one_after_loading(tmp_path: Path) -> None:
    model = get_peft_model(build(KIND), eckart.AdapterConfig(method="said", r=40))
    trained = [p for p in model.parameters() if p.requires_grad]
    layers = len(list(adapter_layers(model)))
    assert sum(p.numel() for p in trained) == 40 + layers
    train(model, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EckartWarning)
        model.save_pretrained(str(tmp_path))
    for low in (False, True):
        again = PeftModel.from_pretrained(build(KIND), str(tmp_path), is_trainable=True, low_cpu_mem_usage=low)
        assert sum(p.numel() for p in again.parameters() if p.requires_grad) == 40 + layers
        assert torch.equal(outputs(again.eval(), KIND, DTYPE), outputs(model.eval(), KIND, DTYPE))


def test_a_shared_vector_is_counted_once_and_stays_one_in_transformers(tmp_path: Path) -> None:
    model = get_peft_model(build(KIND), eckart.AdapterConfig(method="said", r=40, task_type="CAUSAL_LM"))
    deltas = [layer.delta("default") for _, layer in adapter_layers(model)]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(delta.parameter_count() for delta in deltas) == trained == model.get_nb_trainable_parameters()[0]
    train(model, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EckartWarning)
        model.save_pretrained(str(tmp_path))
    plain = build(KIND)
    plain.load_adapter(str(tmp_path))
    assert torch.equal(outputs(plain, KIND, DTYPE), outputs(model.eval(), KIND, DTYPE))
    assert len({id(layer.delta("default").theta) for _, layer in adapter_layers(plain)}) == 1


def test_a_new_selection_asks_for_a_restart_of_the_optimiser() -> None:
    model = get_peft_model(build(KIND), eckart.AdapterConfig(method="sara", r=2, options={"reselect": 2}))
    assert [after_step(model, step) for step in (1, 2, 3)] == [False, True, False]
    other = get_peft_model(build(KIND), eckart.AdapterConfig(method="pissa", r=2))
    assert after_step(other, 2) is False


def test_a_shared_vector_has_no_budget_and_one_rank() -> None:
    with pytest.raises(InputError, match="share their numbers"):
        eckart.AdapterConfig(method="said", budget=Budget(parameters=500))
    config = eckart.AdapterConfig(method="said", r=40, rank_pattern={"q_proj": 30})
    with pytest.raises(InputError, match="one rank"):
        get_peft_model(build(KIND), config)


def test_layers_that_a_method_cannot_serve_are_named_with_the_reason() -> None:
    with pytest.raises(InputError, match=r"middle: method 'snnk' cannot serve it: a convolution reads patches"):
        get_peft_model(build("grouped"), eckart.AdapterConfig(method="snnk", target_modules=["middle"]))
    config = eckart.AdapterConfig(method="osf", target_modules=["table"], options={"protect": 0.99})
    with pytest.raises(InputError, match=r"method 'osf' cannot serve it: all of its 12 directions would be protected"):
        get_peft_model(build("table"), config)


def test_protected_shares_by_layer_and_nothing_leaks() -> None:
    base = build(KIND)
    weights = {n: m.weight for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and "proj" in n}
    shares = energy_shares(weights, 0.5)
    assert len(set(shares.values())) > 1
    model = get_peft_model(base, eckart.AdapterConfig(method="osf", r=4, options={"layers": shares}))
    train(model, 0)
    for name, layer in adapter_layers(model):
        delta = layer.delta("default")
        assert delta.U.shape[-1] == round(
            shares[name.removeprefix("base_model.model.")] * min(weights[delta.layout.name].shape)
        )
        assert float(delta.delta().detach().norm()) > 0
        assert leak(delta.delta(), delta.U, delta.Vh) < 1e-6


def test_protected_shares_are_measured_once_and_stored(tmp_path: Path) -> None:
    base = build(KIND)
    weights = {n: m.weight for n, m in base.named_modules() if n.endswith("proj")}
    wanted = energy_shares(weights, 0.6)
    given = {"model.layers.0.self_attn.q_proj": 0.25}
    settings = {"adaptive": "energy", "energy": 0.6, "layers": given}
    model = get_peft_model(base, eckart.AdapterConfig(method="osf", r=2, options=settings))
    assert model.peft_config["default"].options["layers"] == wanted | given
    train(model, 0)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(build(KIND), str(tmp_path))
    assert again.peft_config["default"].options["layers"] == wanted | given
    assert torch.equal(outputs(again.eval(), KIND, DTYPE), outputs(model.eval(), KIND, DTYPE))


def test_protected_shares_by_importance_need_gradients() -> None:
    base = build(KIND)
    batches = [{"input_ids": torch.randint(0, 50, (8, 12), generator=torch.Generator().manual_seed(0))}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EckartWarning)
        full = collect(base, batches, find_sites(base), loss=sampled_targets, gradients="full")
        without = collect(base, batches, find_sites(base), gradients="none")
    options = {"adaptive": "importance"}
    model = get_peft_model(base, eckart.AdapterConfig(method="osf", r=1, options=options, moments=full))
    found = model.peft_config["default"].options["layers"]
    sizes = {n: full.site(n).diagonal.sum().sqrt() * full.site(n).gradient_scale ** 0.5 for n in found}  # type: ignore[operator, union-attr]
    assert found == pytest.approx(importance_shares({n: float(size) for n, size in sizes.items()}))
    assert len(found) == 14
    for moments in (None, without):
        with pytest.raises(InputError, match="needs moments with gradients"):
            get_peft_model(build(KIND), eckart.AdapterConfig(method="osf", r=1, options=options, moments=moments))


def test_layers_without_small_entries_are_left_out_with_a_warning() -> None:
    base = build(KIND)
    with torch.no_grad():
        weight = base.get_submodule("model.layers.0.self_attn.q_proj").weight
        weight.copy_(weight.sign() + (weight == 0))
    config = eckart.AdapterConfig(method="sara", options={"threshold": 0.01})
    with pytest.warns(EckartWarning, match=r"layers\.0\.self_attn\.q_proj: 0 entries lie below"):
        model = get_peft_model(base, config)
    names = [name for name, _ in adapter_layers(model)]
    assert len(names) == 13
    assert not any("layers.0.self_attn.q_proj" in name for name in names)


def test_projected_gradients_of_peft_leak_under_adamw() -> None:
    """The same training with PEFT's OSF, whose gradients are projected and whose steps are Adam's."""
    base = build(KIND)
    weights = {n: m.weight.detach().clone() for n, m in base.named_modules() if n.endswith("proj")}
    model = get_peft_model(base, OSFConfig(target_modules="all-linear", effective_rank=8))
    train(model, 0, steps=20)
    leaks = []
    for name, layer in model.named_modules():
        if hasattr(layer, "osf_svd_params") and (key := name.removeprefix("base_model.model.")) in weights:
            U, _, Vh = torch.linalg.svd(weights[key], full_matrices=False)
            change = layer.get_delta_weight("default").detach()
            leaks.append(leak(change, U[:, :8], Vh[:8]))
    assert len(leaks) == 14
    assert min(leaks) > 0.01
    ours = get_peft_model(build(KIND), eckart.AdapterConfig(method="osf", r=8, options={"protect": 0.25}))
    train(ours, 0, steps=20)
    deltas = [layer.delta("default") for _, layer in adapter_layers(ours)]
    assert max(leak(d.delta(), d.U, d.Vh) for d in deltas) < 1e-6
