"""The recipes: what can be asked of a verb, in groups, each field with its meaning and its flag.

This is the one table behind the options of the command line, their help, the recipe files, ``--set`` and
``eckart schema``. A field that is None leaves the choice to the verb, whose signature holds the default;
``Flag.default`` only shows it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from eckart.cli.amounts import parse_budget, parse_bytes, parse_count


@dataclass(frozen=True)
class Flag:
    """How a field is written on the command line and passed to the verb."""

    name: str
    """``--keep``; empty for the argument MODEL."""
    metavar: str = ""
    keyword: str = ""
    """Keyword of the verb; empty where the command does something else with it."""
    default: str = ""
    short: str = ""


Bytes = Annotated[
    int,
    BeforeValidator(parse_bytes),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string"}]}),
]
Count = Annotated[
    int,
    BeforeValidator(parse_count),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string"}]}),
]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]


def parse_bits(given: object) -> int:
    """8, 4 or 2. Raises ValueError for anything else."""
    if str(given) not in ("8", "4", "2"):
        raise ValueError("expected 8, 4 or 2")
    return int(str(given))


Bits = Annotated[int, BeforeValidator(parse_bits), WithJsonSchema({"enum": [8, 4, 2]})]
FormName = Literal["dense", "lowrank", "pivoted", "narrow", "sparse"]
KindName = Literal["rank", "width", "sparse", "bits"]
KINDS: dict[str, tuple[FormName, ...]] = {
    "rank": ("lowrank", "pivoted"),
    "width": ("narrow",),
    "sparse": ("sparse",),
    "bits": (),
}
"""What ``--options`` allows, beside maps as they are; ``bits`` is about numbers."""


def parse_kinds(given: object) -> object:
    """``rank,sparse`` as a list of words; lists of such words are joined."""
    texts = given if isinstance(given, list) else [given]
    return [word for text in texts for word in str(text).replace(" ", "").split(",") if word]


class Section(BaseModel):
    """A group of a recipe. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True, protected_namespaces=())


class DataSection(Section):
    """What the model is run on."""

    source: Annotated[str | None, Flag("--data", "DATA", "data")] = Field(
        default=None,
        description="Text file, JSONL file, datasets:NAME, or stdlib:docstrings / stdlib:source "
        "(the standard library of this Python).",
    )
    field: Annotated[str | None, Flag("--field", "NAME", "field")] = Field(
        default=None, description="Field of a JSONL file or data set that holds the text."
    )
    samples: Annotated[Positive | None, Flag("--samples", "N", "samples")] = Field(
        default=None,
        description="Texts or windows that are used. By default 512 sentences for embedding models, "
        "200 windows for the others; 300 to evaluate.",
    )
    length: Annotated[Positive | None, Flag("--length", "TOKENS", "length")] = Field(
        default=None, description="Tokens of a sentence at most (by default 128) or of a window (256)."
    )

    batch_size: Annotated[Positive | None, Flag("--batch-size", "N", "batch_size", default="16")] = Field(
        default=None, description="Texts or windows per forward pass."
    )


class CalibrationSection(Section):
    """What is measured beside the inputs of the layers."""

    gradients: Annotated[
        Literal["full", "scale", "none"] | None,
        Flag("--gradients", "full|scale|none", "gradients"),
    ] = Field(
        default=None,
        description="Second moments of the output gradients: full (out × out per layer), scale (one number "
        "per layer) or none (no backward pass). By default full; in compress what the method needs.",
    )
    probes: Annotated[Positive | None, Flag("--probes", "N", "probes")] = Field(
        default=None, description="Backward passes per batch, each with freshly drawn targets."
    )


class BudgetSection(Section):
    """What the result may cost, in exactly one unit. It is met from below."""

    keep: Annotated[Share | None, Flag("--keep", "SHARE")] = Field(
        default=None, description="Share kept of the parameters of the compressed sites: 0.6 removes 40 %."
    )
    model_keep: Annotated[Share | None, Flag("--model-keep", "SHARE")] = Field(
        default=None, description="Share kept of the parameters of the whole model."
    )
    max_parameters: Annotated[Count | None, Flag("--max-parameters", "COUNT")] = Field(
        default=None, description="Parameters of the whole model, such as 15M."
    )
    max_bytes: Annotated[Bytes | None, Flag("--max-bytes", "SIZE")] = Field(
        default=None, description="Bytes of all weights of the whole model, such as 40MB or 8GiB."
    )
    max_macs: Annotated[Count | None, Flag("--max-macs", "COUNT")] = Field(
        default=None, description="Multiply-adds per token of the compressed sites, such as 6M."
    )
    max_loss: Annotated[float | None, Field(gt=0), Flag("--max-loss", "RISE")] = Field(
        default=None,
        description="Ceiling on the predicted rise of the loss; the smallest model under it is chosen.",
    )


class MethodSection(Section):
    """How the factors are chosen."""

    name: Annotated[str | None, Flag("--method", "NAME", "method", default="kfac")] = Field(
        default=None, description="Compression method; `eckart methods` lists them."
    )
    options: Annotated[dict[str, Any] | None, Flag("--option", "NAME=VALUE", "options")] = Field(
        default=None, description="Option of the method. Repeatable."
    )


class SitesSection(Section):
    """Which maps of the model are compressed."""

    include: Annotated[list[str] | None, Flag("--include", "PATTERN", "include")] = Field(
        default=None, description="Only maps whose name matches: a glob or re:REGEX. Repeatable."
    )
    exclude: Annotated[list[str] | None, Flag("--exclude", "PATTERN", "exclude")] = Field(
        default=None, description="Leave out maps whose name matches. Repeatable."
    )
    embeddings: Annotated[bool | None, Flag("--embeddings", "", "embeddings", default="no")] = Field(
        default=None, description="Compress embedding tables too."
    )
    head: Annotated[bool | None, Flag("--head", "", "head", default="no")] = Field(
        default=None, description="Compress output heads too."
    )


class FormsSection(Section):
    """In which shapes the factors may be stored."""

    allow: Annotated[
        list[FormName] | None, Flag("--form", "FORM", "forms", default="dense, lowrank, pivoted, narrow")
    ] = Field(
        default=None,
        description="Form that a map may take: dense, lowrank or pivoted; narrow: MLPs and attentions may become "
        "narrower (under one global budget); sparse: zeros that are not stored (under one in bytes). Repeatable.",
    )
    kinds: Annotated[
        Annotated[list[KindName], BeforeValidator(parse_kinds), Field(min_length=1)] | None,
        Flag("--options", "KINDS"),
    ] = Field(
        default=None,
        description="Which kinds of change a budget may choose from, instead of --form and --bits: some of rank, "
        "width, sparse, bits, with commas. sparse: zeros that are not stored, under a budget in bytes.",
    )
    bits: Annotated[list[Bits] | None, Flag("--bits", "BITS", "bits")] = Field(
        default=None,
        description="Bits that numbers may be stored in, beside those that they have: 8, 4 or 2. Repeatable. By "
        "default 8 and 4 under a budget in bytes, none under others.",
    )
    rank_multiple: Annotated[Positive | None, Flag("--rank-multiple", "N", "rank_multiple", default="1")] = Field(
        default=None, description="Ranks and widths are multiples of this; 32 suits most accelerators, 8 most CPUs."
    )
    min_rank: Annotated[Positive | None, Flag("--min-rank", "N", "min_rank", default="1")] = Field(
        default=None, description="Smallest rank that a map may get."
    )


class LoadSection(Section):
    """How the model is loaded."""

    dtype: Annotated[str | None, Flag("--dtype", "DTYPE", "dtype")] = Field(
        default=None, description="Load the weights as float32, bfloat16 or float16 instead of as stored."
    )
    device: Annotated[str | None, Flag("--device", "DEVICE", "device")] = Field(
        default=None, description="Device that computes: cpu, cuda, cuda:1, mps."
    )


class RunSection(LoadSection):
    """How the model is loaded and the computation runs."""

    seed: Annotated[int | None, Field(ge=0), Flag("--seed", "N", "seed", default="0")] = Field(
        default=None, description="Seed of everything that is drawn."
    )


class FileOutput(Section):
    """The file that is written."""

    file: Annotated[str | None, Flag("--output", "FILE", short="-o")] = Field(
        default=None, description="File to write."
    )
    overwrite: Annotated[bool | None, Flag("--overwrite", default="no")] = Field(
        default=None,
        description="Replace the output where it exists; the old one stands until the new one is whole.",
    )


class FolderOutput(Section):
    """The folder that is written."""

    folder: Annotated[str | None, Flag("--output", "DIR", short="-o")] = Field(
        default=None, description="Folder to write: weights, config, tokenizer, report and model card."
    )
    overwrite: Annotated[bool | None, Flag("--overwrite", default="no")] = Field(
        default=None,
        description="Replace the output where it exists; the old one stands until the new one is whole.",
    )
    max_shard_size: Annotated[str | None, Flag("--max-shard-size", "SIZE", default="5GB")] = Field(
        default=None, description="Largest weight file; bigger models are split."
    )


Model = Annotated[str | None, Flag("", "MODEL")]
_MODEL = "Folder or hub name of the model."


class CalibrateRecipe(Section):
    """Recipe of ``eckart calibrate``."""

    model: Model = Field(default=None, description=_MODEL)
    data: DataSection = DataSection()
    calibration: CalibrationSection = CalibrationSection()
    sites: SitesSection = SitesSection()
    run: RunSection = RunSection()
    output: FileOutput = FileOutput()


Allocation = Annotated[
    Literal["uniform", "typewise", "global"] | None,
    Flag("--allocation", "uniform|typewise|global", "allocation"),
]
_ALLOCATION = (
    "How the budget is spread: the same share everywhere, per type of map, or by predicted loss. "
    "By default global where the method's errors are in units of the loss."
)
Moments = Annotated[str | None, Flag("--moments", "FILE", "moments")]


class PlanRecipe(Section):
    """Recipe of ``eckart plan``."""

    model: Model = Field(default=None, description=_MODEL)
    moments: Moments = Field(default=None, description="File written by `eckart calibrate`.")
    budget: BudgetSection = BudgetSection()
    method: MethodSection = MethodSection()
    allocation: Allocation = Field(default=None, description=_ALLOCATION)
    sites: SitesSection = SitesSection()
    forms: FormsSection = FormsSection()
    run: LoadSection = LoadSection()
    output: FileOutput = FileOutput()


class CompressRecipe(Section):
    """Recipe of ``eckart compress``."""

    model: Model = Field(default=None, description=_MODEL)
    data: DataSection = DataSection()
    moments: Moments = Field(default=None, description="File written by `eckart calibrate`, instead of --data.")
    calibration: CalibrationSection = CalibrationSection()
    plan: Annotated[str | None, Flag("--plan", "FILE", "plan")] = Field(
        default=None, description="File written by `eckart plan`, instead of a budget and a method."
    )
    budget: BudgetSection = BudgetSection()
    method: MethodSection = MethodSection()
    allocation: Allocation = Field(default=None, description=_ALLOCATION)
    sites: SitesSection = SitesSection()
    forms: FormsSection = FormsSection()
    probe_rounds: Annotated[int | None, Field(ge=0), Flag("--probe-rounds", "N", "probe_rounds")] = Field(
        default=None,
        description="How often predicted losses are held against measured ones and the plan corrected. By default 1 "
        "with data and a global budget.",
    )
    refit_blend: Annotated[float | None, Field(ge=0, le=0.25), Flag("--refit-blend", "SHARE", "refit_blend")] = Field(
        default=None,
        description="Fit the last factor of every map again on what the compressed model passes on, with this share "
        "(0 to 0.25) of the original's inputs in the target. Needs --data and twice the memory.",
    )
    certify: Annotated[bool | None, Flag("--certify", "", "certify", default="yes")] = Field(
        default=None, description="Also fit every map on half of the calibration and measure it on the other."
    )
    queue: Annotated[str | None, Flag("--queue", "FOLDER", "queue")] = Field(
        default=None,
        description="Share the work through this folder: start the same command on several machines that see it. "
        "Needs --moments, or a method that needs none; torchrun shares a calibration too.",
    )
    stream: Annotated[bool | None, Flag("--stream", default="no")] = Field(
        default=None,
        description="For models larger than memory: one block at a time, from file to file. If it is killed, the same "
        "command goes on where it was.",
    )
    run: RunSection = RunSection()
    output: FolderOutput = FolderOutput()


class EvaluateRecipe(Section):
    """Recipe of ``eckart evaluate``."""

    model: Model = Field(default=None, description="Folder of the compressed model.")
    against: Annotated[str | None, Flag("--against", "BASE")] = Field(
        default=None, description="Folder or hub name of the original that it is measured against."
    )
    data: DataSection = DataSection()
    latency: Annotated[bool | None, Flag("--latency", "", "latency", default="yes")] = Field(
        default=None, description="Measure the time of forward passes too."
    )
    run: RunSection = RunSection()


class RepairSection(Section):
    """How what was lost is given back."""

    name: Annotated[str | None, Flag("--method", "NAME", "method", default="kfac")] = Field(
        default=None,
        description="kfac (least rise of the loss), eora or qera (least output error), svd (no data).",
    )
    options: Annotated[dict[str, Any] | None, Flag("--option", "NAME=VALUE", "options")] = Field(
        default=None, description="Option of the method. Repeatable."
    )
    rank: Annotated[Positive | None, Flag("--rank", "R", "rank", default="32")] = Field(
        default=None, description="Rank of the LoRA: of every map, or with --share the most that a map may get."
    )
    share: Annotated[Share | None, Flag("--share", "SHARE", "share")] = Field(
        default=None,
        description="Parameters of all repairs as a share of those of the repaired maps, spread by predicted loss.",
    )
    inputs: Annotated[Literal["base", "damaged"] | None, Flag("--inputs", "base|damaged", "inputs", default="base")] = (
        Field(default=None, description="Whose inputs the repairs are fitted on.")
    )


class AdapterOutput(Section):
    """The folder that is written."""

    folder: Annotated[str | None, Flag("--output", "DIR", short="-o")] = Field(
        default=None, description="Folder to write: an adapter for PEFT and how it was made."
    )
    overwrite: Annotated[bool | None, Flag("--overwrite", default="no")] = Field(
        default=None,
        description="Replace the output where it exists; the old one stands until the new one is whole.",
    )


class WeightsSection(Section):
    """Which weights are looked at."""

    include: Annotated[list[str] | None, Flag("--include", "PATTERN", "include")] = Field(
        default=None, description="Only weights whose name matches: a glob or re:REGEX. Repeatable."
    )
    exclude: Annotated[list[str] | None, Flag("--exclude", "PATTERN", "exclude")] = Field(
        default=None, description="Leave out weights whose name matches. Repeatable."
    )


class CompensateRecipe(Section):
    """Recipe of ``eckart compensate``."""

    model: Model = Field(default=None, description="Folder of the quantised, pruned or compressed model.")
    against: Annotated[str | None, Flag("--against", "BASE")] = Field(
        default=None, description="Folder or hub name of the model that it was made from."
    )
    data: DataSection = DataSection()
    moments: Moments = Field(default=None, description="File written by `eckart calibrate BASE`, instead of --data.")
    repair: RepairSection = RepairSection()
    run: RunSection = RunSection()
    output: AdapterOutput = AdapterOutput()


def parse_pattern_words(given: object) -> str:
    """``unstructured``, ``2:4``, …, as words with single spaces. Raises ValueError for others."""
    text = " ".join(str(given).lower().split())
    if text in ("unstructured", "row", "outputs", "inputs", "neurons", "heads") or re.fullmatch(r"runs of \d+", text):
        return text
    found = re.fullmatch(r"(\d+) ?: ?(\d+)|(?:keep )?(\d+) of (\d+)", text)
    if found is None:
        raise ValueError(
            "expected unstructured, row, 2:4 (keep 2 of 4), 'keep 2 of 8', 'runs of 16', outputs, inputs, neurons or "
            "heads"
        )
    n, m = (int(group) for group in found.groups() if group is not None)
    if not 1 <= n < m:
        raise ValueError("expected 1 ≤ n < m in 'keep n of m', where n is what stays")
    return f"keep {n} of {m}"


def pattern_share(pattern: str | None) -> float | None:
    """The share that "keep n of m" keeps; None for patterns that take any."""
    found = re.fullmatch(r"keep (\d+) of (\d+)", pattern or "")
    return None if found is None else int(found.group(1)) / int(found.group(2))


Pattern = Annotated[str, BeforeValidator(parse_pattern_words), WithJsonSchema({"type": "string"})]


class PruneSection(Section):
    """What is taken out."""

    keep: Annotated[float | None, Field(gt=0, lt=1), Flag("--keep", "SHARE", "keep")] = Field(
        default=None,
        description="Share that stays: of the weights, or of the neurons or heads of every layer. 0.5 removes half. "
        "'keep n of m' says it by itself.",
    )
    pattern: Annotated[Pattern | None, Flag("--pattern", "PATTERN", "pattern", default="unstructured")] = Field(
        default=None,
        description="unstructured, row, 2:4 (keep 2 of 4), 'keep 2 of 8': zeros, for size on disk. neurons or heads: "
        "narrower layers, which are smaller and faster.",
    )
    method: Annotated[
        Literal["kfac", "alps", "sparsegpt", "wanda", "magnitude"] | None,
        Flag("--method", "NAME", "method", default="kfac"),
    ] = Field(
        default=None,
        description="Which weights become zero: kfac, alps, sparsegpt, wanda or magnitude. "
        "alps is the default for 'keep n of m'.",
    )
    refit: Annotated[bool | None, Flag("--refit", "", "refit", default="yes")] = Field(
        default=None, description="Fit what stays to what was there, by least squares."
    )
    allocation: Annotated[
        Literal["loss", "uniform", "global", "owl", "farms"] | None,
        Flag("--allocation", "loss|uniform|global|owl|farms", "allocation"),
    ] = Field(
        default=None,
        description="How zeros are spread over the layers. By default loss for kfac, else uniform.",
    )
    rank: Annotated[int | None, Field(ge=0), Flag("--rank", "R", "rank", default="0")] = Field(
        default=None, description="Rank of a product beside every map with zeros, saved as a LoRA for PEFT."
    )


class NamesSection(Section):
    """Which maps of the model are pruned."""

    include: Annotated[list[str] | None, Flag("--include", "PATTERN", "include")] = Field(
        default=None, description="Only maps whose name matches: a glob or re:REGEX. Repeatable."
    )
    exclude: Annotated[list[str] | None, Flag("--exclude", "PATTERN", "exclude")] = Field(
        default=None, description="Leave out maps whose name matches. Repeatable."
    )


class PruneRecipe(Section):
    """Recipe of ``eckart prune``."""

    model: Model = Field(default=None, description=_MODEL)
    data: DataSection = DataSection()
    moments: Moments = Field(default=None, description="File written by `eckart calibrate`, instead of --data.")
    prune: PruneSection = PruneSection()
    sites: NamesSection = NamesSection()
    run: RunSection = RunSection()
    output: FolderOutput = FolderOutput()


TrainBudget = Annotated[
    dict[Literal["parameters", "model_keep"], float],
    BeforeValidator(parse_budget),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string"}]}),
]


class ExamplesSection(Section):
    """What is trained on."""

    source: Annotated[str | None, Flag("--data", "FILE")] = Field(
        default=None,
        description="JSONL file with prompt and completion, text and label, or text in each line; or a text file.",
    )
    held_out: Annotated[str | None, Flag("--held-out", "FILE", "held_out")] = Field(
        default=None, description="File that the loss is measured on, before and after. By default a part of --data."
    )
    held_out_share: Annotated[
        float | None, Field(gt=0, lt=1), Flag("--held-out-share", "SHARE", "held_out_share", default="0.1")
    ] = Field(default=None, description="Share of the rows of --data that is held out instead.")
    text: Annotated[str | None, Flag("--text-field", "NAME", default="text")] = Field(
        default=None, description="Field that holds the text."
    )
    prompt: Annotated[str | None, Flag("--prompt-field", "NAME", default="prompt")] = Field(
        default=None, description="Field that holds what is given."
    )
    completion: Annotated[str | None, Flag("--completion-field", "NAME", default="completion")] = Field(
        default=None, description="Field that holds what is learned to follow."
    )
    label: Annotated[str | None, Flag("--label-field", "NAME", default="label")] = Field(
        default=None, description="Field that holds the class."
    )
    length: Annotated[int | None, Field(ge=2), Flag("--length", "TOKENS", "length")] = Field(
        default=None,
        description="Tokens of an example at most; longer ones are cut. By default 256, or what the model takes.",
    )


class AdapterSection(Section):
    """What is trained."""

    name: Annotated[str | None, Flag("--method", "NAME", "method", default="lora")] = Field(
        default=None, description="Adaptation method; `eckart methods` lists them."
    )
    options: Annotated[dict[str, Any] | None, Flag("--option", "NAME=VALUE", "options")] = Field(
        default=None, description="Option of the method. Repeatable."
    )
    rank: Annotated[Positive | None, Flag("--rank", "R", "rank")] = Field(
        default=None, description="Rank of every layer. Without it and --budget the method's own rule."
    )
    budget: Annotated[TrainBudget | None, Flag("--budget", "SHARE|COUNT")] = Field(
        default=None,
        description="Numbers to train instead of a rank: 0.5% of the model's, or 300k. Spread over the layers.",
    )
    spread: Annotated[
        Literal["weight", "activation", "gradient"] | None,
        Flag("--spread", "weight|activation|gradient", "spread"),
    ] = Field(
        default=None,
        description="What a budget follows. By default activation for methods that start from inputs, else weight.",
    )
    targets: Annotated[list[str] | None, Flag("--target", "NAME", "targets", default="all-linear")] = Field(
        default=None, description="Layer, the end of its name, or all-linear. Repeatable."
    )


class TrainSection(Section):
    """How it is trained."""

    epochs: Annotated[float | None, Field(gt=0), Flag("--epochs", "N", "epochs", default="1.0")] = Field(
        default=None, description="Passes over the training rows."
    )
    steps: Annotated[Positive | None, Flag("--steps", "N", "steps")] = Field(
        default=None, description="Steps of the optimiser, instead of --epochs."
    )
    rate: Annotated[float | None, Field(gt=0), Flag("--lr", "RATE", "rate", default="0.0005")] = Field(
        default=None, description="Highest learning rate. It matters more than the method: try some."
    )
    batch_size: Annotated[Positive | None, Flag("--batch", "N", "batch_size", default="8")] = Field(
        default=None, description="Rows per step."
    )
    save_every: Annotated[Positive | None, Flag("--save-every", "STEPS", "save_every", default="100")] = Field(
        default=None, description="Steps between checkpoints; after a kill the same command goes on from the last one."
    )


class AdaptRecipe(Section):
    """Recipe of ``eckart adapt``."""

    model: Model = Field(default=None, description=_MODEL)
    data: ExamplesSection = ExamplesSection()
    adapter: AdapterSection = AdapterSection()
    moments: Moments = Field(
        default=None, description="File written by `eckart calibrate`, for methods that start from inputs."
    )
    train: TrainSection = TrainSection()
    run: RunSection = RunSection()
    output: AdapterOutput = AdapterOutput()


class InspectRecipe(Section):
    """Recipe of ``eckart inspect``."""

    model: Model = Field(default=None, description="Folder, .safetensors file or hub name.")
    tier: Annotated[
        Literal["quick", "standard", "full"] | None,
        Flag("--tier", "quick|standard|full", "tier", default="standard"),
    ] = Field(
        default=None,
        description="quick: norms and tails from windows, no spectra. standard: exact spectra. full: with --data also "
        "the dimension of embeddings and the curvature of the loss.",
    )
    against: Annotated[str | None, Flag("--against", "BASE", "against")] = Field(
        default=None, description="Model of the same shape; what changed against it is measured too."
    )
    data: DataSection = DataSection()
    weights: WeightsSection = WeightsSection()
    cache: Annotated[str | None, Flag("--cache", "DIR", "cache")] = Field(
        default=None, description="Folder that keeps what was measured of each weight, by its hash."
    )
    run: RunSection = RunSection()
    output: FileOutput = FileOutput()


RECIPES: dict[str, type[Section]] = {
    "calibrate": CalibrateRecipe,
    "plan": PlanRecipe,
    "compress": CompressRecipe,
    "evaluate": EvaluateRecipe,
    "compensate": CompensateRecipe,
    "prune": PruneRecipe,
    "adapt": AdaptRecipe,
    "inspect": InspectRecipe,
}
