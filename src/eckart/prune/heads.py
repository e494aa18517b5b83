r"""Fewer attention heads, the output map refitted to those that stay: in closed form, from moments.

*What it does.* Takes whole heads out of every attention of a model, the same number in each; where several query heads
share one head of keys and values, they leave with it. The output map is then the least-squares fit to the heads that
are left, and its bias, where there is one, takes up what the mean loses. What remains are smaller dense maps: less to
store and to compute, no zeros and no kernel.

*Formula.* z (heads · d) is what the output map W (m × heads · d) reads, Σ = E[z zᵀ] (centred where W has a bias),
G = E[g gᵀ] of the gradients of its output. Without the columns B of one head, W refitted, the loss rises by
tr(G W_B [Σ⁻¹]_BB⁻¹ W_Bᵀ) (optimal brain surgery on a block). The head with the least rise goes, W and Σ⁻¹ are
brought up to date, and so on. In the end W′ = W Σ_{:J} Σ_JJ⁻¹ on the columns J that stay.

*Cost.* O(n³) for n = heads · d per attention, and O(heads² d² m) for the scores.

*When it does not help.* A head is a coarse unit: at the same parameters, fewer directions in each head (values and
queries of :mod:`eckart.modules`) lose less, but those need Eckart's loader. Where the config of a family divides its
width by the number of heads (BERT, ViT), fewer heads need that loader too; Llama, Mistral, Qwen and Gemma state the
size of a head and load anywhere. In the claim below the refit does nearly all of it, and which scores chose the heads
matters little: with 4 of 8 heads left the loss rises by .003 nats with block scores and .011 with gate gradients, both
refitted, by .127 and .160 without; with 2 left by .028 and .025, and by .441 and .503.

*Departs from the paper in.* Kwon et al. choose binary masks by the diagonal and then the block-diagonal Fisher
information and fit one scale per head by least squares; here a whole block of columns is scored under Σ and G at once,
and all entries of W are fitted. Michel et al. order heads by E|∂loss/∂gate| and refit nothing; the claim has theirs
as the baseline.

*Reference.* W. Kwon, S. Kim, M. W. Mahoney, J. Hassoun, K. Keutzer, A. Gholami, “A Fast Post-Training Pruning Framework
for Transformers”, 2022, https://arxiv.org/abs/2204.09656; P. Michel, O. Levy, G. Neubig, “Are Sixteen Heads Really
Better than One?”, 2019, https://arxiv.org/abs/1905.10650.

*Example.*

>>> import torch
>>> from eckart.modules.heads import removal_order_of_groups
>>> generator = torch.Generator().manual_seed(0)
>>> a, b = torch.randn(2, 100, 2, generator=generator, dtype=torch.float64)
>>> Z = torch.cat([a, b, a @ torch.tensor([[1.0, 2.0], [0.0, 1.0]], dtype=torch.float64)], 1)  # head 2 repeats head 0
>>> W = torch.randn(4, 6, generator=generator, dtype=torch.float64)
>>> heads = [torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([4, 5])]
>>> order = removal_order_of_groups(W, Z.T @ Z / 100, heads)
>>> order[-1] in (0, 2)  # the first to go is one of the two that say the same
True
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm

from eckart.arch import Attention, Rows
from eckart.evidence import learned_problem
from eckart.evidence.trial import held_out_loss, train
from eckart.modules import UnitFacts, obs, prepare_unit
from eckart.modules.heads import PreparedHeads
from eckart.moments import Moments, SiteMoments
from eckart.prune.widths import narrowed_widths
from eckart.records import Claim, Paper, Technique, Unit, Verdict

LEFT = (4, 2)
"""Of 8 heads in the claim."""


def prune_heads(
    model: nn.Module,
    moments: Moments,
    *,
    keep: float,
    refit: bool = True,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> dict[str, tuple[int, ...]]:
    """Take heads out of every attention of a transformers model, in place; the heads of keys and values that stay.

    The result is by the name of the attention, in the order of the model. ``keep``: share of the heads of keys and
    values, in (0, 1], met from below; query heads leave with the head that they read. ``moments`` of all maps of the
    attentions, with gradients. ``include``, ``exclude``: see :func:`eckart.arch.find_sites`; an attention of which
    they leave out a map stays whole. The config is not changed: ``eckart.save`` does that, where it can.

    Raises InputError with everything that is wrong, BudgetError where no head would stay, MismatchError for moments of
    another model, NotFiniteError for NaN or Inf; the model is then as it was.
    """
    prepared = narrowed_widths(model, moments, "heads", keep, refit=refit, include=include, exclude=exclude)
    return {
        part.attention.name: tuple(part.kept(width))
        for part, width in prepared.values()
        if isinstance(part, PreparedHeads)
    }


HEADS, SIZE, WIDTH, VOCABULARY, CONTEXT = 8, 4, 32, 256, 8
STEPS = 200


class _Attentive(nn.Module):
    """Logits (n, 256) of the byte after each context (n, 8): one attention of 8 heads, read by the last byte."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.place = nn.Parameter(torch.randn(CONTEXT, WIDTH) * 0.1)
        self.query, self.key, self.value, self.output = (nn.Linear(WIDTH, HEADS * SIZE) for _ in range(4))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def heads(self, contexts: Tensor) -> tuple[Tensor, Tensor]:
        """The last byte's features h (n, width), and z (n, heads · size)."""
        x = self.embed(contexts) * WIDTH**0.5 * 0.1 + self.place
        h = x[:, -1]
        q = self.query(h).view(-1, HEADS, 1, SIZE)
        k, v = (part(x).view(-1, CONTEXT, HEADS, SIZE).transpose(1, 2) for part in (self.key, self.value))
        return h, nn.functional.scaled_dot_product_attention(q, k, v).flatten(1)

    def logits(self, h: Tensor, attended: Tensor) -> Tensor:
        found: Tensor = self.head(layer_norm(h + attended, (WIDTH,)))
        return found

    def forward(self, contexts: Tensor) -> Tensor:
        h, z = self.heads(contexts)
        return self.logits(h, self.output(z))


@dataclass(frozen=True)
class _Trial:
    model: _Attentive
    prepared: PreparedHeads
    importance: tuple[int, ...]
    """Heads by falling E|∂loss/∂gate|."""
    loss: float
    """Held out, with all heads."""


@functools.cache
def _trial() -> _Trial:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _Attentive()
    train(model, torch.optim.Adam(model.parameters(), lr=4e-3), STEPS, seed=0)
    sample = learned_problem().calibration[:4096].long()
    contexts, nexts = sample[:, :CONTEXT], sample[:, CONTEXT]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        h, z = model.heads(contexts)
        y = model.output(z)
        drawn = torch.multinomial(model.logits(h, y).softmax(-1), 1, generator=generator).squeeze(1)
    gradient = _gradient(y, lambda attended: cross_entropy(model.logits(h, attended), drawn, reduction="sum"))
    gates = torch.ones(len(z), HEADS)
    gated = _gradient(
        gates,
        lambda gate: cross_entropy(
            model.logits(h, model.output(z * gate.repeat_interleave(SIZE, 1))), nexts, reduction="sum"
        ),
    )
    X, g = z.double(), gradient.double()
    moments = SiteMoments(count=len(X), mean=X.mean(0), second=X.T @ X / len(X), gradient=g.T @ g / len(g))
    rows = {name: Rows(site=name, stop=HEADS * SIZE) for name in ("query", "key", "value")}
    facts = Attention(
        name="attention",
        query=rows["query"],
        key=rows["key"],
        value=rows["value"],
        output="output",
        heads=HEADS,
        kv_heads=HEADS,
        head_dim=SIZE,
        rotary=False,
        rotary_dim=0,
        query_norm=None,
        key_norm=None,
        cross=False,
        depth=0,
    )
    unit = Unit(
        name="attention#heads",
        kind="heads",
        sites=(*rows, "output"),
        full_rank=HEADS,
        width_parameters=1,
        width_indices=0,
    )
    weights = {
        name: {key: value.detach() for key, value in model.get_submodule(name).named_parameters()}
        for name in unit.sites
    }
    prepared = prepare_unit(UnitFacts(unit, facts), weights, {"output": moments}, obs.scores_of(obs.Options()))
    if not isinstance(prepared, PreparedHeads):
        raise TypeError(type(prepared).__name__)
    order = gated.abs().mean(0).argsort(descending=True, stable=True)
    return _Trial(model, prepared, tuple(order.tolist()), held_out_loss(model))


def _gradient(at: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """∂loss/∂at, one row per sample where the loss is a sum over samples."""
    point = at.detach().requires_grad_()
    (found,) = torch.autograd.grad(loss(point), point)
    return found


def _rise(order: tuple[int, ...], left: int, refit: bool) -> float:
    """Rise of the held-out loss with the first heads of an order."""
    trial = _trial()
    part = PreparedHeads(**{**vars(trial.prepared), "order": order, "refit": refit})
    _, weight, bias = part.stand_in(left)
    output = trial.model.output
    saved = output.weight.detach().clone(), output.bias.detach().clone()
    with torch.no_grad():
        output.weight.copy_(weight)
        output.bias.copy_(bias if bias is not None else saved[1])
        rise = held_out_loss(trial.model) - trial.loss
        output.weight.copy_(saved[0])
        output.bias.copy_(saved[1])
    return rise


def _run_claim() -> Verdict:
    trial = _trial()
    figures: dict[str, float] = {}
    held = True
    for left in LEFT:
        ours = _rise(trial.prepared.order, left, refit=True)
        importance = _rise(trial.importance, left, refit=False)
        figures[f"block scores and refit: loss rise with {left} of {HEADS} heads"] = ours
        figures[f"block scores, no refit: loss rise with {left} of {HEADS} heads"] = _rise(
            trial.prepared.order, left, refit=False
        )
        figures[f"gate gradients and refit: loss rise with {left} of {HEADS} heads"] = _rise(
            trial.importance, left, refit=True
        )
        figures[f"gate gradients, no refit: loss rise with {left} of {HEADS} heads"] = importance
        held = held and ours < importance
    return Verdict(held=held, figures=figures, note=f"one attention trained for {STEPS} steps on bytes")


METHOD = Technique(
    name="heads",
    summary="whole heads by block scores in units of the loss, the output map refitted",
    paper=Paper(
        authors="W. Kwon et al.",
        title="A Fast Post-Training Pruning Framework for Transformers",
        year=2022,
        link="https://arxiv.org/abs/2204.09656",
    ),
    entry=prune_heads,
    claim=Claim(
        statement="With 4 and 2 of 8 heads left, block scores and a refit raise the held-out loss less than the heads "
        "of largest gate gradients, as they are.",
        source="the paper's Table 1: masks rearranged and tuned by least squares, against gradient scores alone",
        run=_run_claim,
    ),
)
