"""Put the figures of ``benchmarks/results`` into README.md, between its markers.

python benchmarks/readme.py [--check]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"


def read(name: str) -> Any:
    """A result, or None where its script has not been run."""
    path = HERE / "results" / name
    return json.loads(path.read_text()) if path.exists() else None


def quality(name: str, heading: str) -> list[str]:
    result = read(name)
    if result is None:
        return []
    lines = [heading, "", f"| {result['unit']} | 20 % removed | 40 % | 60 % |", "|---|---|---|---|"]
    for row, by in result["rows"].items():
        cells = [f"{v['mean']:.3f} ({v['low']:.3f}–{v['high']:.3f})" for v in by.values()]
        bold = "**" if "default" in row else ""
        lines.append(f"| {bold}{row}{bold} | " + " | ".join(f"{bold}{c}{bold}" for c in cells) + " |")
    return [*lines, ""]


def adapters() -> list[str]:
    """Every adaptation method against tuned LoRA."""
    found = read("adapt.json")
    if found is None:
        return []
    seeds = {row["seeds"] for row in found["rows"].values()}
    settings = found["settings"]
    lines = [
        "Fine-tuning on the CPU, `python benchmarks/adapt.py`: from which of ten packages is this docstring? The last "
        f"two layers of MiniLM-L6 adapted, {settings['steps']} steps of {settings['batch']}, "
        f"{settings['test_documents']:,} test documents, {' or '.join(map(str, sorted(seeds)))} seeds, the best of at "
        "least four learning rates for every method and seed; losses in nats, differences to tuned LoRA in pairs with "
        "95 % intervals, bold where LoRA is beaten outside of the interval. Rates are chosen by the training loss, so "
        "that column is a little favourable to every method; intervals are not widened for the number of comparisons.",
        "",
        "| method | trained | shipped | ms a step | start, s | test loss | less LoRA's | training loss, less LoRA's |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def difference(row: dict[str, Any], key: str) -> str:
        if (d := row.get(key)) is None:
            return "–"
        text = f"{d['mean']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f})"
        return f"**{text}**" if d["high"] < 0 else text

    for name, row in sorted(found["rows"].items(), key=lambda item: item[1]["test_loss"]):
        lines.append(
            f"| {name} | {row['parameters']:,.0f} | {row['bytes'] / 1000:,.0f} kB | {row['ms_per_step']:.0f} "
            f"| {row['init_seconds']:.2f} | {row['test_loss']:.3f} | {difference(row, 'against_lora')} "
            f"| {difference(row, 'training_against_lora')} |"
        )
    return [*lines, ""]


def adapter_rows() -> list[str]:
    """Starts of PiSSA, a round of FedSVD."""
    rows = []
    if (found := read("adapt_init.json")) is not None:
        for name in ("MiniLM-L6, 36 maps", "2048², flat", "2048², falling"):
            ours, exact, niter = (found[name][key] for key in ("Eckart", "PEFT pissa (exact)", "PEFT pissa_niter_16"))
            rows.append(
                f"| Start of PiSSA at rank {found['rank']}, {name} | {ours['cpu_seconds']:.3f} s of CPU, PEFT exact "
                f"{exact['cpu_seconds']:.2f} s, niter_16 {niter['cpu_seconds']:.2f} s; worst singular value off by "
                f"{ours['worst_singular_value']:.0e}, niter_16 {niter['worst_singular_value']:.0e} | "
                f"{exact['cpu_seconds'] / ours['cpu_seconds']:.1f}× less CPU than exact (asked 5) | "
                "`benchmarks/adapt_init.py` |"
            )
    if (found := read("fedsvd.json")) is not None:
        cpu = found["cpu_seconds"]
        rows.append(
            f"| FedSVD's server step, {found['shape'][0]} × {found['shape'][1]} at rank {found['rank']} | "
            f"{cpu['ours'] * 1000:.2f} ms, dense SVD {cpu['dense'] * 1000:.0f} ms, error "
            f"{found['error']['ours']:.0e} | "
            f"{found['speedup']:.0f}× less CPU (asked 100) | `benchmarks/fedsvd.py` |"
        )
    return rows


def later_rows() -> list[str]:
    """Bits, repair, streaming, onnxruntime."""
    rows = []
    if (found := read("bytes.json")) is not None:
        plain, ours = found["rows"]["int4, nearest, groups of 128"], found["rows"]["Eckart, one budget"]
        rows.append(
            f"| Causal LM, maps in a quarter of their bf16 bytes: KL to the original | {ours['kl']:.4f} at "
            f"{ours['share_of_bf16']:.3f} of bf16, int4 nearest {plain['kl']:.4f} at {plain['share_of_bf16']:.3f} | "
            f"{found['ratio']:.2f} of int4's (asked 0.5) | `benchmarks/bytes.py` |"
        )
    if (found := read("compensate.json")) is not None:
        four = found["rows"]["4 bits"]
        for name in ("kfac, rank 32", "eora = qera, rank 32", "svd, rank 32"):
            won = four["after"][name]
            rows.append(
                f"| Causal LM in 4 bits (nearest, per row), repaired: {name} | {four['before']:.4f} bits per byte "
                f"lost, "
                f"then {won['lost']:.4f} | {won['won_back']:.0%} won back (asked 50 %) | `benchmarks/compensate.py` |"
            )
    if (found := read("stream.json")) is not None:
        rows.append(
            f"| Streaming a {found['model_mb']:.0f} MB Llama of {found['layers']} blocks | peak "
            f"{found['peak_mb']:.0f} MB of anonymous memory, bound {found['bound_mb']:.0f} MB; "
            f"{found['files_compared']} files after three kills, "
            f"{len(found['files_that_differ'])} differ | bookkeeping {found['bookkeeping_share']:.1%} | "
            "`benchmarks/stream.py` |"
        )
    if (found := read("inspect_weights.json")) is not None:
        small, large = found["minilm"], found["large"]
        rows.append(
            f"| All weights of MiniLM inspected (`standard`), CPU | {small['cpu_seconds']:.2f} s, nothing left out; "
            f"WeightWatcher {small['weightwatcher_cpu_seconds']:.2f} s, with its comparison to noise "
            f"{small['weightwatcher_cpu_seconds_with_noise']:.1f} s | the same findings "
            f"{small['speedup_same_findings']:.1f}× less CPU, all of ours {small['speedup']:.1f}×, "
            f"with noise in both {small['speedup_with_noise']:.0f}× (asked 2) | `benchmarks/inspect_weights.py` |"
        )
        rows.append(
            f"| A 4096 × 11008 weight inspected | {large['cpu_seconds_standard']:.1f} s of CPU (asked 15) | top 256 "
            f"singular values right to {large['largest_relative_error_top_256']:.0e} (asked 1e-4) | "
            "`benchmarks/inspect_weights.py` |"
        )
    if (found := read("onnx.json")) is not None:
        for row in found["minilm"]:
            if row["graph"] == "int8" and row["model"] in ("dense", "keep 0.5"):
                rows.append(
                    f"| MiniLM in onnxruntime int8, 8 × 64 tokens: {row['model']} | {row['ms 8×64']:.0f} ms, "
                    f"{row['megabytes']:.0f} MB | cosine {row['cosine']:.3f} | `benchmarks/onnx_export.py` |"
                )
    return rows


def optimizers() -> list[str]:
    """Loss against bytes of state, and the cost of a step."""
    lines = []
    if (found := read("optim_learning.json")) is not None and found["rows"]:
        settings, unit = found["settings"], next(iter(found["rows"].values()))
        lines += [
            f"A small Llama trained from nothing on source code, `python benchmarks/optim_learning.py`: "
            f"{settings['steps']} steps of {settings['batch'] * settings['window']} bytes, "
            f"{len(unit['losses'])} seeds, the best of at least three learning rates for each; held-out nats per "
            "byte. Bytes are those of the whole state, per parameter. The rate is chosen by the loss that is shown.",
            "",
            "| optimizer | state, bytes | of AdamW's | loss | less AdamW's (range of seeds) | in AdamW's CPU time |",
            "|---|---|---|---|---|---|",
        ]
        for name, row in sorted(found["rows"].items(), key=lambda item: item[1]["loss"]):
            gaps, edge = row["less_adamw"], "" if row["inside"] else " (at the edge of its rates)"
            lines.append(
                f"| {name}{edge} | {row['bytes_a_parameter']:.2f} "
                f"| {row['bytes'] / unit['bytes']:.2f} | {row['loss']:.3f} "
                f"| {sum(gaps) / len(gaps):+.3f} ({min(gaps):+.3f} to {max(gaps):+.3f}) | {row['equal_time']:.3f} |"
            )
        lines += [
            "",
            "SST's U, S and V are 1.8 times as many numbers as the dense weights, which state does not show.",
            "",
        ]
    if (found := read("optim_step.json")) is not None:
        products = "with" if found["bfloat16_products"] else "without"
        lines += [
            "The cost of a step, `python benchmarks/optim_step.py`, one 1024 × 4096 matrix at rank 128 on one thread "
            f"of a CPU {products} bfloat16 products:",
            "",
            "| figure | measured | asked |",
            "|---|---|---|",
            *(
                f"| {name} | {bar['found']:.2g} | {bar['wanted']}{'' if bar['holds'] else ', **missed**'} |"
                for name, bar in found["bars"].items()
            ),
            "",
        ]
    return lines


LEVELS = ("90 % (1:8)", "95 % (1:16)")
"""What is removed while training, and the patterns that stand in their columns."""


def pruned() -> list[str]:
    """One-shot pruning against its baselines, and training-time methods against gradual magnitude."""
    lines = []
    result = read("prune_oneshot.json") or {}
    for part, heading in (
        ("minilm", "Pruned in one shot, `python benchmarks/prune_oneshot.py minilm`: {unit}, 36 encoder maps"),
        ("causal", "The same on the small Llama: {unit} on held-out source, {dense:.3f} dense"),
    ):
        if part not in result:
            continue
        found = result[part]
        groups = found["rows"]
        heads = [f"{float(group):.0%} kept" if group.replace(".", "").isdigit() else group for group in groups]
        lines += [
            heading.format(unit=found["unit"], dense=found.get("dense") or 0.0) + ".",
            "",
            "| method | " + " | ".join(heads) + " |",
            "|---" * (len(heads) + 1) + "|",
        ]
        for name in dict.fromkeys(name for rows in groups.values() for name in rows):
            cells = [f"{rows[name]['value']:.3f}" if name in rows else "" for rows in groups.values()]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    if (trained := read("prune_training.json")) is not None and trained["complete"]:
        tasks = dict.fromkeys(row["task"] for row in trained["rows"])
        units = dict.fromkeys(f"{row['task']} in {row['unit']}" for row in trained["rows"])
        lines += [
            f"Pruned while training, `python benchmarks/prune_training.py`: {', '.join(units)}, means of "
            f"{len(trained['settings']['seeds'])} seeds. The Llama hardly feels 95 %, so only the digits tell methods "
            "apart.",
            "",
            "| method | " + " | ".join(f"{task}, {share} removed" for task in tasks for share in LEVELS) + " |",
            "|---" * (2 * len(tasks) + 1) + "|",
        ]
        means = {(row["method"], row["task"], row["removed"] > 0.9): row["mean"] for row in trained["rows"]}
        for name in dict.fromkeys(row["method"] for row in trained["rows"]):
            cells = [f"{means[name, task, high]:.3f}" for task in tasks for high in (False, True)]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return lines


SAME = (
    ("eckart: whitened, uniform", "SVD-LLM: SVD-LLM"),
    ("eckart: kfac, uniform", "lems: KFAC-SVD, uniform"),
)
"""The same estimator in Eckart and in a peer."""


def peers() -> list[str]:
    """Eckart's default, the peers that are best or fastest at some share, and the same estimator in both."""
    result = read("peers.json")
    if result is None:
        return []
    rows = {name: row["figures"] for name, row in result["rows"].items() if row["figures"]}
    theirs = [name for name in rows if not name.startswith("eckart: ") and "formula" not in result["rows"][name]]
    shares = list(rows["eckart: default"])
    shown = [name for name in rows if name.startswith("eckart: default")]
    for figure in ("bits_per_byte", "cpu_seconds"):
        shown += [min(theirs, key=lambda name: rows[name][share][figure]) for share in shares]
    shown += [name for pair in SAME for name in pair if name in rows]
    lines = [
        f"The same Llama against {len(theirs)} published implementations, `python benchmarks/peers.py`: "
        f"held-out bits per byte ({result['bits_per_byte_dense']:.4f} dense) and, in brackets, CPU seconds of the "
        "whole compression on one thread. Shown are the best and the fastest of them at each share, and the same "
        "estimator in both. lems and ASVD4LLM keep what does not depend on the share: their seconds in the first "
        "column are those from nothing.",
        "",
        "| bits per byte (CPU s) | " + " | ".join(f"{float(share):.0%} removed" for share in shares) + " |",
        "|---" * (len(shares) + 1) + "|",
    ]
    for name in dict.fromkeys(shown):
        bold = "**" if name == "eckart: default" else ""
        cells = [f"{bold}{by['bits_per_byte']:.3f}{bold} ({by['cpu_seconds']:.1f})" for by in rows[name].values()]
        lines.append(f"| {bold}{name}{bold} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def figures() -> str:
    """The Markdown between the markers."""
    lines = quality(
        "quality_minilm.json",
        "MiniLM-L6, 36 encoder maps, no training, `python benchmarks/quality.py minilm`: calibrated on docstrings, "
        "measured on docstrings of other modules; mean (range) over three calibration samples.",
    )
    lines += quality(
        "quality_causal.json",
        "A small trained Llama (1.3 M parameters, 28 maps), `python benchmarks/quality.py causal`: rise of the "
        "loss on held-out source code. Lower is better.",
    )
    lines += peers()
    lines += adapters()
    lines += optimizers()
    lines += pruned()
    rows = []
    if (found := read("inference.json")) is not None:
        rows += [
            f"| MiniLM at half the parameters of its maps, batch 8 × 64, one thread: {name} | "
            f"{found['milliseconds'][name]} ms against {found['milliseconds']['dense']} ms dense | "
            f"{speed:.2f}× faster | `benchmarks/inference.py` |"
            for name, speed in found["speedup"].items()
        ]
    if (found := read("compress.json")) is not None:
        rows.append(
            f"| `eckart compress` of MiniLM, all included | {found['cpu_seconds']:.0f} s of CPU "
            f"| target: under {found['target']} s | `benchmarks/compress.py` |"
        )
    if (found := read("kernel.json")) is not None:
        cpu = found["cpu_seconds"]
        size = " × ".join(map(str, found["shape"]))
        rows.append(
            f"| The shared kernel against Cholesky + inverse + SVD, {size} | {cpu['kernel']:.2f} s against "
            f"{cpu['whitening']:.2f} s of CPU, results equal to {found['difference']:.0e} | "
            f"{found['speedup']:.1f}× less CPU | `benchmarks/kernel.py` |"
        )
        rows.append(
            f"| The shared kernel against its own matrix products and one eigh | {cpu['kernel']:.2f} s against "
            f"{cpu['own_work']:.2f} s | {found['own_work']:.2f}× | `benchmarks/kernel.py` |"
        )
    if (found := read("memory.json")) is not None:
        rows.append(
            f"| Memory of the calibration when MiniLM is compressed | peak {found['peak_mb']:.0f} MB above the loaded "
            f"model | moments {found['moments_mb']:.0f} MB + one batch {found['batch_mb']:.0f} MB "
            "| `benchmarks/memory.py` |"
        )
    rows += later_rows() + adapter_rows()
    if rows:
        lines += ["| what | measured | ratio | script |", "|---|---|---|---|", *rows, ""]
    return "\n".join(lines)


def main() -> int:
    text = README.read_text()
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    fresh = f"{head}{BEGIN}\n{figures()}{END}{tail}"
    if "--check" in sys.argv:
        if fresh != text:
            print("README.md is stale; run: python benchmarks/readme.py")
            return 1
        return 0
    README.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
