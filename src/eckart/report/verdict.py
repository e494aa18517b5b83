"""What a run comes to, in words: one sentence, the meaning of each metric, the layers that need a look."""

from __future__ import annotations

from dataclasses import dataclass

from eckart.records import BUDGET_WORDS, Evaluation, Interval, LayerOutcome, Outcome
from eckart.report import format as fmt

FLAG_FACTOR = 2.0
"""A held-out error more than this many times the predicted one is flagged."""
FLAG_FLOOR = 1e-6
"""Relative errors below this count as none."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What a figure of an evaluation means."""

    label: str
    meaning: str
    same: float | None
    """Its value for a model equal to the original; None where that depends on the data."""
    phrase: str = ""
    """The figure in a sentence, ``{}`` standing for the number and ``[unit]`` for its unit."""


METRICS: dict[str, Metric] = {
    "cosine": Metric(
        label="Cosine to the original",
        meaning="Mean cosine between the embedding of a text by this model and by the original.",
        same=1.0,
        phrase="its embeddings have a mean cosine of {} to the original’s",
    ),
    "neighbours@10": Metric(
        label="Shared neighbours",
        meaning="Share of each text’s ten nearest neighbours that both models agree on.",
        same=1.0,
        phrase="it finds {} of the original’s ten nearest neighbours",
    ),
    "rank_correlation": Metric(
        label="Rank correlation",
        meaning="Spearman correlation of the similarities between texts, this model against the original.",
        same=1.0,
        phrase="its similarities have a rank correlation of {} with the original’s",
    ),
    "bits_per_byte": Metric(
        label="Bits per byte",
        meaning="Bits the model needs for one byte of unseen text, whatever the tokenizer; lower is better.",
        same=None,
        phrase="it needs {} [unit]",
    ),
    "bits_per_masked_token": Metric(
        label="Bits per masked token",
        meaning="Bits the model needs to fill in one hidden token; lower is better.",
        same=None,
        phrase="it needs {} [unit]",
    ),
    "loss": Metric(
        label="Loss",
        meaning="Mean cross-entropy on unseen text; lower is better.",
        same=None,
        phrase="its loss is {} [unit]",
    ),
    "agreement": Metric(
        label="Same first choice",
        meaning="Share of positions where both models find the same token, or class, the most likely.",
        same=1.0,
        phrase="it shares {} of the original’s first choices",
    ),
    "loss_rise": Metric(
        label="Rise of the loss",
        meaning="Mean loss of this model minus that of the original, on the same tokens.",
        same=0.0,
        phrase="its loss is {} [unit] above the original’s",
    ),
    "kl": Metric(
        label="Divergence from the original",
        meaning="Kullback–Leibler divergence between the original’s predictions and this model’s.",
        same=0.0,
        phrase="its predictions diverge from the original’s by {} [unit]",
    ),
}

_HEADLINES = {
    "embedding": ("cosine",),
    "causal-lm": ("loss_rise", "bits_per_byte", "kl"),
    "masked-lm": ("loss_rise", "bits_per_byte", "kl"),
    "logits": ("kl",),
}


def metric_of(name: str) -> Metric:
    """The meaning of a metric; one that is not in the table keeps its own name."""
    plain = name.replace("_", " ")
    return METRICS.get(name) or Metric(
        label=plain[:1].upper() + plain[1:], meaning="", same=None, phrase=f"its {plain} is {{}}"
    )


def headline(evaluation: Evaluation) -> tuple[str, Interval] | None:
    """The metric that speaks for the whole evaluation."""
    for name in (*_HEADLINES[evaluation.task], *evaluation.metrics):
        if name in evaluation.metrics:
            return name, evaluation.metrics[name]
    return None


def flagged(layer: LayerOutcome) -> bool:
    """Whether the held-out error is more than FLAG_FACTOR times what was predicted."""
    return (
        layer.form != "dense"
        and layer.held_out is not None
        and layer.held_out > max(FLAG_FACTOR * layer.predicted, FLAG_FLOOR)
    )


def kept(layer: LayerOutcome) -> float:
    """Share of the layer's parameters that are left."""
    return layer.after.parameters / max(1, layer.before.parameters)


def verdict(outcome: Outcome, evaluation: Evaluation | None, title: str) -> tuple[tuple[str, bool], ...]:
    """The run in one sentence, as pieces (text, whether it is one of the numbers that matter)."""
    total, dense = len(outcome.layers), sum(layer.form == "dense" for layer in outcome.layers)
    before, after = outcome.sites_before, outcome.sites_after
    parameters = after.parameters / max(1, before.parameters)
    share = after.bytes / max(1, before.bytes)
    in_bytes = share < 0.99 * parameters  # numbers of fewer bits, or zeros that are not stored
    whole = outcome.model_before, outcome.model_after
    sizes = [fmt.human_bytes(one.bytes) if in_bytes else fmt.count(one.parameters) for one in whole]
    pieces: list[tuple[str, bool]] = [
        (f"{title} keeps ", False),
        (fmt.share(share if in_bytes else parameters), True),
        (f" of the {'bytes' if in_bytes else 'parameters'} of {total} layer{'' if total == 1 else 's'}", False),
        (f" ({dense} of them kept dense)" if dense else "", False),
        (" and goes from ", False),
        (sizes[0], True),
        (" to ", False),
        (sizes[1], True),
        (" as a whole" if in_bytes else " parameters as a whole", False),
    ]
    found = headline(evaluation) if evaluation else None
    if evaluation and found:
        name, value = found
        start, _, end = metric_of(name).phrase.replace("[unit]", value.unit or "nats").partition("{}")
        pieces += [
            (f"; on {fmt.count(value.n)} unseen {samples_of(evaluation)} {start}", False),
            (fmt.mean(value), True),
            (f"{end} (95{fmt.SPACE}% interval {fmt.interval(value)})", False),
        ]
        if evaluation.latency:
            last = max(evaluation.latency, key=lambda run: run.batch)
            pieces += [(", and at batch ", False), (str(last.batch), False), (" it is ", False)]
            pieces += [(fmt.speed(last.speedup), True)]
        pieces.append((".", False))
    elif outcome.predicted_loss is not None:
        pieces += [("; the loss is predicted to rise by ", False), (fmt.figure(outcome.predicted_loss), True)]
        pieces.append((", which was not measured.", False))
    else:
        pieces.append(("; its quality was not measured.", False))
    return tuple(piece for piece in pieces if piece[0])


def verdict_text(outcome: Outcome, evaluation: Evaluation | None, title: str) -> str:
    """The sentence as plain text."""
    return "".join(text for text, _ in verdict(outcome, evaluation, title))


def samples_of(evaluation: Evaluation) -> str:
    """What ``n`` of the intervals counts."""
    return f"{evaluation.protocol.get('unit', 'sample')}s"


@dataclass(frozen=True, kw_only=True)
class BudgetReached:
    """What was asked for and what came out, in the unit that was asked for."""

    words: str
    asked: float
    reached: float
    full: float | None
    """The original’s value; None for a ceiling on the loss, which the original does not have."""
    asked_text: str
    reached_text: str
    full_text: str


def budget_reached(outcome: Outcome) -> BudgetReached | None:
    """Reads the budget of an outcome; None where it was a plan or words that carry no number."""
    unit, _, rest = outcome.budget.partition(" ")
    number = rest.partition(" ")[0]
    if unit not in BUDGET_WORDS or not _is_number(number):
        return None
    asked = float(number)
    before, after = outcome.model_before, outcome.model_after
    sites_before, sites_after = outcome.sites_before, outcome.sites_after
    reached, full, show = {
        "keep": (sites_after.parameters / max(1, sites_before.parameters), 1.0, fmt.share),
        "model_keep": (after.parameters / max(1, before.parameters), 1.0, fmt.share),
        "parameters": (after.parameters, before.parameters, fmt.count),
        "bytes": (after.bytes, before.bytes, fmt.human_bytes),
        "macs": (sites_after.macs, sites_before.macs, fmt.count),
        "loss": (outcome.predicted_loss, None, fmt.figure),
    }[unit]
    if reached is None:
        return None
    return BudgetReached(
        words=BUDGET_WORDS[unit],
        asked=asked,
        reached=reached,
        full=full,
        asked_text=show(asked),
        reached_text=show(reached),
        full_text="" if full is None else show(full),
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
