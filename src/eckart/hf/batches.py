"""Texts as batches of tokens: sentences for models that embed, windows of running text for the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from eckart.errors import InputError
from eckart.hf.models import LoadedModel, Task

DEFAULT_LENGTH: dict[Task, int] = {"embedding": 128, "causal-lm": 256, "masked-lm": 256, "logits": 256}
"""Tokens of a sentence at most, or of a window exactly, capped by what the model takes."""
DEFAULT_SAMPLES: dict[Task, int] = {"embedding": 512, "causal-lm": 200, "masked-lm": 200, "logits": 200}
"""Sentences or windows of a calibration: 200 windows of 256 are 51,200 tokens."""

_POOL = 1 << 20
"""Tokens out of which windows are drawn with a seed."""
_BLOCK = 1 << 16


@dataclass(frozen=True, eq=False)
class TextBatches(Sequence[dict[str, Tensor]]):
    """Batches for ``model(**batch)``, with the bytes of text that stand behind them."""

    batches: tuple[dict[str, Tensor], ...]
    row_bytes: tuple[Tensor, ...]
    """For each batch (rows,): UTF-8 bytes of the text of a row; of a window, those of all tokens but the
    first position, which has nothing to be predicted from."""
    unit: Literal["sentence", "window"]
    length: int
    """Tokens of a sentence at most, or of a window."""
    tokens: int
    """Tokens in all batches, padding left out."""
    truncated: int = 0
    """Sentences that were cut to the length."""

    @overload
    def __getitem__(self, index: int) -> dict[str, Tensor]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[dict[str, Tensor]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Tensor] | Sequence[dict[str, Tensor]]:
        return self.batches[index]

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def rows(self) -> int:
        """Sentences or windows in all batches."""
        return sum(len(bytes_) for bytes_ in self.row_bytes)


def default_length(loaded: LoadedModel) -> int:
    """Tokens of a sentence or a window where the caller names no length."""
    return min(DEFAULT_LENGTH[loaded.task], loaded.max_length or DEFAULT_LENGTH[loaded.task])


def text_batches(
    loaded: LoadedModel,
    texts: Sequence[str],
    *,
    length: int | None = None,
    batch_size: int = 16,
    samples: int | None = None,
    seed: int | None = None,
) -> TextBatches:
    """Tokenised batches on the device of the model, of what its task reads.

    Embedding models get the first ``samples`` sentences, cut to ``length`` tokens, sorted by length and
    padded; ``attention_mask`` marks the padding. All others get the first ``samples`` windows of exactly
    ``length`` tokens of the texts joined by line breaks, each with the special tokens that the tokenizer puts
    around a text (a causal model's window gets only those in front); what does not fill a window is dropped.
    An encoder-decoder reads the first half of a window and predicts the second. With a ``seed``, the samples
    are drawn at random instead of being the first: out of all sentences, or out of the windows of the first
    million tokens.

    Raises InputError where the model has no tokenizer, where ``length`` is more than the model takes, and
    where the texts are empty or too short for one window.
    """
    if loaded.tokenizer is None:
        raise InputError(
            f"{loaded.name} has no tokenizer, so it cannot read texts. Pass tokenizer=, or tensor batches."
        )
    if batch_size < 1 or (samples is not None and samples < 1):
        raise InputError(f"batch_size and samples count from 1; got {batch_size} and {samples}.")
    length = default_length(loaded) if length is None else length
    if length < 4 or (loaded.max_length is not None and length > loaded.max_length):
        raise InputError(
            f"length {length}: expected 4 to {loaded.max_length or 'any number of'} tokens for {loaded.name}."
        )
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise InputError("the data holds no text: every entry is empty. Give a file with text in it.")
    if loaded.task == "embedding":
        chosen = [texts[i] for i in _draw(len(texts), samples, seed)]
        return _sentences(loaded, chosen, length, batch_size)
    return _windows(loaded, texts, length, batch_size, samples, seed)


def _draw(n: int, samples: int | None, seed: int | None) -> list[int]:
    """Which of n are taken, in order: the first, or with a seed any."""
    if samples is None or samples >= n:
        return list(range(n))
    if seed is None:
        return list(range(samples))
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(n, generator=generator)[:samples].tolist())


def _sentences(loaded: LoadedModel, texts: Sequence[str], length: int, batch_size: int) -> TextBatches:
    tokenizer: Any = loaded.tokenizer
    ids = tokenizer(list(texts), verbose=False)["input_ids"]
    cut = [i for i, row in enumerate(ids) if len(row) > length]
    for i in cut:
        ids[i] = tokenizer(texts[i], truncation=True, max_length=length)["input_ids"]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    batches, row_bytes = [], []
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        width = max(len(ids[i]) for i in rows)
        tokens = torch.tensor([ids[i] + [pad] * (width - len(ids[i])) for i in rows])
        mask = torch.tensor([[1] * len(ids[i]) + [0] * (width - len(ids[i])) for i in rows])
        batches.append({"input_ids": tokens.to(loaded.device), "attention_mask": mask.to(loaded.device)})
        row_bytes.append(torch.tensor([len(texts[i].encode()) for i in rows], dtype=torch.float64))
    return TextBatches(
        batches=tuple(batches),
        row_bytes=tuple(row_bytes),
        unit="sentence",
        length=length,
        tokens=sum(map(len, ids)),
        truncated=len(cut),
    )


def _windows(
    loaded: LoadedModel,
    texts: Sequence[str],
    length: int,
    batch_size: int,
    samples: int | None,
    seed: int | None,
) -> TextBatches:
    prefix, suffix = _special_tokens(loaded.tokenizer)
    if loaded.task == "causal-lm":
        suffix = []
    body = length - len(prefix) - len(suffix)
    wanted = None if samples is None else max(samples * body, 0 if seed is None else _POOL)
    parts: list[tuple[list[int], NDArray[numpy.float64]]] = []
    found = 0
    for block in _blocks("\n".join(texts)):
        parts.append(_tokenise(loaded.tokenizer, block))
        found += len(parts[-1][0])
        if wanted is not None and found >= wanted:
            break
    whole = found // body
    if whole == 0:
        raise InputError(
            f"the data has {found} tokens, less than one window of {length}. Give more text or a smaller length."
        )
    chosen = _draw(whole, samples, seed)
    count = len(chosen)
    running = torch.tensor([token for ids, _ in parts for token in ids][: whole * body]).view(whole, body)[chosen]
    sizes = torch.from_numpy(numpy.concatenate([size for _, size in parts])[: whole * body])
    sizes = sizes.view(whole, body)[chosen]
    scored = sizes.sum(1) if prefix else sizes[:, 1:].sum(1)
    front, back = torch.tensor([prefix] * count), torch.tensor([suffix] * count)
    config = getattr(loaded.model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        rows = _halves(running, back.long(), _decoder_start(config, loaded))
        scored = sizes[:, body // 2 :].sum(1)
    else:
        rows = {"input_ids": torch.cat([front.long(), running, back.long()], dim=1)}
    return TextBatches(
        batches=tuple(
            {key: value[start : start + batch_size].to(loaded.device) for key, value in rows.items()}
            for start in range(0, count, batch_size)
        ),
        row_bytes=tuple(scored[start : start + batch_size] for start in range(0, count, batch_size)),
        unit="window",
        length=length,
        tokens=count * length,
    )


def _halves(running: Tensor, suffix: Tensor, start: int) -> dict[str, Tensor]:
    """First half of each window for the encoder, second half, shifted by one, for the decoder."""
    half = running.shape[1] // 2
    first, second = running[:, :half], running[:, half:]
    return {
        "input_ids": torch.cat([first, suffix], dim=1),
        "decoder_input_ids": torch.cat([torch.full_like(second[:, :1], start), second[:, :-1]], dim=1),
    }


def _decoder_start(config: Any, loaded: LoadedModel) -> int:
    for start in (config.decoder_start_token_id, config.pad_token_id, getattr(config, "bos_token_id", None)):
        if isinstance(start, int):
            return start
    raise InputError(f"{loaded.name} names no decoder_start_token_id in its config. Set it, or give batches.")


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


def _blocks(text: str) -> Iterator[str]:
    """Pieces of about 64k characters, cut after a line break where there is one."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + _BLOCK, start + 4 * _BLOCK) + 1 or start + 4 * _BLOCK
        yield text[start:end]
        start = end


def _tokenise(tokenizer: Any, text: str) -> tuple[list[int], NDArray[numpy.float64]]:
    """Ids of the text without special tokens, and for each the UTF-8 bytes of text up to the token before it.

    Bytes are counted by the ends of the tokens, so that they add up to the bytes of the text even where a
    character is split among tokens. A tokenizer without offsets shares them evenly.
    """
    if not getattr(tokenizer, "is_fast", False):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids, numpy.full(len(ids), len(text.encode()) / max(len(ids), 1))
    encoded = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    codes = numpy.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=numpy.uint32)
    widths = 1 + (codes > 0x7F).astype(numpy.int64) + (codes > 0x7FF) + (codes > 0xFFFF)
    ends = numpy.concatenate([[0], numpy.cumsum(widths)])
    positions = numpy.array([end for _, end in encoded["offset_mapping"]], dtype=numpy.int64)
    reached = ends[numpy.maximum.accumulate(positions)] if len(ids) else positions
    return ids, numpy.diff(reached, prepend=0).astype(numpy.float64)
