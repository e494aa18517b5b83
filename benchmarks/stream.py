"""A model of 1 GB compressed block by block: memory, what being resumable costs, and whether resuming changes a bit.

    python benchmarks/stream.py

Makes a random Llama of 76 layers whose weights have falling spectra, one shard per block, and streams it in a process
of its own on one thread. From outside, that process's anonymous memory is sampled: what mapped weight files do not
count in, since the system can drop their pages. Then the same run is killed (SIGKILL) in the forward pass, in the
backward pass and while it writes, taken up again each time, and every file compared with those of the first run.
Few calibration tokens, so that it ends in minutes: the factors are no better than that, and quality is not measured.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

LAYERS, WIDTH, INNER, HEADS, KEYS, VOCABULARY = 76, 512, 1408, 8, 4, 32768
SAMPLES, LENGTH, BATCH, KEEP = 4, 128, 2, 0.6
KILLS = (("forward", 40), ("decompose", 20), ("write", 30))
"""Where a run is killed: shortly after it has begun this unit of this stage."""
MB = 1e6


def build(folder: Path) -> int:
    """Write the model, a shard at a time; returns the bytes of its largest block."""
    import tokenizers
    import transformers

    from eckart.checkpoint.weights import TensorWriter

    folder.mkdir()
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEYS,
        max_position_embeddings=1024,
        dtype=torch.float32,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, **{letter: i for i, letter in enumerate(alphabet, start=1)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def falling(rows: int, columns: int) -> torch.Tensor:
        """Singular values like i^-½, entries of variance 1 / columns."""
        rank = min(rows, columns)
        scales = torch.arange(1, rank + 1).float().pow(-0.5)
        left = torch.randn(rows, rank, generator=generator) * scales
        product = left @ torch.randn(rank, columns, generator=generator)
        return product / (product.square().mean().sqrt() * columns**0.5)

    head = WIDTH // HEADS
    shapes = {
        "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (KEYS * head, WIDTH),
        "self_attn.v_proj": (KEYS * head, WIDTH), "self_attn.o_proj": (WIDTH, WIDTH),
        "mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH), "mlp.down_proj": (WIDTH, INNER),
    }  # fmt: skip
    index, largest = {}, 0
    for number in range(-1, LAYERS):
        if number < 0:
            tensors = {
                "model.embed_tokens.weight": torch.randn(VOCABULARY, WIDTH, generator=generator),
                "lm_head.weight": falling(VOCABULARY, WIDTH),
                "model.norm.weight": torch.ones(WIDTH),
            }
        else:
            prefix = f"model.layers.{number}"
            tensors = {f"{prefix}.{name}.weight": falling(*shape) for name, shape in shapes.items()}
            tensors |= {
                f"{prefix}.{name}.weight": torch.ones(WIDTH) for name in ("input_layernorm", "post_attention_layernorm")
            }
            largest = max(largest, sum(value.nbytes for value in tensors.values()))
        name = f"model-{number + 2:05d}-of-{LAYERS + 1:05d}.safetensors"
        layout = {key: (value.dtype, tuple(value.shape)) for key, value in tensors.items()}
        with TensorWriter(folder / name, layout) as writer:
            for key, value in tensors.items():
                writer.write(key, value)
        index.update(dict.fromkeys(tensors, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return largest


def child(model: str, output: str, certify: str) -> None:
    """The streamed run; tells its parent on stdout where it is."""
    torch.set_num_threads(1)
    import transformers  # noqa: F401

    from eckart.verbs.stream import compress_stream

    print("ready", flush=True)
    time.sleep(0.5)
    begin = time.perf_counter()
    made = compress_stream(
        model,
        output,
        data="stdlib:docstrings",
        keep=KEEP,
        samples=SAMPLES,
        length=LENGTH,
        batch_size=BATCH,
        certify=certify == "certify",
        progress=lambda stage, done, total: print(f"at {stage} {done}", flush=True),
    )
    print("seconds", time.perf_counter() - begin, made.bookkeeping_seconds, made.resumed, flush=True)


@dataclass
class Watched:
    """A child and what was seen of it."""

    base: int = 0
    """Bytes of anonymous memory after all imports."""
    peaks: dict[tuple[str, int], int] = field(default_factory=dict)
    """Highest anonymous memory in each unit of work."""
    seconds: float = 0.0
    bookkeeping: float = 0.0
    resumed: bool = False


def anonymous(pid: int) -> int:
    """Bytes of a process's anonymous memory."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def watch(model: Path, output: Path, certify: bool, kill: tuple[str, int] | None = None) -> Watched:
    """Run a child, sample its memory every 5 ms, and kill it where asked."""
    found = Watched()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "child", str(model), str(output), "certify" if certify else "plain"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment, cwd=output.parent
    )
    place = ("start", 0)
    assert process.stdout is not None

    def sample() -> None:
        while process.poll() is None:
            try:
                found.peaks[place] = max(found.peaks.get(place, 0), anonymous(process.pid))
            except OSError:
                return
            time.sleep(0.005)

    sampler = threading.Thread(target=sample)
    for line in process.stdout:
        words = line.split()
        if words[0] == "ready":
            time.sleep(0.2)
            found.base = anonymous(process.pid)
            sampler.start()
        elif words[0] == "at":
            place = (words[1], int(words[2]))
            if place == kill:
                time.sleep(0.7)
                process.send_signal(signal.SIGKILL)
        elif words[0] == "seconds":
            found.seconds, found.bookkeeping, found.resumed = float(words[1]), float(words[2]), words[3] == "True"
    process.wait()
    sampler.join()
    if kill is None and process.returncode:
        raise SystemExit(f"the streamed run ended with {process.returncode}")
    return found


def main() -> None:
    root = Path(tempfile.mkdtemp(prefix="eckart-stream-"))
    certify = "--certify" in sys.argv
    try:
        block = build(root / "model")
        size = sum(file.stat().st_size for file in (root / "model").glob("*.safetensors"))
        first, second = root / "one" / "small", root / "two" / "small"
        for place in (first, second):
            place.parent.mkdir()
        whole = watch(root / "model", first, certify)
        for kill in KILLS:
            watch(root / "model", second, certify, kill)
            assert not second.exists()
        last = watch(root / "model", second, certify)
        assert last.resumed
        names = sorted(path.name for path in first.iterdir())
        _, differ, lost = filecmp.cmpfiles(first, second, names, shallow=False)
        assert names == sorted(path.name for path in second.iterdir())
        layers = [peak - whole.base for (stage, _), peak in whole.peaks.items() if stage == "decompose"][:LAYERS]
        quarter = LAYERS // 4
        result = {
            "model_mb": round(size / MB, 1),
            "layers": LAYERS,
            "block_mb": round(block / MB, 1),
            "bound_mb": round((4 * block + 300 * MB) / MB, 1),
            "peak_mb": round((max(whole.peaks.values()) - whole.base) / MB, 1),
            "python_and_imports_mb": round(whole.base / MB, 1),
            "peak_first_quarter_of_blocks_mb": round(max(layers[:quarter]) / MB, 1),
            "peak_last_quarter_of_blocks_mb": round(max(layers[-quarter:]) / MB, 1),
            "seconds": round(whole.seconds, 1),
            "bookkeeping_seconds": round(whole.bookkeeping, 2),
            "bookkeeping_share": round(whole.bookkeeping / whole.seconds, 4),
            "tokens": SAMPLES * LENGTH,
            "certify": certify,
            "killed_at": [f"{stage} {unit}" for stage, unit in KILLS],
            "files_compared": len(names),
            "files_that_differ": differ + lost,
        }
        print(json.dumps(result, indent=2))
        folder = Path(__file__).parent / "results"
        folder.mkdir(exist_ok=True)
        (folder / "stream.json").write_text(json.dumps(result, indent=2) + "\n")
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(*sys.argv[2:5])
    else:
        main()
