"""The engine: every action against a naive twin, the ramp, resume, bad input, and what the report says."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eckart.errors import BudgetError, InputError, MismatchError, NotFiniteError
from eckart.prune import (
    SELECTORS,
    Fade,
    GroupSet,
    MaskSet,
    Part,
    Prox,
    Regrow,
    Schedule,
    Shrink,
    Zero,
    chained,
    envelope_prox,
    find_groups,
    fixed,
    parse_pattern,
)
from eckart.prune.patterns import highest


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8)).to(dtype)


def data(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(step)
    X = torch.randn(16, 12, generator=draw, dtype=torch.float64).to(dtype)
    return X, X[:, :8].sin()


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    X, Y = data(step, next(model.parameters()).dtype)
    optimizer.zero_grad()
    (model(X) - Y).square().mean().backward()
    optimizer.step()


def run(engine: Schedule, steps: int, optimizer: torch.optim.Optimizer | None = None) -> torch.optim.Optimizer:
    optimizer = optimizer or torch.optim.SGD(engine.model.parameters(), lr=0.1, momentum=0.9)
    engine.attach(optimizer)
    for step in range(steps):
        one_step(engine.model, optimizer, step)
    return optimizer


WEIGHTS = ("0.weight", "2.weight")
TOTAL = 12 * 16 + 16 * 8


# ---- actions against naive twins


def test_gradual_zero_follows_the_cubic_curve_and_nothing_comes_back() -> None:
    model = network()
    engine = Schedule(model, selector="magnitude", keep=0.1, steps=40, begin=4, end=24, interval=5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    engine.attach(optimizer)
    before: MaskSet | None = None
    for step in range(1, 41):
        one_step(model, optimizer, step)
        masks = engine.masks
        assert not masks.leaks(model)
        way = 0.0 if step < 4 else 1 - (1 - min(1.0, ((step - 4) // 5 * 5 if step < 24 else 20) / 20)) ** 3
        for name in WEIGHTS:
            n = masks[name].numel()
            assert int(masks[name].sum()) == math.floor((1 - 0.9 * way) * n + 1e-9)
            if before is not None:
                assert not (masks[name] & ~before[name]).any()
        before = masks
    assert engine.done
    assert engine.finish().kept == 19 + 12


def test_shrink_is_the_five_lines_of_the_paper() -> None:
    model, twin = network(), network()
    engine = Schedule(model, selector="magnitude", keep=0.25, steps=20, end=15, action=Shrink(0.9))
    other = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    engine.attach(optimizer)
    with torch.no_grad():
        for step in range(15):
            if step:
                with torch.enable_grad():
                    one_step(model, optimizer, step)
                    one_step(twin, other, step)
            for name in WEIGHTS:
                weight = twin.get_parameter(name)
                low = weight.abs() < weight.abs().flatten().sort(descending=True).values[weight.numel() // 4 - 1]
                weight[low] *= 0.9
    for name in WEIGHTS:
        difference = (model.get_parameter(name) - twin.get_parameter(name)).abs()
        assert difference.max() < 1e-6  # factors are float32
    one_step(model, optimizer, 15)
    assert engine.finish().kept == TOTAL // 4


def test_the_estimated_line_is_near_the_exact_one() -> None:
    model = nn.Sequential(nn.Linear(60, 50, bias=False))
    engine = Schedule(model, selector="magnitude", keep=0.25, steps=8, action=Shrink(0.5, sample=1000), seed=3)
    start = model[0].weight.detach().clone()
    engine.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    untouched = (model[0].weight == start).double().mean()
    assert abs(float(untouched) - 0.25) < 4 * (0.25 * 0.75 / 1000) ** 0.5
    assert start.abs()[model[0].weight == start].min() >= start.abs()[model[0].weight != start].max()


def test_fade_takes_equal_steps_of_the_weights_and_whole_periods() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # nothing but the fading moves
    scores = {"0→1": torch.arange(8.0)}
    engine = Schedule(
        model, selector=fixed(scores), keep=0.5, steps=12, end=8, action=Fade(2), groups=[chained(model, "0", "1")]
    )
    start = model[0].weight.detach().clone()
    engine.attach(optimizer)  # step 0 is the first of the ramp
    seen = [(model[0].weight.detach() / start).mean(1)]
    for step in range(8):
        one = nn.functional.mse_loss(model(torch.ones(1, 4).double()), torch.zeros(1, 4).double())
        one.backward()
        optimizer.step()
        seen.append((model[0].weight.detach() / start).mean(1))
        assert engine.steps == step + 1
    rows = torch.stack(seen)[:, [0, 1, 2, 3, 7]]
    first, second = [0.75, 0.5, 0.25, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0]
    expected = torch.tensor([first, first, second, second, [1] * 9], dtype=torch.float64).T
    torch.testing.assert_close(rows, expected, atol=1e-6, rtol=0)
    assert (model[1].weight[:, :4] == 0).all()
    assert (model[0].bias[:4] == 0).all()
    report = engine.finish()
    assert report.whole_groups == {"0→1": (4, 8)}
    assert "Cut out" in str(report)


def test_prox_is_the_envelope_of_every_layer_or_of_all() -> None:
    for allocation in ("uniform", "global"):
        model, twin = network(), network()
        engine = Schedule(
            model, selector="magnitude", keep=0.25, steps=4, action=Prox(0.5), allocation=allocation, pattern="outputs"
        )
        engine.attach(torch.optim.SGD(model.parameters(), lr=0.2))
        norms = [twin.get_parameter(n).detach().norm(dim=1) for n in WEIGHTS]
        if allocation == "uniform":
            factors = [envelope_prox(v, len(v) // 4, 0.1) for v in norms]
        else:
            factors = list(envelope_prox(torch.cat(norms), 6, 0.1).split([16, 8]))
        for name, factor in zip(WEIGHTS, factors, strict=True):
            torch.testing.assert_close(model.get_parameter(name), twin.get_parameter(name) * factor[:, None])


def test_regrow_drops_the_small_and_grows_by_gradient() -> None:
    model = network()
    engine = Schedule(
        model, selector="magnitude", allocation="erk", keep=0.2, steps=40, end=30, interval=10, action=Regrow(0.5)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    engine.attach(optimizer)
    counts = {n: int(m.sum()) for n, m in engine.masks.items()}
    assert sum(counts.values()) in (TOTAL // 5, TOTAL // 5 - 1)
    for step in range(1, 41):
        before = engine.masks
        grads = {}
        one_step(model, optimizer, step)
        for name in WEIGHTS:
            grads[name] = model.get_parameter(name).grad
        masks = engine.masks
        assert {n: int(m.sum()) for n, m in masks.items()} == counts
        assert not masks.leaks(model)
        if step not in (10, 20):
            assert masks.same(before)
            continue
        for name in WEIGHTS:
            dropped = int(0.25 * (1 + math.cos(math.pi * step / 30)) * counts[name])
            new = masks[name] & ~before[name]
            assert 0 < int(new.sum()) <= dropped
            assert (model.get_parameter(name)[new] == 0).all()  # they start at zero
            slope = grads[name].abs()
            assert slope[new].min() >= slope[~masks[name] & ~before[name]].max()


def test_freeze_holds_the_zeros_of_a_pruned_model() -> None:
    model = network()
    with torch.no_grad():
        for name in WEIGHTS:
            model.get_parameter(name)[::2] = 0
    zeros = MaskSet.from_model(model)
    engine = Schedule(model, keep=0.5, steps=20, action="freeze")
    run(engine, 20)
    assert engine.masks.same(zeros)
    assert engine.finish().kept == TOTAL // 2


def test_sdgf_like_steps_through_n_of_m_patterns() -> None:
    model = network()
    engine = Schedule(
        model, selector="magnitude", pattern="keep 1 of 4", steps=24, begin=1, end=19, interval=3, curve="linear"
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine.attach(optimizer)
    seen = []
    for step in range(24):
        one_step(model, optimizer, step)
        groups = engine.masks["0.weight"].reshape(16, 3, 4).sum(-1).unique().tolist()
        assert len(groups) == 1
        seen.append(groups[0])
    assert sorted(set(seen), reverse=True) == [4, 3, 2, 1]
    assert seen == sorted(seen, reverse=True)


# ---- selectors and allocations


def test_global_budget_has_a_floor_and_uniform_has_none() -> None:
    model = network()
    with torch.no_grad():
        model[2].weight.mul_(1e-3)
    for floor, least in ((0.0, 0), (0.02, 7), (None, 1)):
        engine = Schedule(model, selector="global-mp", keep=0.3, steps=10, curve="one-shot", floor=floor)
        engine.attach(torch.optim.SGD(model.parameters(), lr=0.0))
        masks = engine.masks
        assert masks.kept() == int(0.3 * TOTAL)
        assert int(masks["2.weight"].sum()) == least
        model = network()
        with torch.no_grad():
            model[2].weight.mul_(1e-3)
    with pytest.raises(BudgetError, match="lower floor"):
        Schedule(model, selector="global-mp", keep=0.1, steps=10, floor=0.4)
    with pytest.raises(InputError, match="floor needs allocation"):
        Schedule(model, selector="magnitude", keep=0.1, steps=10, floor=0.1)


def test_a_share_by_layer() -> None:
    model = network()
    engine = Schedule(
        model, selector="magnitude", keep=0.5, steps=10, allocation={"0": 0.25, "2.weight": 0.75}, curve="one-shot"
    )
    run(engine, 1)
    assert {n: int(m.sum()) for n, m in engine.masks.items()} == {"0.weight": 48, "2.weight": 96}
    with pytest.raises(BudgetError, match="more than keep"):
        Schedule(model, keep=0.5, steps=10, allocation={"0": 0.5, "2": 0.75})
    with pytest.raises(InputError) as error:
        Schedule(model, keep=0.5, steps=10, allocation={"0": 2.0, "7": 0.5})
    for part in ("7.weight is no set", "2.weight has no share", "0.weight: a share"):
        assert part in str(error.value)


@pytest.mark.parametrize("name", SELECTORS)
def test_every_selector_prunes_weights_and_coupled_groups(name: str) -> None:
    for coupled in (False, True):
        model = network()
        groups = [chained(model, "0", "2")] if coupled else ()
        engine = Schedule(model, selector=name, keep=0.25, steps=12, groups=groups)
        run(engine, 12)
        report = engine.finish()
        assert report.kept <= 0.25 * report.total
        assert report.kept > 0.2 * report.total
        assert not engine.masks.leaks(model)


def test_saliency_by_hand() -> None:
    model = network()
    X, Y = data(0)
    (model(X) - Y).square().mean().backward()
    engine = Schedule(model, selector="saliency", keep=0.5, steps=10, groups=[chained(model, "0", "2")])
    w = torch.cat([model[0].weight, model[0].bias[:, None], model[2].weight.T], 1).detach()
    g = torch.cat([model[0].weight.grad, model[0].bias.grad[:, None], model[2].weight.grad.T], 1)
    norm, product = w.norm(dim=1), (w * g).sum(1)
    criteria = [norm, norm / 21, 1 + product / (norm * g.norm(dim=1)), product.abs(), product.square() / 2]
    torch.testing.assert_close(engine.scores()["0→2"], sum(0.2 * c / c.norm() for c in criteria))


def test_stored_layouts_are_read_as_out_by_in() -> None:
    torch.manual_seed(0)

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 3, groups=2)
            self.back = Conv1D(6, 8)  # stores (in, out) = (8, 6)

    model = Mixed()
    engine = Schedule(model, selector="magnitude", keep=0.5, pattern="row", steps=4, curve="one-shot")
    engine.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    masks = engine.masks
    assert masks["conv.weight"].flatten(1).sum(1).tolist() == [9] * 6
    assert masks["back.weight"].sum(0).tolist() == [4] * 6
    assert not masks.leaks(model)


# ---- coupled groups


def test_groups_of_convolutions_flattened_and_transposed() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5))
    group = chained(model, "0", "3")
    assert group.size(model) == 9 + 1 + 4 * 5
    engine = Schedule(model, selector="magnitude", keep=0.7, steps=2, groups=[group], curve="one-shot")
    engine.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    gone = int((~engine.kept["0→3"]).nonzero())
    assert (model[3].weight[:, 4 * gone : 4 * gone + 4] == 0).all()
    assert int((model[3].weight == 0).sum()) == 20
    X = torch.randn(2, 1, 4, 4)
    model[0].weight.data[gone] = torch.randn(1, 3, 3)
    with torch.no_grad():
        changed = model(X)
        model[0].weight.data[gone] = 0
        torch.testing.assert_close(model(X), changed)  # nothing reads it any more
    with pytest.raises(InputError, match="are not the 3 outputs"):
        chained(nn.Sequential(nn.Linear(2, 3), nn.Linear(4, 2)), "0", "1")
    with pytest.raises(InputError, match="Tanh"):
        chained(network(), "0", "1")


def test_neurons_of_a_llama_and_the_function_left_when_they_go() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    sets = find_groups(model)
    assert [(s.count, s.size(model)) for s in sets] == [(24, 48)] * 2
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, 5:] = 0  # idle neurons: gone without a change
    ids = torch.arange(8)[None]
    before = model(ids).logits
    engine = Schedule(
        model, selector="magnitude", keep=5 / 24, steps=2, groups=sets, curve="one-shot", allocation="uniform"
    )
    scores = {s.name: (torch.arange(24) < 5).float() for s in sets}
    engine.selector = fixed(scores)
    engine.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    assert (model.model.layers[0].mlp.up_proj.weight[5:] == 0).all()
    torch.testing.assert_close(model(ids).logits, before)
    with pytest.raises(InputError, match="chained"):
        find_groups(network())


def test_groups_that_do_not_fit_are_all_named() -> None:
    wrong = [
        GroupSet("a", 17, (Part("0.weight", 0),)),
        GroupSet("b", 2, (Part("9.weight", 0),)),
        GroupSet("c", 0, ()),
        GroupSet("a", 2, (Part("0.bias", 1),)),
    ]
    with pytest.raises(InputError) as error:
        Schedule(network(), keep=0.5, steps=10, groups=wrong)
    for part in (
        "a is there twice",
        "(16, 12) does not hold",
        "9.weight is no parameter",
        "c has 0 groups",
        "(16,) does not",
    ):
        assert part in str(error.value)


# ---- life of an engine


ACTIONS: dict[str, dict[str, Any]] = {
    "zero": {"selector": "global-mp", "interval": 3},
    "taylor": {"selector": "taylor", "interval": 3},
    "iss": {"selector": "magnitude", "action": Shrink(0.9, sample=50)},
    "fade": {"selector": "saliency", "action": Fade(4)},
    "prox": {"selector": "magnitude", "action": "prox"},
    "regrow": {"selector": "magnitude", "action": "regrow", "interval": 4},
}


@pytest.mark.parametrize("stop", [2, 9, 27])
@pytest.mark.parametrize("name", ACTIONS)
def test_resume_is_exact(name: str, stop: int) -> None:
    def engine_of(model: nn.Module) -> Schedule:
        return Schedule(model, keep=0.2, steps=30, end=24, **copy.deepcopy(ACTIONS[name]))

    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=0.02)

    straight = engine_of(network())
    optimizer = optimizer_of(straight.model)
    straight.attach(optimizer)
    for step in range(30):
        if step == stop:
            saved = copy.deepcopy((straight.model.state_dict(), optimizer.state_dict(), straight.state_dict()))
        one_step(straight.model, optimizer, step)
    resumed = engine_of(network(seed=7))
    resumed.model.load_state_dict(saved[0])
    again = optimizer_of(resumed.model)
    again.load_state_dict(saved[1])
    state = {k: torch.as_tensor(v) for k, v in saved[2].items()}  # as a file gives it back
    resumed.load_state_dict(state)
    resumed.attach(again)
    for step in range(stop, 30):
        one_step(resumed.model, again, step)
    assert resumed.masks.same(straight.masks)
    for one, other in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_state_of_another_model_is_refused() -> None:
    state = Schedule(network(), keep=0.5, steps=10).state_dict()
    other = Schedule(nn.Sequential(nn.Linear(12, 17), nn.Linear(17, 3)), keep=0.5, steps=10)
    with pytest.raises(MismatchError) as error:
        other.load_state_dict(state)
    for part in ("0.weight has another shape", "2.weight is of no set", "kept:1.weight is missing"):
        assert part in str(error.value)
    engine = Schedule(network(), keep=0.5, steps=10)
    run(engine, 1)
    with pytest.raises(InputError, match="attached"):
        engine.load_state_dict(state)
    with pytest.raises(InputError, match="attached already"):
        engine.attach(torch.optim.SGD(engine.model.parameters(), lr=0.1))


def test_finish_before_the_end_meets_the_budget_at_once() -> None:
    for action in ("zero", "iss", "prox", "fade", "regrow"):
        engine = Schedule(network(), selector="magnitude", keep=0.25, steps=100, action=action)
        optimizer = run(engine, 7)
        assert engine.finish().kept == TOTAL // 4
        one_step(engine.model, optimizer, 8)
        assert engine.masks.leaks(engine.model)  # let go: trains on densely


def test_an_optimizer_that_has_run_before_and_the_model_unharmed() -> None:
    model = network()
    names = list(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for step in range(3):
        one_step(model, optimizer, step)
    engine = Schedule(model, selector="magnitude", keep=0.3, steps=20, curve="one-shot")
    run(engine, 5, optimizer)
    for name, mask in engine.masks.items():
        assert (optimizer.state[model.get_parameter(name)]["exp_avg"][~mask] == 0).all()
    assert list(model.state_dict()) == names
    assert not engine.masks.leaks(copy.deepcopy(model))
    assert not engine.masks.leaks(pickle.loads(pickle.dumps(model)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ACTIONS)
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    engine = Schedule(network(dtype=dtype), keep=0.2, steps=12, **copy.deepcopy(ACTIONS[name] | {"interval": None}))
    run(engine, 12)
    assert 0 < engine.finish().kept <= 0.2 * TOTAL


# ---- bad input


def test_all_bad_options_at_once() -> None:
    with pytest.raises(InputError) as error:
        Schedule(network(), keep=0.5, steps=0, begin=-1, end=0, interval=0, curve="qubic", floor=2, seed=1.5)  # type: ignore[arg-type]
    for part in ("steps is", "begin is", "end is", "interval is", "'cubic'", "floor is", "seed is"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": 0}, r"in \(0, 1\]; got 0"),
        ({"keep": 1.2}, r"in \(0, 1\]"),
        ({}, "keep is missing"),
        ({"keep": 0.5, "pattern": "1:4"}, "keeps 0.25"),
        ({"keep": 0.5, "selector": "magnitud"}, "Did you mean 'magnitude'"),
        ({"keep": 0.5, "action": "zeros"}, "Did you mean 'zero'"),
        ({"keep": 0.5, "allocation": "globl"}, "Did you mean 'global'"),
        ({"keep": 0.5, "begin": 9, "end": 9}, "begin < end"),
        ({"keep": 0.5, "end": 11}, "begin < end"),
        ({"keep": 0.5, "action": "prox", "curve": "cubic"}, "no curve"),
        ({"keep": 0.5, "action": "iss", "interval": 3}, "no interval"),
        ({"keep": 0.5, "pattern": "2:4"}, "selector='magnitude'"),
        ({"keep": 0.5, "pattern": "keep 5 of 10", "selector": "magnitude"}, "no multiple of 10"),
        ({"keep": 0.5, "include": ["nothing"]}, "nothing"),
        ({"keep": 0.5, "action": Shrink(1.0)}, "factor"),
        ({"keep": 0.5, "action": Shrink(sample=10)}, "one line per layer"),
        ({"keep": 0.5, "action": Fade(99)}, "periods"),
        ({"keep": 0.5, "action": Prox(-1.0)}, "strength"),
        ({"keep": 0.5, "action": Regrow(1.0)}, "fraction"),
        ({"keep": 0.5, "action": Regrow(), "pattern": "row", "selector": "magnitude"}, "counts per row"),
        ({"keep": 0.001, "selector": "magnitude"}, "left empty"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=words):
        Schedule(model, steps=10, **options)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_everything_may_stay() -> None:
    for action in ("zero", "iss", "prox", "fade", "regrow"):
        engine = Schedule(network(), selector="magnitude", keep=1, steps=20, action=action)
        run(engine, 20)
        assert engine.finish().density == 1


def test_nan_in_weights_and_gradients() -> None:
    model = network()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(NotFiniteError, match="2"):
        Schedule(model, keep=0.5, steps=10)
    for options in ({"selector": "taylor", "curve": "one-shot"}, {"selector": "magnitude", "action": "prox"}):
        model = network()
        engine = Schedule(model, keep=0.5, steps=10, begin=1, **options)  # type: ignore[arg-type]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine.attach(optimizer)
        model[0].weight.grad = torch.full_like(model[0].weight, float("nan"))
        model[2].weight.grad = torch.ones_like(model[2].weight)
        with pytest.raises(NotFiniteError, match=r"0\.weight"):
            optimizer.step()


def test_a_gradient_that_is_missing() -> None:
    model = network()
    engine = Schedule(model, selector="taylor", keep=0.5, steps=10, curve="one-shot")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine.attach(optimizer)
    with pytest.raises(InputError, match="between backward"):
        optimizer.step()


def test_an_optimizer_without_the_weights() -> None:
    model = network()
    engine = Schedule(model, keep=0.5, steps=10)
    with pytest.raises(InputError, match=r"2\.weight"):
        engine.attach(torch.optim.SGD(model[0].parameters(), lr=0.1))
    model[2].weight.requires_grad_(False)  # frozen weights may be pruned
    engine.attach(torch.optim.SGD(model[0].parameters(), lr=0.1))


def test_tied_weights_are_pruned_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
            self.two.weight = self.one.weight

    engine = Schedule(Tied(), selector="magnitude", keep=0.5, steps=4, curve="one-shot")
    engine.attach(torch.optim.SGD(engine.model.parameters(), lr=0.1))
    assert list(engine.masks) == ["one.weight"]
    assert engine.finish().total == 64


def test_the_report_tells_sizes_from_speed() -> None:
    model = network(dtype=torch.float32)
    engine = Schedule(model, selector="magnitude", keep=0.25, steps=4, curve="one-shot")
    run(engine, 1)
    report = engine.finish()
    biases = 16 + 8
    assert report.dense_bytes == 4 * (TOTAL + biases)
    assert report.packed_bytes == 4 * (TOTAL // 4 + biases) + TOTAL // 8
    assert report.model_parameters == TOTAL + biases
    text = str(report)
    assert "Speed: none" in text
    assert "80 of 320 weights kept (25.00%)" in text


# ---- the proximal operator


def objective(x: Tensor, v: Tensor, k: int, strength: float, weights: Tensor) -> float:
    """½‖x − v‖² + λ S_k(x), S_k by its variational form: min Σ d_j ‖x_j‖² / (2 η_j) over 0 < η ≤ 1, Σ η ≤ k."""
    low, high = 1e-12, 1e12
    size = weights.sqrt() * x.abs()
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if float((size / middle).clamp(max=1).sum()) > k else (low, middle)
    eta = (size / high).clamp(1e-300, 1)
    return float((x - v).square().sum() / 2 + strength * (size.square() / eta).sum() / 2)


@pytest.mark.parametrize("k", [1, 2, 4, 6])
@pytest.mark.parametrize("strength", [0.05, 0.5, 5.0])
def test_prox_is_the_minimum(k: int, strength: float) -> None:
    draw = torch.Generator().manual_seed(k)
    v = torch.randn(6, generator=draw, dtype=torch.float64).abs()
    weights = 0.5 + torch.rand(6, generator=draw, dtype=torch.float64)
    x = v * envelope_prox(v, k, strength, weights)
    least = objective(x, v, k, strength, weights)
    for _ in range(100):
        near = (x + 0.03 * torch.randn(6, generator=draw, dtype=torch.float64)).abs()
        assert objective(near, v, k, strength, weights) >= least - 1e-9


def test_prox_at_the_edges() -> None:
    v = torch.tensor([3.0, 2.0, 0.0, 0.0])
    assert envelope_prox(v, 4, 0.5).tolist() == pytest.approx([1 / 1.5, 1 / 1.5, 0, 0])
    assert envelope_prox(v, 2, 0.0).tolist() == [1.0] * 4
    assert envelope_prox(v, 0, 0.5).tolist() == [0.0] * 4
    assert envelope_prox(torch.zeros(3), 2, 0.5).tolist() == [0.0] * 3
    for wrong in ((v, 5, 0.1), (v, -1, 0.1), (v, 2, -1.0), (v[None], 1, 0.1)):
        with pytest.raises(InputError):
            envelope_prox(*wrong)


def test_zero_is_the_action_by_default() -> None:
    engine = Schedule(network(), keep=0.5, steps=10)
    assert isinstance(engine.action, Zero)
    assert engine.selector is SELECTORS["global-mp"]
    assert engine.keep_at(0) == 1
    assert engine.keep_at(7) == 0.5
    assert parse_pattern("unstructured").share is None
    assert int(highest(torch.ones(4), 2).sum()) == 2
