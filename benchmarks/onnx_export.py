"""Factored and int8 graphs in onnxruntime: does a factored model still pay once everything is in eight bits?

    python benchmarks/onnx_export.py

MiniLM at several shares of its maps' parameters, and one encoder block of growing width with random weights, whose
singular values fall as 1/i. Dense and factored, in torch, in onnxruntime, and in onnxruntime with int8 weights, a
scale per channel; the float graphs of MiniLM in OpenVINO as well, where that is installed (pip install openvino), as
it comes and forced to float32. One thread; milliseconds of process CPU time, all ways taking turns, the least of the
rounds. The cosine is that of sentence embeddings to those of the original in torch, on docstrings not seen in
calibration.
Prints two tables and writes results/onnx.json. (Not called onnx.py: that would hide the package of this name.)
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import transformers
from torch import Tensor
from torch.nn.functional import cosine_similarity

import eckart
from eckart.hf.batches import text_batches
from eckart.hf.onnx import export_onnx, quantise_graph
from eckart.hf.registry import prepare_for_saving
from eckart.hf.tasks import embed
from eckart.layers import FactoredLinear
from eckart.verbs.demo import minilm_folder
from eckart.verbs.models import as_loaded, as_texts, pieces

RESULTS = Path(__file__).parent / "results"
KEEP = (0.75, 0.5, 0.25)
SHAPES = ((1, 32), (8, 64))
WIDTHS = (384, 768, 1536)
BLOCK_KEEP = 0.5
BLOCK_SHAPES = ((1, 32), (4, 32))
SENTENCES = 128
ROUNDS = 7

Feed = dict[str, Tensor]
Run = Callable[[Feed], Any]


def session(path: Path) -> Run:
    """The graph at ``path`` as a function, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    found = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = {x.name for x in found.get_inputs()}
    outputs = [x.name for x in found.get_outputs()]

    def run(batch: Feed) -> dict[str, Any]:
        feed = {name: x.numpy() for name, x in batch.items() if name in names}
        return dict(zip(outputs, found.run(None, feed), strict=True))

    return run


def openvino_runs(path: Path) -> dict[str, Run]:
    """The graph in OpenVINO, on one thread, in the precision that it takes by itself and in float32."""
    if importlib.util.find_spec("openvino") is None:
        return {}
    openvino = importlib.import_module("openvino")
    core = openvino.Core()
    found: dict[str, Run] = {}
    for name, precision in (("openvino", {}), ("openvino float32", {"INFERENCE_PRECISION_HINT": "f32"})):
        model = core.compile_model(str(path), "CPU", {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, **precision})
        inputs = {one for port in model.inputs for one in port.get_names()}

        def run(batch: Feed, model: Any = model, inputs: set[str] = inputs) -> dict[str, Any]:
            results = model({one: x.numpy() for one, x in batch.items() if one in inputs})
            return {one: results[port] for port in model.outputs for one in port.get_names()}

        found[name] = run
    return found


def in_torch(model: Any) -> Run:
    def run(batch: Feed) -> Any:
        with torch.inference_mode():
            return model(**batch)

    return run


def graphs(folder: Path, work: Path, name: str) -> dict[str, Path]:
    """The float and the int8 graph of a saved model."""
    out = export_onnx(folder, work / name)
    int8 = work / f"{name}-int8"
    shutil.copytree(out, int8)
    quantise_graph(int8 / "model.onnx")
    return {"float32": out / "model.onnx", "int8": int8 / "model.onnx"}


def tokens(entries: int, rows: int, length: int) -> Feed:
    ids = torch.randint(entries, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


def milliseconds(ways: dict[str, Run], batch: Feed) -> dict[str, float]:
    """Least CPU time of each way, one after the other in every round."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS + 1):
        for name, run in ways.items():
            start = time.process_time()
            run(batch)
            times[name].append(time.process_time() - start)
    return {name: round(1000 * min(taken[1:]), 2) for name, taken in times.items()}


def minilm(work: Path) -> list[dict[str, Any]]:
    base = as_loaded(minilm_folder())
    moments = eckart.calibrate(base, "stdlib:docstrings", samples=256)
    folders = {"dense": Path(minilm_folder())}
    models = {"dense": base.model}
    for keep in KEEP:
        made = eckart.compress(
            base, moments=moments, keep=keep, forms=("dense", "lowrank"), rank_multiple=16, certify=False
        )
        folders[f"keep {keep}"] = work / f"saved-{keep}"
        eckart.save(made, folders[f"keep {keep}"])
        models[f"keep {keep}"] = made.model
    texts = as_texts("stdlib:docstrings", part="evaluation", field=None, limit=SENTENCES, seed=0)
    held_out = text_batches(base, pieces(base, texts), length=64, batch_size=16, samples=SENTENCES, seed=0).batches
    original = torch.cat([embed(base, batch) for batch in held_out])
    ways: dict[str, Run] = {}
    rows = []
    for name, folder in folders.items():
        ways[f"{name}, torch"] = in_torch(models[name])
        runs: dict[str, tuple[Run, Path]] = {}
        for kind, path in graphs(folder, work, name).items():
            runs[kind] = session(path), path
            if kind == "float32":
                runs |= {other: (run, path) for other, run in openvino_runs(path).items()}
        for kind, (run, path) in runs.items():
            ways[f"{name}, {kind}"] = run
            there = torch.cat([torch.from_numpy(run(with_types(batch))["sentence_embedding"]) for batch in held_out])
            cosine = float(cosine_similarity(there, original).mean())
            rows.append({"model": name, "graph": kind, "cosine": cosine, "megabytes": path.stat().st_size / 1e6})
    for shape in SHAPES:
        taken = milliseconds(ways, tokens(20000, *shape))
        for row in rows:
            row[f"torch {shape[0]}×{shape[1]}"] = taken[f"{row['model']}, torch"]
            row[f"ms {shape[0]}×{shape[1]}"] = taken[f"{row['model']}, {row['graph']}"]
    return rows


def with_types(batch: Any) -> Feed:
    return {"token_type_ids": torch.zeros_like(batch["input_ids"]), **batch}


def falling(out: int, inner: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Factors (out × k), (k × in) of a matrix of full rank whose singular values fall about as 1/i, of norm √out."""
    k = min(out, inner)
    left = torch.randn(out, k, generator=generator) / out**0.5
    right = torch.randn(k, inner, generator=generator) / inner**0.5
    scale = 1 / torch.arange(1, k + 1)
    return left * (scale * (out / scale.square().sum()).sqrt()), right


def block(width: int) -> tuple[Any, Any]:
    """One encoder block of BERT, dense, and with every map cut to ``BLOCK_KEEP`` of its parameters."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=100,
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        max_position_embeddings=64,
    )
    pair = [transformers.BertModel(config, add_pooling_layer=False).eval() for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    for name, module in list(pair[0].encoder.named_modules()):
        if isinstance(module, torch.nn.Linear):
            out, inner = module.weight.shape
            left, right = falling(out, inner, generator)
            rank = int(BLOCK_KEEP * out * inner / (out + inner)) // 16 * 16
            layer = FactoredLinear(inner, out, rank)
            with torch.no_grad():
                module.weight.copy_(left @ right)
                module.bias.zero_()
                layer.a.weight.copy_(right[:rank])
                layer.b.weight.copy_(left[:, :rank])
                layer.b.bias.zero_()
            pair[1].encoder.set_submodule(name, layer.eval())
    return pair[0], pair[1]


def blocks(work: Path) -> list[dict[str, Any]]:
    rows = []
    for width in WIDTHS:
        ways: dict[str, Run] = {}
        for name, model in zip(("dense", "factored"), block(width), strict=True):
            prepare_for_saving(model)
            folder = work / f"block-{width}-{name}"
            model.save_pretrained(folder)
            ways[f"{name}, torch"] = in_torch(model)
            for kind, path in graphs(folder, work, f"graph-{width}-{name}").items():
                ways[f"{name}, {kind}"] = session(path)
        batch = tokens(100, *BLOCK_SHAPES[-1])
        original = ways["dense, torch"](batch).last_hidden_state
        row: dict[str, Any] = {"width": width}
        for name in ("dense, int8", "factored, float32", "factored, int8"):
            found = torch.from_numpy(ways[name](batch)["last_hidden_state"])
            row[f"cosine {name}"] = float(cosine_similarity(found, original, dim=-1).mean())
        for shape in BLOCK_SHAPES:
            row[f"ms {shape[0]}×{shape[1]}"] = milliseconds(ways, tokens(100, *shape))
        rows.append(row)
    return rows


def instructions() -> list[str]:
    """Which of the instructions for integer products this CPU has."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.exists() else []
    return [flag for flag in ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8") if flag in flags]


def table(result: dict[str, Any]) -> str:
    """The result as two Markdown tables."""
    shapes = [f"{rows}×{length}" for rows, length in SHAPES]
    lines = [f"| MiniLM | graph | cosine | MB | {' | '.join(f'ms {shape} (torch)' for shape in shapes)} |"]
    lines += ["|---|---|---|---|" + "---|" * len(shapes)]
    for row in result["minilm"]:
        cells = [f"{row[f'ms {shape}']:.1f} ({row[f'torch {shape}']:.1f})" for shape in shapes]
        lines.append(
            f"| {row['model']} | {row['graph']} | {row['cosine']:.3f} | {row['megabytes']:.1f} | {' | '.join(cells)} |"
        )
    lines += ["", "| one block, width | tokens | dense float32 | factored | dense int8 | factored int8 | int8 gains |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in result["blocks"]:
        for rows, length in BLOCK_SHAPES:
            ms = row[f"ms {rows}×{length}"]
            cells = [f"{ms[n]:.1f}" for n in ("dense, float32", "factored, float32", "dense, int8", "factored, int8")]
            gain = ms["dense, int8"] / ms["factored, int8"]
            lines.append(f"| {row['width']} | {rows}×{length} | {' | '.join(cells)} | {gain:.2f}× |")
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        result = {
            "unit": "milliseconds of CPU time on one thread, least of the rounds",
            "rounds": ROUNDS,
            "machine": platform.machine(),
            "instructions": instructions(),
            "torch": torch.__version__,
            "onnxruntime": onnxruntime.__version__,
            "openvino": importlib.metadata.version("openvino") if importlib.util.find_spec("openvino") else None,
            "block_keep": BLOCK_KEEP,
            "minilm": minilm(work),
            "blocks": blocks(work),
        }
    result["cpu_seconds"] = round(time.process_time() - start, 1)
    print(table(result))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "onnx.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
