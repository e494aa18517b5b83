"""Losses without labels: what their gradients are in expectation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from eckart.errors import InputError
from eckart.moments import collect, gauss_newton, sampled_targets
from eckart.moments.losses import draw
from eckart.records import Site

pytestmark = pytest.mark.filterwarnings("ignore::eckart.errors.EckartWarning")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_sampled_gradients_have_the_exact_fisher_information() -> None:
    """For logits W x the Fisher information at the output is E[diag(p) − p pᵀ]."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5)).double()
    x = torch.randn(50, 3, dtype=torch.float64)
    site = Site(name="0", kind="linear", out_features=5, in_features=3)
    found = collect(model, [x], [site], loss=sampled_targets, probes=400).site("0")
    p = model(x).softmax(-1).detach()
    exact = torch.diag(p.mean(0)) - p.T @ p / 50
    # 20 000 draws of entries of g gᵀ within [−1, 1], standard deviation under .4: standard error under .003.
    torch.testing.assert_close(found.gradient, exact, atol=0.012, rtol=0)
    rows = ((p - p**2) * x.square().sum(1, keepdim=True)).mean(0).detach()
    torch.testing.assert_close(found.fisher_rows, rows, atol=0.06, rtol=0)
    assert found.tokens_per_unit == 1


def test_the_predicted_rise_is_the_divergence_of_a_small_change() -> None:
    """½ E tr(F δδᵀ) ≈ KL for a linear softmax model, where the estimate is exact to second order per input."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5)).double()
    x = torch.ones(1, 3, dtype=torch.float64).repeat(4, 1)
    site = Site(name="0", kind="linear", out_features=5, in_features=3)
    moments = collect(model, [x], [site], loss=sampled_targets, probes=4000).site("0")
    change = 0.02 * torch.randn(5, 3, dtype=torch.float64)
    predicted = moments.loss_scale * float((moments.gradient @ change @ moments.second @ change.T).trace())
    before = model(x[0]).log_softmax(-1)
    after = (model(x[0]) + change @ x[0]).log_softmax(-1)
    divergence = float((before.exp() * (before - after)).sum().detach())
    # 16 000 draws: about 1 % of sampling error; the third order adds another.
    assert predicted == pytest.approx(divergence, rel=0.06)


def test_draws_follow_the_softmax_and_never_the_impossible() -> None:
    logits = torch.tensor([-torch.inf, 0.0, 1.0, -torch.inf]).repeat(20_000, 1)
    found = torch.bincount(draw(logits, generator()), minlength=4) / 20_000
    expected = logits[0].softmax(0)
    assert found[0] == found[3] == 0
    torch.testing.assert_close(found, expected, atol=0.012, rtol=0)  # standard error .003


def test_draws_do_not_depend_on_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(40, 7, generator=generator(1))
    whole = draw(logits, generator())
    monkeypatch.setattr("eckart.moments.losses.CHUNK_NUMBERS", 21)
    assert torch.equal(draw(logits, generator()), whole)
    assert not torch.equal(draw(logits, generator(2)), whole)
    assert draw(logits[:0], generator()).shape == (0,)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    outputs = SimpleNamespace(logits=torch.randn(2, 3, 5, generator=generator()))
    sampled_targets(outputs, outputs.logits, generator())
    gauss_newton(lambda o, b: o.logits[:, 0])(outputs, outputs.logits, generator())
    assert torch.equal(torch.get_rng_state(), before)


def test_padding_has_no_target() -> None:
    logits = torch.randn(2, 4, 6, generator=generator(), requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    loss, units = sampled_targets(SimpleNamespace(logits=logits), {"attention_mask": mask}, generator())
    loss.backward()
    assert units == 4
    assert torch.equal(logits.grad.abs().sum(-1) > 0, mask == 1)


def test_decoders_take_their_own_mask() -> None:
    outputs = SimpleNamespace(logits=torch.randn(2, 4, 6), encoder_last_hidden_state=torch.zeros(2, 4, 3))
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    assert sampled_targets(outputs, {"attention_mask": mask}, generator())[1] == 8
    assert sampled_targets(outputs, {"decoder_attention_mask": mask}, generator())[1] == 4


def test_classes_of_whole_rows() -> None:
    logits = torch.randn(3, 6, generator=generator())
    batch = {"attention_mask": torch.ones(3, 9)}
    assert sampled_targets(SimpleNamespace(logits=logits), batch, generator())[1] == 3
    assert sampled_targets(logits, logits, generator())[1] == 3


def test_half_precision_is_summed_in_float32() -> None:
    logits = torch.zeros(4000, 2, dtype=torch.bfloat16)
    loss, _ = sampled_targets(logits, logits, generator())
    assert float(loss) == pytest.approx(4000 * 0.693147, rel=1e-4)


def test_outputs_without_logits_are_refused() -> None:
    with pytest.raises(InputError, match="needs logits"):
        sampled_targets(SimpleNamespace(last_hidden_state=torch.zeros(1)), {}, generator())


def test_gauss_newton_estimates_the_squared_change_of_the_output() -> None:
    """One row per unit and a linear model: E tr(G ΔW Σ ΔWᵀ) = E‖B ΔW x‖² exactly when B is orthogonal rows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)).double()
    x = torch.randn(30, 3, dtype=torch.float64)
    site = Site(name="0", kind="linear", out_features=4, in_features=3)
    loss = gauss_newton(lambda outputs, batch: outputs)
    moments = collect(model, [x], [site], loss=loss, probes=600)
    B = model[1].weight.detach()
    # 18 000 draws of v: E v vᵀ = I within √(2/18000) ≈ .01.
    torch.testing.assert_close(moments.site("0").gradient, B.T @ B, atol=0.05, rtol=0)
    change = torch.randn(4, 3, dtype=torch.float64)
    found = moments.site("0")
    predicted = found.loss_scale * float((found.gradient @ change @ found.second @ change.T).trace())
    measured = 0.5 * float((x @ change.T @ B.T).square().sum(1).mean())
    assert predicted == pytest.approx(measured, rel=0.1)
    assert moments.meta["loss"] == "gauss_newton"


def test_gauss_newton_counts_units() -> None:
    def output_of(outputs: Tensor, batch: object) -> Tensor:
        return outputs.mean(1)

    outputs = torch.randn(5, 7, 3, generator=generator(), requires_grad=True)
    value, units = gauss_newton(output_of)(outputs, outputs, generator())
    assert units == 5
    assert value.shape == ()
