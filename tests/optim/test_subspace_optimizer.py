"""The class: groups, resume, bad input, dtypes, refreshes, reports."""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eckart.errors import InputError, MismatchError, NotFiniteError
from eckart.optim import SUBSPACES, Adam, Feedback, Power, Rows, Subspace

SHAPES = ((12, 20), (12, 20), (20, 12), (7,), (3, 6, 10), (), (6, 2, 2, 2))


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], first: int, last: int) -> None:
    for t in range(first, last):
        generator = torch.Generator().manual_seed(t)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def saved(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


RESUMED = [
    *({"subspace": s, "carry": c} for s, c in itertools.product(SUBSPACES, ("keep", "rotate", "restart"))),
    *({"subspace": "power", "feedback": f, "state_dtype": s} for f, s in (("fp32", "bf16"), ("bf16", "int8"))),
    {"subspace": "rows", "feedback": "int8", "state_dtype": "int8", "residual": "sign"},
    {"subspace": "svd", "residual": "scaled", "guards": ("radial", "growth"), "rule": "diffgrad"},
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", RESUMED, ids=lambda o: "-".join(map(str, o.values())))
def test_a_resumed_run_is_equal_bit_by_bit(options: dict[str, Any], dtype: torch.dtype) -> None:
    options = {**options, "rank": 0.3, "every": 3, "stochastic_rounding": True, "weight_decay": 0.1}
    whole = parameters(dtype)
    optimizer = Subspace(whole, 0.01, **options)
    run(optimizer, whole, 0, 4)
    cut = [nn.Parameter(p.detach().clone()) for p in whole]
    other = Subspace(cut, 0.01, **options)
    other.load_state_dict(saved(optimizer.state_dict()))
    run(optimizer, whole, 4, 8)
    run(other, cut, 4, 8)
    assert all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))
    for p, q in zip(whole, cut, strict=True):
        assert optimizer.state[p].keys() == other.state[q].keys()
        assert all(v.dtype == other.state[q][k].dtype for k, v in optimizer.state[p].items())


def test_a_copy_goes_its_own_way() -> None:
    params = parameters()
    optimizer = Subspace(params, 0.01, subspace="power", rank=0.3, feedback="int8")
    run(optimizer, params, 0, 2)
    twin = copy.deepcopy(optimizer)
    copies = [p for group in twin.param_groups for p in group["params"]]
    run(optimizer, params, 2, 4)
    before = [p.detach().clone() for p in params]
    run(twin, copies, 2, 4)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(params, copies, before, strict=True))


def test_checkpoints_that_do_not_fit_are_refused_with_both_named() -> None:
    params = parameters()
    optimizer = Subspace(params, 0.01, subspace="rows", rank=2)
    run(optimizer, params, 0, 1)
    state = optimizer.state_dict()

    class Other(Subspace):
        pass

    with pytest.raises(MismatchError, match="saved by Subspace; this is Other"):
        Other(parameters(), 0.01, subspace="rows", rank=2).load_state_dict(state)
    with pytest.raises(MismatchError, match="rank=2; here it is 3"):
        Subspace(parameters(), 0.01, subspace="rows", rank=3).load_state_dict(state)
    with pytest.raises(MismatchError, match="'rows'; here it is 'dct'"):
        Subspace(parameters(), 0.01, subspace="dct", rank=2).load_state_dict(state)
    with pytest.raises(MismatchError, match="7 parameters saved; here are 2"):
        Subspace(parameters()[:2], 0.01, subspace="rows", rank=2).load_state_dict(state)
    with pytest.raises(MismatchError, match="parameter 0"):
        Subspace(
            parameters()[1:3] + parameters()[:1] + parameters()[3:], 0.01, subspace="rows", rank=2
        ).load_state_dict({**state, "state": {0: state["state"][4]}})
    adamw = torch.optim.AdamW(parameters())
    with pytest.raises(MismatchError, match="not of eckart"):
        Subspace(parameters(), 0.01).load_state_dict(adamw.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "adm"}, "unknown rule 'adm'.*'adam'"),
        ({"subspace": "dtc"}, "unknown subspace"),
        ({"subspace": 3}, "subspace is one of"),
        ({"rank": 4}, "rank without a subspace"),
        ({"momentum": 0.9}, "has no momentum"),
        ({"lr": -1.0}, "lr is a number in"),
        ({"subspace": "power", "rank": 0}, "rank counts directions"),
        ({"subspace": "power", "rank": 1.5}, "a share in"),
        ({"subspace": "power", "every": 0}, "every counts steps"),
        ({"subspace": "power", "side": "left"}, "side is"),
        ({"subspace": "power", "carry": "kep"}, "carry is"),
        ({"feedback": "int8"}, "nothing to bring back"),
        ({"subspace": "rows", "feedback": "int4"}, "feedback is one of"),
        ({"state_dtype": "fp8"}, "state_dtype is one of"),
        ({"compute_dtype": "fp16"}, "compute_dtype is"),
        ({"nonfinite": "ignore"}, "nonfinite is"),
        ({"scale": "mup"}, "unknown scale"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]"),
        ({"guards": "radal"}, "unknown guard"),
        ({"weight_decay": -0.1, "lr": -1.0}, "2 problems"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Subspace(parameters(), **options)


def test_bad_parameters_and_gradients_are_refused() -> None:
    with pytest.raises(InputError, match="complex"):
        Subspace([nn.Parameter(torch.zeros(3, 4, dtype=torch.complex64))])
    with pytest.raises(InputError, match="int64"):
        Subspace([torch.zeros(3, 4, dtype=torch.int64)])
    with pytest.raises(InputError, match="does not add up"):
        Subspace([{"params": [nn.Parameter(torch.zeros(6, 4))], "split": (2, 3)}], rule="newton_schulz")
    embedding = nn.Embedding(5, 4, sparse=True)
    optimizer = Subspace(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(InputError, match="sparse=False"):
        optimizer.step()


def test_nonfinite_gradients() -> None:
    for value in (float("nan"), float("inf")):
        for wanted in ("skip", "raise"):
            params = parameters()
            optimizer = Subspace(params, 0.01, subspace="rows", rank=2, nonfinite=wanted)  # type: ignore[arg-type]
            run(optimizer, params, 0, 1)
            before = [p.detach().clone() for p in params]
            state = copy.deepcopy(optimizer.state_dict()["state"])
            for p in params:
                p.grad = torch.ones_like(p)
            params[2].grad[0, 0] = value  # type: ignore[index]
            if wanted == "raise":
                with pytest.raises(NotFiniteError, match="1 of 7 gradients"):
                    optimizer.step()
            else:
                optimizer.step()
                assert optimizer.skipped == 1
            assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
            after = optimizer.state_dict()["state"]
            assert all(torch.equal(state[i][k], after[i][k]) for i in state for k in state[i])


def test_a_closure_is_called_with_gradients_and_its_loss_returned() -> None:
    p = nn.Parameter(torch.ones(4, 6))
    optimizer = Subspace([p], 0.1, subspace="rows", rank=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == 24.0
    assert float(p.detach().square().sum()) < 24.0


def test_groups_hold_plain_data_and_differ() -> None:
    a, b, c = (nn.Parameter(torch.randn(6, 10)) for _ in range(3))
    optimizer = Subspace(
        [
            {"params": [a], "rank": None},
            {"params": [b], "subspace": Rows(rank=3, every=7), "lr": 0.5},
            {"params": [c], "rule": "sign", "guards": ["rms"]},
        ],
        0.01,
        subspace=Power(rank=2),
        rule=Adam(betas=(0.8, 0.9)),
        feedback=Feedback("bf16", decay=0.9),
    )
    first, second, third = optimizer.param_groups
    assert first["subspace"] is None
    assert (second["subspace"], second["rank"], second["every"], second["lr"]) == ("rows", 3, 7, 0.5)
    assert (third["rule"], third["guards"], third["rms_target"], third["subspace"]) == ("sign", ("rms",), 0.2, "power")
    assert first["betas"] == (0.8, 0.9)
    assert second["feedback_decay"] == 0.9
    for group in optimizer.param_groups:
        for key, value in group.items():
            if key != "params":
                assert isinstance(value, (int, float, str, bool, tuple, type(None))), key


def test_added_groups_and_schedulers() -> None:
    params = parameters()
    optimizer = Subspace(params[:2], 0.1, subspace="power", rank=2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.0 if t else 1.0)
    run(optimizer, params[:2], 0, 1)
    scheduler.step()
    before = [p.detach().clone() for p in params]
    run(optimizer, params[:2], 1, 2)
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    optimizer.add_param_group({"params": params[2:], "lr": 0.1})
    run(optimizer, params, 2, 3)
    assert all(not torch.equal(a, b) for a, b in zip(params[2:], before[2:], strict=True))
    cycle = Subspace(parameters(), 0.1, subspace="power", rank=2)
    torch.optim.lr_scheduler.OneCycleLR(cycle, max_lr=0.2, total_steps=5)
    assert cycle.param_groups[0]["betas"][0] == pytest.approx(0.95)


def test_vectors_and_what_is_no_matrix_are_adamw() -> None:
    ours, theirs = parameters(), parameters()
    optimizer = Subspace([{"params": ours, "matrix": False}], 0.02, subspace="rows", weight_decay=0.1, vector_scale=0.5)
    reference = torch.optim.AdamW(theirs, 0.01, weight_decay=0.1, fused=True)
    run(optimizer, ours, 0, 3)
    run(reference, theirs, 0, 3)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_maximize_goes_the_other_way() -> None:
    up, down = parameters(), parameters()
    options: dict[str, Any] = {"subspace": "power", "rank": 0.3, "feedback": "fp32"}
    run(Subspace(up, 0.01, maximize=True, **options), up, 0, 3)
    optimizer = Subspace(down, 0.01, **options)
    for t in range(3):
        generator = torch.Generator().manual_seed(t)
        for p in down:
            p.grad = -torch.randn(p.shape, generator=generator)
        optimizer.step()
    for a, b in zip(up, down, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # float32; the basis may flip signs of columns


def test_bfloat16_weights_move_on_average_by_steps_below_their_precision() -> None:
    p = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    q = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    rounded = Subspace([p], 1e-4, rule="sign", momentum=0.0, stochastic_rounding=True)
    nearest = Subspace([q], 1e-4, rule="sign", momentum=0.0)
    for _ in range(20):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        rounded.step()
        nearest.step()
    assert torch.equal(q, torch.ones_like(q))
    assert float(p.detach().float().mean()) == pytest.approx(1 - 20e-4, abs=2e-4)


def test_mixed_dtypes_and_missing_gradients_in_one_group() -> None:
    params = [nn.Parameter(torch.randn(6, 10).to(d)) for d in (torch.float64, torch.float32, torch.bfloat16)]
    params.append(nn.Parameter(torch.randn(6, 10)))
    optimizer = Subspace(params, 0.01, subspace="svd", rank=2, feedback="bf16", state_dtype="bf16")
    before = [p.detach().clone() for p in params]
    for t in range(3):
        for p in params[:3]:
            p.grad = torch.randn(6, 10, generator=torch.Generator().manual_seed(t)).to(p.dtype)
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(params[:3], before[:3], strict=True))
    assert torch.equal(params[3], before[3])
    assert not optimizer.state_dict()["state"].get(3)
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.bfloat16


def test_low_bit_state_follows_the_exact_run() -> None:
    ends = {}
    for stored in ("fp32", "bf16", "int8"):
        p = nn.Parameter(torch.randn(32, 64, generator=torch.Generator().manual_seed(1)))
        optimizer = Subspace([p], 0.01, subspace="rows", rank=0.5, feedback=stored, state_dtype=stored)  # type: ignore[arg-type]
        start = p.detach().clone()
        for _ in range(10):
            p.grad = p.detach().clone()
            optimizer.step()
        ends[stored] = p.detach() - start
    for stored in ("bf16", "int8"):
        assert (ends[stored] - ends["fp32"]).norm() < 0.1 * ends["fp32"].norm()


def test_state_bytes_of_a_quarter_of_the_directions() -> None:
    p = nn.Parameter(torch.randn(256, 1024))
    adamw = 8 * p.numel()
    for feedback, bound in (("int8", 1 / 2), (None, 1 / 3)):
        optimizer = Subspace([p], 0.01, subspace="dct", rank=0.25, feedback=feedback)  # type: ignore[arg-type]
        p.grad = torch.randn(256, 1024)
        optimizer.step()
        held = sum(value.numel() * value.element_size() for value in optimizer.state[p].values())
        assert held < bound * adamw


@pytest.mark.parametrize("every", [1, 3, 5])
def test_refreshes_are_spread_over_the_steps(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    params = [nn.Parameter(torch.randn(6, 10)) for _ in range(7)]
    optimizer = Subspace(params, 0.01, subspace="rows", rank=2, every=every)
    fits = []
    original = Rows.fit

    def counted(self: Rows, X: Tensor, *rest: Any) -> Any:
        fits[-1] += len(X)
        return original(self, X, *rest)

    monkeypatch.setattr(Rows, "fit", counted)
    for t in range(1 + 3 * every):
        fits.append(0)
        run(optimizer, params, t, t + 1)
    assert fits[0] == 7  # the first step has to begin all
    assert max(fits[1:]) <= -(-7 // every)
    assert sum(fits[1:]) == 3 * 7


def test_a_rank_that_spans_the_side_is_the_whole_space() -> None:
    a, b = nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(4, 6))
    left, right = Subspace([a], 0.01, subspace="power", rank=9, feedback="int8"), Subspace([b], 0.01, guards=())
    for t in range(3):
        a.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(t))
        b.grad = a.grad.clone()
        left.step()
        right.step()
    torch.testing.assert_close(a, b)
    assert set(left.state[a]) == {"step", "exp_avg", "exp_avg_sq"}


def test_report_measures_and_changes_nothing() -> None:
    params = parameters(torch.float64)
    names = [f"layer{i}" for i in range(len(params))]
    optimizer = Subspace(zip(names, params, strict=True), 0.01, subspace="svd", rank=2, every=1, feedback="fp32")
    run(optimizer, params, 0, 3)
    state, weights = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
    E = optimizer.state[params[0]]["feedback"][0].clone()
    shown = optimizer.report()
    after = optimizer.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(weights, params, strict=True))
    assert all(
        torch.equal(state["state"][i][k], after["state"][i][k]) for i in state["state"] for k in state["state"][i]
    )
    first = shown.layers[0]
    assert (first.name, first.rank, first.steps) == ("layer0", 2, 3)
    X = params[0].grad + E  # type: ignore[operator]
    values = torch.linalg.svdvals(X).square()
    assert first.captured == pytest.approx(float(values[:2].sum() / values.sum()))
    assert first.feedback == pytest.approx(float(E.norm()))
    assert first.top == pytest.approx(float(torch.linalg.svdvals(params[0].detach())[0]), rel=0.02)
    before = params[0].detach().clone()
    optimizer.step()
    assert first.update == pytest.approx(float((params[0].detach() - before).square().mean().sqrt()))
    assert len(str(shown).splitlines()) == 1 + len(shown.layers) == 6
    params[0].grad = None
    assert optimizer.report().layers[0].captured is None


def test_stacks_of_matrices_that_no_view_has_are_written_back() -> None:
    p = nn.Parameter(torch.randn(6, 3, 3, 3).to(memory_format=torch.channels_last))
    before = p.detach().clone()
    optimizer = Subspace([p], 0.1, rule="newton_schulz")
    p.grad = torch.randn(6, 3, 3, 3)
    optimizer.step()
    assert float((p - before).abs().min()) > 0
    assert p.is_contiguous(memory_format=torch.channels_last)


def test_a_role_of_convolutions_flattens_three_dimensions() -> None:
    p = nn.Parameter(torch.randn(6, 4, 3))
    optimizer = Subspace([{"params": [p], "role": "conv"}], 0.1, rule="newton_schulz")
    assert optimizer.param_groups[0]["view"] == "flatten"
    p.grad = torch.randn(6, 4, 3)
    optimizer.step()
    assert optimizer.state[p]["momentum"].shape == (1, 6, 12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_largest_numbers_are_finite(dtype: torch.dtype) -> None:
    p = torch.nn.Parameter(torch.zeros(3, 4, dtype=dtype))
    optimizer = Subspace([p], 0.1, rule="sign", momentum=0.0, nonfinite="raise")
    p.grad = torch.full_like(p, torch.finfo(dtype).max)
    optimizer.step()
    assert bool((p == -torch.tensor(0.1, dtype=dtype)).all())
    p.grad[1, 1] = -float("inf")
    with pytest.raises(NotFiniteError, match="1 of 1"):
        optimizer.step()
