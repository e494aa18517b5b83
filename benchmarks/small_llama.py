"""A small Llama trained on the standard library's source, for people who have no causal LM at hand."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eckart.data import read_texts


def trained_llama(folder: Path | None = None, steps: int = 600, seed: int = 0) -> Path:
    """Train (about ten minutes on two cores) and save; a folder that exists is used as it is.

    4 layers, width 128, vocabulary 4,096; ``steps`` of 4,096 tokens on the calibration part of
    ``stdlib:source``, so the evaluation part stays unseen.
    """
    folder = folder or Path(tempfile.gettempdir()) / f"eckart-small-llama-{steps}"
    if (folder / "config.json").exists():
        return folder
    text = read_texts("stdlib:source", part="calibration").joined
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([text[i : i + 10000] for i in range(0, len(text), 10000)], vocab_size=4096)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer)
    ids = torch.tensor(bpe.encode(text).ids)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    draw = torch.Generator().manual_seed(seed)
    for step in range(steps):
        starts = torch.randint(0, len(ids) - 257, (16,), generator=draw)
        batch = torch.stack([ids[s : s + 256] for s in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
