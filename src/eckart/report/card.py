"""The model card that goes with a saved model: README.md with the front matter that the Hub reads."""

from __future__ import annotations

import re
from collections.abc import Sequence

import yaml

from eckart.records import Evaluation, Outcome, Size
from eckart.report import format as fmt
from eckart.report.verdict import budget_reached, flagged, metric_of, verdict_text

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
"""What the Hub takes as ``base_model``; a folder's path is not that."""

LOADERS = {
    "embedding": "AutoModel",
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "logits": "AutoModel",
}


def model_card(
    outcome: Outcome,
    evaluation: Evaluation | None = None,
    *,
    base_name: str,
    title: str,
    command: str,
    plan_json: str = "",
    load_snippet: str = "",
    tags: Sequence[str] = (),
    license: str = "",
    native: bool = False,
) -> str:
    """README.md of a saved model: what it is, what it lost, how to load it, what it cannot do.

    ``base_name`` is the original's name; the front matter has it only where it can be a name on the Hub.
    ``load_snippet`` is Python that loads the folder; without it the snippet fits the evaluation's task.
    ``native``: the folder is a plain one that loads without Eckart.
    """
    sections = [
        _front_matter(base_name, tags, license),
        f"# {_plain(title)}",
        _plain(verdict_text(outcome, evaluation, title)),
        "## What changed",
        _sizes(outcome, evaluation),
        _summary(outcome),
        *_measured(evaluation),
        "## How to load it",
        _loading(evaluation, load_snippet, native),
        "## How it was made",
        f"Low-rank factorisation of {_code(_public(base_name))}, method {_code(outcome.method)}, made with:",
        _fenced(command, "bash"),
        "`eckart.json` holds the plan, with the rank of every layer; `report.html` shows it layer by layer.",
        *([_details("The plan", plan_json)] if plan_json else []),
        "## Limits",
        _limits(outcome, evaluation),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(base_name: str, tags: Sequence[str], license: str) -> str:
    entries: dict[str, object] = {"library_name": "transformers"}
    if license:
        entries["license"] = license
    if HUB_NAME.fullmatch(base_name):
        entries["base_model"] = base_name
    entries["tags"] = list(dict.fromkeys(["eckart", "low-rank", "compressed", *tags]))
    return f"---\n{yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)}---"


def _sizes(outcome: Outcome, evaluation: Evaluation | None) -> str:
    lines = ["| | original | this model | kept |", "|---|---:|---:|---:|"]

    def add(label: str, before: float, after: float, show: fmt.Show) -> None:
        lines.append(f"| {label} | {show(before)} | {show(after)} | {fmt.share(after / max(1, before))} |")

    def add_all(where: str, before: Size, after: Size) -> None:
        add(f"parameters, {where}", before.parameters, after.parameters, fmt.count)
        add(f"bytes of weights, {where}", before.bytes, after.bytes, fmt.human_bytes)
        add(f"multiply-adds per token, {where}", before.macs, after.macs, fmt.count)

    add_all("compressed layers", outcome.sites_before, outcome.sites_after)
    add_all("whole model", outcome.model_before, outcome.model_after)
    if evaluation and {"model", "base"} <= set(evaluation.disk_bytes):
        disk = evaluation.disk_bytes
        add("weight files on disk", disk["base"], disk["model"], fmt.human_bytes)
    return "\n".join(lines)


def _summary(outcome: Outcome) -> str:
    dense = sum(layer.form == "dense" for layer in outcome.layers)
    sentences = [f"{len(outcome.layers)} layers were considered; {dense} stayed dense."]
    budget = budget_reached(outcome)
    if budget:
        sentences.append(f"Asked for: {budget.asked_text} ({budget.words}); reached: {budget.reached_text}.")
    if outcome.predicted_loss is not None:
        sentences.append(f"Predicted rise of the loss: {fmt.figure(outcome.predicted_loss)}.")
    return " ".join(sentences)


def _measured(evaluation: Evaluation | None) -> list[str]:
    if evaluation is None:
        return ["## Quality", "Not measured. Run `eckart evaluate` against the original before using it."]
    lines = ["| figure | mean | 95 % interval | n |", "|---|---:|---:|---:|"]
    for name, value in evaluation.metrics.items():
        label = f"{_cell(metric_of(name).label)} (`{_cell(name)}`)"
        lines.append(f"| {label} | {fmt.mean(value)} | {fmt.interval(value)} | {fmt.count(value.n)} |")
    parts = ["## Quality against the original", "\n".join(lines)]
    if evaluation.protocol:
        known = "; ".join(f"{_cell(str(k))}: {_cell(str(v))}" for k, v in evaluation.protocol.items())
        parts.append(f"Measured with {known}.")
    if evaluation.latency:
        speed = ["| batch × tokens | original | this model | speed |", "|---|---:|---:|---:|"]
        speed += [
            f"| {run.batch} × {run.length} | {fmt.seconds(run.base)} | {fmt.seconds(run.model)} "
            f"| {fmt.times(run.speedup)} |"
            for run in evaluation.latency
        ]
        parts.append("Median time of one forward pass, both models interleaved in one run on one machine:")
        parts.append("\n".join(speed))
    return parts


def _loading(evaluation: Evaluation | None, snippet: str, native: bool) -> str:
    loader = LOADERS[evaluation.task] if evaluation else "AutoModel"
    code = snippet or (
        ("" if native else "import eckart  # registers the layers with transformers\n")
        + f"from transformers import {loader}, AutoTokenizer\n\n"
        f'model = {loader}.from_pretrained("path/to/this/folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")'
    )
    if native:
        return (
            _fenced(code, "python")
            + "\n\nAll layers are dense and in shapes that the config states: it loads anywhere."
        )
    return (
        _fenced(code, "python")
        + "\n\nWithout `import eckart` loading stops with an error; it never fills in random weights. "
        "`eckart export --to remote-code` makes a folder that loads without Eckart, "
        "`--to dense` one with ordinary dense weights, which saves nothing."
    )


def _limits(outcome: Outcome, evaluation: Evaluation | None) -> str:
    lines = [
        "- All limits, biases and licence terms of the original apply.",
        "- Ranks were chosen for the calibration data; other languages, domains or tasks may lose more.",
        "- Speed was not promised by the sizes: thin products run below the peak of the hardware.",
    ]
    if evaluation is None or not evaluation.latency:
        lines.append("- Latency was not measured.")
    flags = sum(flagged(layer) for layer in outcome.layers)
    if flags:
        lines.append(f"- {flags} layers have a held-out error above twice the predicted one: calibrate on more data.")
    notes = (*outcome.notes, *(evaluation.warnings if evaluation else ()))
    return "\n".join(lines + [f"- {_plain(note)}" for note in notes])


def _public(name: str) -> str:
    """A name on the Hub as it is; of a path only its end, since cards are published and paths name people."""
    return name if HUB_NAME.fullmatch(name) else [name, *filter(None, re.split(r"[/\\]", name))][-1]


def _plain(text: str) -> str:
    """Text that Markdown and HTML leave alone, on one line."""
    one_line = " ".join(text.split())
    return re.sub(r"([\\`*_\[\]<>#|&])", r"\\\1", one_line)


def _cell(text: str) -> str:
    return _plain(text)


def _code(text: str) -> str:
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    one_line = " ".join(text.split())
    return f"{ticks}{one_line}{ticks}" if ticks == "`" else f"{ticks} {one_line} {ticks}"


def _fenced(text: str, language: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _details(summary: str, text: str) -> str:
    return f"<details>\n<summary>{summary}</summary>\n\n{_fenced(text, 'json')}\n\n</details>"
