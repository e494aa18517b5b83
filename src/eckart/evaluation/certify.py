"""The certificate: what was predicted beside what was measured."""

from __future__ import annotations

from dataclasses import dataclass

from eckart.errors import InputError
from eckart.records import Evaluation, Interval, Outcome

APART = 2.0
"""Prediction and measurement, or two halves of the data, may differ by this factor without a warning."""
_NOTHING = 1e-6

_MEASURED: dict[str, tuple[str, str]] = {
    "embedding": ("cosine", "1 − cosine, per sentence"),
    "causal-lm": ("kl", "KL to the original, nats per token"),
    "masked-lm": ("kl", "KL to the original, nats per masked token"),
    "logits": ("kl", "KL to the original, nats per position"),
}


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """The predicted rise of the loss and the change that was measured from end to end."""

    predicted: float
    """½ Σ tr(G ΔW Σ ΔWᵀ) over all sites, per unit: it assumes small changes that do not interact."""
    measured: Interval
    """The same quantity, measured on other data."""
    ratio: float
    """measured / predicted; 1 where both are zero, infinity where only the prediction is."""
    quantity: str
    """What is compared, with its unit."""
    warning: str | None = None
    """Set where the two part by more than a factor of 2."""


@dataclass(frozen=True, kw_only=True)
class LayerWarning:
    """A site whose error on unseen tokens is far above that on the tokens its factors were fitted to."""

    site: str
    predicted: float
    held_out: float
    text: str


def certify(outcome: Outcome, evaluation: Evaluation) -> Certificate | None:
    """The predicted loss of the outcome against the evaluation; None where the method predicts no loss.

    For embedding models the loss is the squared distance of normalised embeddings halved, which is
    1 − cosine. For models with a vocabulary, or other logits, it is the second-order estimate of
    KL(original ‖ compressed), per token.

    Raises InputError where the evaluation lacks the figure to compare with.
    """
    if outcome.predicted_loss is None:
        return None
    name, quantity = _MEASURED[evaluation.task]
    if name not in evaluation.metrics:
        raise InputError(
            f"a certificate for {evaluation.task} needs the figure {name!r}; "
            f"the evaluation has {', '.join(evaluation.metrics) or 'none'}."
        )
    found = evaluation.metrics[name]
    if name == "cosine":
        found = Interval(mean=1 - found.mean, low=1 - found.high, high=1 - found.low, n=found.n, unit="1 − cosine")
    return compare(outcome.predicted_loss, found, quantity)


def compare(predicted: float, measured: Interval, quantity: str = "loss") -> Certificate:
    """A prediction beside a measurement in the same unit; differences below 1e-6 count as none."""
    ratio = _ratio(measured.mean, predicted)
    warning = None
    if measured.mean > APART * predicted + _NOTHING:
        warning = (
            f"the measured change ({measured.mean:.3g}, {quantity}) is {_times(ratio)} the predicted one "
            f"({predicted:.3g}). Errors of layers amplify each other here: remove less, or calibrate on more "
            "data."
        )
    elif predicted > APART * measured.mean + _NOTHING:
        warning = (
            f"the measured change ({measured.mean:.3g}, {quantity}) is only {ratio:.2g} times the predicted "
            f"one ({predicted:.3g}). The prediction assumes small changes; trust the measurement."
        )
    return Certificate(predicted=predicted, measured=measured, ratio=ratio, quantity=quantity, warning=warning)


def layer_warnings(outcome: Outcome) -> tuple[LayerWarning, ...]:
    """The sites whose held-out error is more than twice the predicted one, worst first.

    Errors below 1e-6 of the objective count as none.
    """
    found = [
        LayerWarning(
            site=layer.site.name,
            predicted=layer.predicted,
            held_out=layer.held_out,
            text=(
                f"{layer.site.name}: error {layer.held_out:.3g} on held-out tokens, {layer.predicted:.3g} on "
                "those it was fitted to. Calibrate on more tokens, or keep more of it."
            ),
        )
        for layer in outcome.layers
        if layer.held_out is not None and layer.held_out > max(APART * layer.predicted, _NOTHING)
    ]
    return tuple(sorted(found, key=lambda one: -_ratio(one.held_out, one.predicted)))


def _ratio(measured: float, predicted: float) -> float:
    if predicted > 0:
        return measured / predicted
    return 1.0 if measured <= _NOTHING else float("inf")


def _times(ratio: float) -> str:
    return "infinitely more than" if ratio == float("inf") else f"{ratio:.2g} times"
