"""Losses, bits and divergences: identities, slow twins with torch's own functions, and bad input."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from eckart.errors import InputError, MismatchError, NotFiniteError
from eckart.evaluation import evaluate_causal, evaluate_logits, evaluate_masked
from eckart.evaluation.language import compare_logits, draw_mask

VOCABULARY = 23


def table(seed: int, classes: int = VOCABULARY, dtype: torch.dtype = torch.float64) -> nn.Embedding:
    """A bigram model: the logits of the next token are a row of a table."""
    weight = torch.randn(VOCABULARY, classes, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return nn.Embedding.from_pretrained(weight)


def forward(model: nn.Embedding) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda batch: model(batch["input_ids"])


def windows(n: int = 60, length: int = 10, seed: int = 0, batch: int = 16) -> list[dict[str, Tensor]]:
    ids = torch.randint(VOCABULARY, (n, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": part} for part in ids.split(batch)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_model_equals_itself(dtype: torch.dtype) -> None:
    model = forward(table(0, dtype=dtype))
    found = evaluate_causal(model, model, windows()).metrics
    assert found["kl"].mean == found["loss_rise"].mean == 0
    assert found["loss_rise"].low == found["loss_rise"].high == 0
    assert found["agreement"].mean == 1
    assert found["loss"].mean == found["loss_base"].mean


def test_figures_are_those_of_torch() -> None:
    model, base = table(1), table(2)
    batches = windows()
    ids = torch.cat([batch["input_ids"] for batch in batches])
    ours, theirs = (m(ids[:, :-1]).reshape(-1, VOCABULARY) for m in (model, base))
    target = ids[:, 1:].reshape(-1)
    sizes = [torch.full((len(batch["input_ids"]),), 27.0) for batch in batches]
    found = evaluate_causal(forward(model), forward(base), batches, row_bytes=sizes).metrics
    loss, loss_base = float(cross_entropy(ours, target)), float(cross_entropy(theirs, target))
    kl = kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean")
    assert found["loss"].mean == pytest.approx(loss, abs=1e-12)
    assert found["loss_rise"].mean == pytest.approx(loss - loss_base, abs=1e-12)
    assert found["kl"].mean == pytest.approx(float(kl), abs=1e-12)
    assert found["agreement"].mean == pytest.approx(float((ours.argmax(1) == theirs.argmax(1)).double().mean()))
    assert found["bits_per_byte"].mean == pytest.approx(loss * 9 / 27 / math.log(2), abs=1e-12)
    assert found["bits_per_byte_base"].mean == pytest.approx(loss_base * 9 / 27 / math.log(2), abs=1e-12)


def test_uniform_predictions_cost_log2_of_the_vocabulary() -> None:
    flat = nn.Embedding.from_pretrained(torch.zeros(VOCABULARY, VOCABULARY, dtype=torch.float64))
    sizes = [torch.full((len(batch["input_ids"]),), 9.0) for batch in windows()]
    found = evaluate_causal(forward(flat), forward(flat), windows(), row_bytes=sizes).metrics
    assert found["bits_per_byte"].mean == pytest.approx(math.log2(VOCABULARY), abs=1e-12)


def test_padding_is_not_scored() -> None:
    model, base = table(1), table(2)
    ids = windows(n=4, batch=4)[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    padded = evaluate_causal(forward(model), forward(base), [{"input_ids": ids, "attention_mask": mask}])
    cut = evaluate_causal(forward(model), forward(base), [{"input_ids": ids[:, :6]}])
    assert padded.metrics["kl"].mean == pytest.approx(cut.metrics["kl"].mean, abs=1e-14)
    assert padded.protocol["predicted_tokens"] == cut.protocol["predicted_tokens"] == 20


def test_batching_changes_nothing() -> None:
    model, base = forward(table(1)), forward(table(2))
    one, many = (evaluate_causal(model, base, windows(batch=size)).metrics["kl"] for size in (60, 7))
    assert one.mean == pytest.approx(many.mean, abs=1e-13)
    assert one.low == pytest.approx(many.low, abs=1e-13)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, base, batches = forward(table(1)), forward(table(2)), windows()
    whole = evaluate_causal(model, base, batches).metrics["kl"].mean
    monkeypatch.setattr("eckart.evaluation.language._CHUNK", 5 * VOCABULARY)
    assert evaluate_causal(model, base, batches).metrics["kl"].mean == pytest.approx(whole, abs=1e-13)


def test_another_vocabulary_is_a_clear_error() -> None:
    with pytest.raises(MismatchError, match="one vocabulary"):
        evaluate_causal(forward(table(1, classes=24)), forward(table(1)), windows())


def test_nan_is_a_clear_error() -> None:
    bad = table(1)
    bad.weight.data.fill_(torch.nan)
    with pytest.raises(NotFiniteError, match="NaN"):
        evaluate_causal(forward(bad), forward(table(1)), windows())


def test_no_batches_is_a_clear_error() -> None:
    with pytest.raises(InputError, match="nothing to evaluate"):
        evaluate_causal(forward(table(1)), forward(table(1)), [])


def test_few_windows_are_warned_of() -> None:
    model = forward(table(1))
    assert "only 3 windows" in evaluate_causal(model, model, windows(n=3)).warnings[0]
    assert evaluate_causal(model, model, windows(n=60)).warnings == ()


class TestMasked:
    def test_a_model_equals_itself(self) -> None:
        model = forward(table(0))
        found = evaluate_masked(model, model, windows(), mask_token=0).metrics
        assert found["kl"].mean == found["loss_rise"].mean == 0
        assert found["agreement"].mean == 1

    def test_models_see_the_mask_and_are_scored_on_what_was_there(self) -> None:
        hidden: list[Tensor] = []

        def spy(batch: dict[str, Tensor]) -> Tensor:
            hidden.append(batch["input_ids"])
            return table(1)(batch["input_ids"])

        ids = windows(n=8, batch=8)[0]["input_ids"].clamp(min=1)
        found = evaluate_masked(spy, forward(table(2)), [{"input_ids": ids}], mask_token=0, share=0.3)
        was = hidden[0] == 0
        assert torch.equal(hidden[0][~was], ids[~was])
        assert was.sum(1).tolist() == [3] * 8
        row = table(1).weight[0].log_softmax(-1)
        expected = -float(row[ids[was]].mean())
        assert found.metrics["loss"].mean == pytest.approx(expected, abs=1e-12)
        assert found.metrics["bits_per_masked_token"].mean == pytest.approx(expected / math.log(2), abs=1e-12)
        assert found.protocol["masked_tokens"] == 24

    def test_the_seed_decides_the_mask(self) -> None:
        model, base = forward(table(1)), forward(table(2))
        one, again, other = (
            evaluate_masked(model, base, windows(), mask_token=0, seed=seed).metrics["loss"].mean for seed in (1, 1, 2)
        )
        assert one == again != other

    def test_special_tokens_and_padding_are_never_hidden(self) -> None:
        free = torch.tensor([[False, True, True, True, False, False]]).expand(50, -1)
        mask = draw_mask(free, 0.5, torch.Generator().manual_seed(0))
        assert not bool(mask[:, [0, 4, 5]].any())
        assert mask.sum(1).tolist() == [2] * 50
        assert bool(mask[:, 1:4].any(0).all())

    def test_a_row_of_special_tokens_is_an_error(self) -> None:
        ids = torch.tensor([[5, 5, 5, 5]])
        with pytest.raises(InputError, match="none to mask"):
            evaluate_masked(forward(table(1)), forward(table(1)), [{"input_ids": ids}], mask_token=0, special=[5])


class TestLogits:
    def test_classes_of_a_row(self) -> None:
        x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        W = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        found = evaluate_logits(lambda b: 2 * b @ W, lambda b: b @ W, x.split(25)).metrics
        expected = kl_div((2 * x @ W).log_softmax(-1), (x @ W).log_softmax(-1), log_target=True, reduction="batchmean")
        assert found["kl"].mean == pytest.approx(float(expected), abs=1e-12)
        assert found["agreement"].mean == 1

    def test_padding_is_left_out(self) -> None:
        ids = windows(n=4, batch=4)[0]["input_ids"]
        mask = torch.ones_like(ids)
        mask[:, 5:] = 0
        found = evaluate_logits(forward(table(1)), forward(table(2)), [{"input_ids": ids, "attention_mask": mask}])
        assert found.protocol["positions"] == 20

    def test_logits_of_another_shape_are_an_error(self) -> None:
        with pytest.raises(InputError, match="expected logits"):
            evaluate_logits(lambda b: b, lambda b: b, [torch.zeros(2, 3, 4, 5)])


def test_figures_need_no_targets() -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    sums = compare_logits(logits, logits, torch.ones(2, 3, dtype=torch.bool))
    assert sums.loss.tolist() == [0, 0]
    assert sums.positions.tolist() == [3, 3]
