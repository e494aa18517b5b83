"""ONNX graphs of compressed and plain models, checked against torch before they are kept."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn

from eckart import __version__
from eckart.checkpoint import atomic_folder, check_output, inspect_folder
from eckart.errors import EckartError, InputError, problems, unknown
from eckart.hf.exported import copy_rest, finish
from eckart.hf.models import LoadedModel, load_model
from eckart.hf.probes import TEXT, image_size, input_names, probe
from eckart.hf.quantizer import is_torchao
from eckart.hf.tasks import embedding_output
from eckart.layers import QuantisedEmbedding, QuantisedLinear, TiedLayer

Quantise = Literal["int8"]

MODEL = "model.onnx"
NOTE = "onnx.json"
"""Names, types and shapes of inputs and outputs, and how far the graph is from torch."""
EXTRA = ("onnx", "onnxscript", "onnxruntime")
EMBEDDING = "sentence_embedding"
"""The output that sentence-transformers folders have beside the token vectors."""
LOWEST_OPSET = 18
"""The oldest that torch's exporter translates to by itself."""
TOLERANCE: Mapping[str | None, float] = {None: 1e-4, "int8": 0.5}
"""Largest relative difference by ``quantise``: rounding for float32, and for int8 what is no model any more."""
SHAPES = ((2, 12), (3, 19), (1, 5))
"""Rows and tokens: the graph is traced with the first and checked with all, so its sizes are proved dynamic."""
LARGEST_FILE = 2_000_000_000
"""Bytes of weights above which they lie in a file of their own: protobuf ends at 2 GiB."""


def export_onnx(
    directory: str | Path,
    output: str | Path,
    *,
    overwrite: bool = False,
    opset: int | None = None,
    quantise: Quantise | None = None,
    tolerance: float | None = None,
) -> Path:
    """Write the model in ``directory``, compressed or plain, as a folder for onnxruntime that needs no torch.

    ``model.onnx`` takes (batch, length) ``input_ids`` and ``attention_mask``, ``token_type_ids`` where the
    tokenizer makes them, or ``pixel_values``; sizes are free. It gives every tensor that the model returns:
    ``logits``, or ``last_hidden_state`` with a ``pooler_output`` where there is one; a sentence-transformers
    folder also gives ``sentence_embedding``, pooled and of length 1. A decoder is exported without a cache. All
    is computed in float32. Factored layers stay factored, two products in place of one; layers with integer weights
    are written as the floats that they stand for, which ``quantise`` rounds again.

    ``opset``: 18 up to what the installed onnx knows; None leaves the choice to torch.
    ``quantise="int8"``: weights in int8 with a scale per output channel; inputs of each product are quantised as
    they come, word tables get one scale in all. Of the 8 bits 7 are used: where a CPU has no VNNI, onnxruntime's
    products of full int8 weights saturate, and the graph would compute something else there than where it was checked.
    MiniLM on 128 docstrings, mean cosine of token vectors: .9885; with all 8 bits .9893 (that AVX2 CPU saturating),
    unsigned .9901 and a fifth slower; one scale per matrix, the default of onnxruntime, .953.
    ``tolerance``: largest ‖onnx − torch‖ / ‖torch‖ of any output on any probe (Frobenius norms, random tokens
    with padding); None for 1e-4, or 0.5 with int8. The quantised graph is held against torch in float32.

    Padding belongs at the end: there is no input for positions. Cost: about three times the weights in memory.

    When it does not help: on the CPU without VNNI of ``benchmarks/onnx_export.py``, onnxruntime in float32 is no
    faster than torch on 512 tokens of MiniLM. At equal quality int8 alone wins there: cosine .992 at 105 ms, where
    three quarters of the maps' parameters in float32 (no training) already give .953 at 131 ms. Where a factored model
    is good enough, int8 costs it about .01 and takes a quarter of the bytes; at half the parameters it is then 1.4
    times as fast as dense int8, for one block alone 1.4 times at width 384 and 1.8 times at 1536. One run each.

    Raises InputError for options outside of these ranges, missing packages and models that it does not know,
    FileError for folders that cannot be read or written, EckartError where torch cannot translate the model or
    the graph differs by more than ``tolerance``. Nothing is left behind then.
    """
    _check(opset, quantise, tolerance)
    limit = TOLERANCE[quantise] if tolerance is None else tolerance
    source = Path(directory)
    state = inspect_folder(source).require_whole()
    if state.kind == "remote-code":
        raise InputError(f"{source} loads with code of its own, which Eckart never runs. Export the original folder.")
    check_output(output, overwrite=overwrite)
    loaded = load_model(source, dtype="float32")
    _use_floats(loaded.model)
    graph = _Graph(loaded)
    probes = [probe(loaded.model, graph.names, rows, min(length, _longest(loaded))) for rows, length in SHAPES]
    wanted = [graph.run(batch) for batch in probes]
    with atomic_folder(output, overwrite=overwrite) as folder:
        path = folder / MODEL
        with _quiet():
            _translate(loaded, graph, probes[0], opset).save(path, external_data=_bytes(loaded.model) > LARGEST_FILE)
            if opset not in (None, _opset(path)):
                raise EckartError(f"torch could not write opset {opset}, only {_opset(path)}. Nothing was written.")
            known, checks = _compare(path, graph, probes, wanted)
            _require(checks, TOLERANCE[None] if quantise else limit, f"the graph of {loaded.name}")
            if quantise:
                quantise_graph(path)
                known, checks = _compare(path, graph, probes, wanted)
                _require(checks, limit, f"the {quantise} graph of {loaded.name}")
        copy_rest(source, folder, skip={*state.weight_files, "config.json"})
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        config.pop("quantization_config", None)
        _write_json(folder / "config.json", config)
        note = {
            "format": "onnx",
            "source": str(directory),
            "task": loaded.task,
            **known,
            "pooling": loaded.pooling if EMBEDDING in graph.outputs else None,
            "opset": _opset(path),
            "quantised": quantise,
            "largest_difference": max(check["difference"] for check in checks),
            "relative_difference": max(check["relative"] for check in checks),
            "tolerance": limit,
            "checks": checks,
            "versions": _versions(),
        }
        _write_json(folder / NOTE, note)
        finish(source, folder, "onnx", f"onnxruntime; `{NOTE}` names inputs and outputs")
    return Path(output)


def _use_floats(model: nn.Module) -> None:
    """Replace integer weights, Eckart's and torchao's, by the floats that they stand for.

    Their bit operations do not translate: BitwiseAnd gets two types (torch 2.13). Tied heads keep one table.
    """
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None and is_torchao(weight):
                module.register_parameter(name, nn.Parameter(weight.dequantize()))
    dense: dict[int, nn.Module] = {}
    for name, layer in list(model.named_modules()):
        if isinstance(layer, (QuantisedLinear, QuantisedEmbedding)):
            dense[id(layer)] = layer.to_dense()
            model.set_submodule(name, dense[id(layer)])
    for name, layer in list(model.named_modules()):
        if isinstance(layer, TiedLayer) and id(layer.table) in dense:
            plain = layer.to_dense()
            plain.weight = dense[id(layer.table)].get_parameter("weight")
            model.set_submodule(name, plain)


class _Graph(nn.Module):
    """The model as a function of tensors alone: the inputs in order to a tuple of outputs."""

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__()
        self.model = loaded.model.eval()
        loaded.model.config.use_cache = False  # type: ignore[union-attr]
        made = getattr(loaded.tokenizer, "model_input_names", TEXT[:2])
        self.names = input_names(loaded.model, made)
        if "decoder_input_ids" in self.names:
            raise InputError(
                f"{type(loaded.model).__name__} is an encoder with a decoder, which ONNX would need as two graphs; "
                "expected a model of one input and one output."
            )
        sentences = loaded.path is not None and (loaded.path / "modules.json").is_file()
        self.pooled = embedding_output(loaded) if sentences and loaded.task == "embedding" else None
        self.outputs: tuple[str, ...] = ()
        self.outputs = tuple(self.results(probe(loaded.model, self.names, 1, 4)))
        if not self.outputs:
            raise InputError(f"{type(loaded.model).__name__} returns no tensor. Pass a model with an output.")

    def results(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every tensor among the outputs, by name."""
        with torch.no_grad():
            outputs = self.model(**batch, return_dict=True)
        found = {name: value for name, value in outputs.items() if isinstance(value, Tensor)}
        return found if self.pooled is None else {**found, EMBEDDING: self.pooled(outputs, batch)}

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.results(dict(zip(self.names, values, strict=True))).values())

    def run(self, batch: Mapping[str, Tensor]) -> list[Tensor]:
        return list(self(*batch.values()))


def _check(opset: int | None, quantise: str | None, tolerance: float | None) -> None:
    """All that is wrong with the options, at once, before anything is loaded."""
    found = []
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        found.append(f"it needs {', '.join(missing)}: pip install 'eckart[onnx]'")
    if quantise not in TOLERANCE:
        found.append(unknown("quantisation", str(quantise), ["int8"]))
    if tolerance is not None and not (math.isfinite(tolerance) and tolerance > 0):
        found.append(f"tolerance is a relative difference above 0; got {tolerance!r}")
    if opset is not None and not missing:
        import onnx

        highest = onnx.defs.onnx_opset_version()
        if not LOWEST_OPSET <= opset <= highest:
            found.append(f"opset goes from {LOWEST_OPSET} to {highest} (onnx {onnx.__version__}); got {opset}")
    if found:
        raise InputError(problems("the export to ONNX cannot run", found))


def _longest(loaded: LoadedModel) -> int:
    return loaded.max_length or max(length for _, length in SHAPES)


def _bytes(model: nn.Module) -> int:
    return sum(weight.nbytes for weight in model.parameters())


def _dimensions(loaded: LoadedModel, name: str) -> dict[int, Any]:
    """The dimensions of an input that are free."""
    free = ["batch"] if name == "pixel_values" else ["batch", "length"]
    dims = {i: torch.export.Dim(word) for i, word in enumerate(free)}
    if name == "pixel_values" and image_size(loaded.model.config) is None:
        dims |= {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    return dims


def _translate(loaded: LoadedModel, graph: _Graph, batch: Mapping[str, Tensor], opset: int | None) -> Any:
    """The ONNX program of torch's exporter; EckartError with its first reason where it gives up.

    A model whose fused attention cannot be translated (T5 in torch 2.13) is tried again with plain products.
    """
    try:
        return _program(loaded, graph, batch, opset)
    except torch.onnx.OnnxExporterError as error:
        reason = _in_short(error.__cause__ or error)
    try:
        loaded.model.set_attn_implementation("eager")  # type: ignore[operator]
        return _program(loaded, graph, batch, opset)
    except (torch.onnx.OnnxExporterError, AttributeError, ValueError) as error:
        raise EckartError(
            f"torch {torch.__version__} cannot translate {loaded.name} ({type(loaded.model).__name__}) to ONNX: "
            f"{reason} Nothing was written."
        ) from error


def _program(loaded: LoadedModel, graph: _Graph, batch: Mapping[str, Tensor], opset: int | None) -> Any:
    return torch.onnx.export(
        graph,
        tuple(batch.values()),
        dynamo=True,
        dynamic_shapes=(tuple(_dimensions(loaded, name) for name in graph.names),),
        input_names=list(graph.names),
        output_names=list(graph.outputs),
        opset_version=opset,
        verbose=False,
    )


def _compare(
    path: Path, graph: _Graph, probes: list[dict[str, Tensor]], wanted: list[list[Tensor]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the graph says of its inputs and outputs, and its difference from torch on each probe.

    ``difference``: max |onnx − torch|; ``relative``: ‖onnx − torch‖ / ‖torch‖ of the worst output. Padding is left
    out: where a window of attention holds nothing else, its results depend on how a softmax of nothing is rounded.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        found = [session.run(None, {name: x.numpy() for name, x in batch.items()}) for batch in probes]
    except Exception as error:  # onnxruntime's exceptions have no base of their own
        raise EckartError(
            f"onnxruntime {onnxruntime.__version__} does not run the graph: {_in_short(error)} Nothing was written; "
            "try another opset or a later onnxruntime."
        ) from error
    checks = []
    for batch, ours, theirs in zip(probes, found, wanted, strict=True):
        pairs = [(torch.from_numpy(a).double(), b.double()) for a, b in zip(ours, theirs, strict=True)]
        if any(a.shape != b.shape for a, b in pairs):
            raise EckartError(
                f"the graph gives shapes {[list(a.shape) for a, _ in pairs]}, "
                f"torch {[list(b.shape) for _, b in pairs]}. Nothing was written."
            )
        real = batch["attention_mask"].bool() if "attention_mask" in batch else slice(None)
        by_token = ["length" in output.shape for output in session.get_outputs()]
        pairs = [(a[real], b[real]) if tokens else (a, b) for (a, b), tokens in zip(pairs, by_token, strict=True)]
        checks.append(
            {
                "shape": list(next(iter(batch.values())).shape),
                "difference": max(float((a - b).abs().max()) for a, b in pairs),
                "relative": max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs),
            }
        )
    known = {
        "inputs": {x.name: {"type": x.type, "shape": list(x.shape)} for x in session.get_inputs()},
        "outputs": {x.name: {"type": x.type, "shape": list(x.shape)} for x in session.get_outputs()},
    }
    return known, checks


def _require(checks: list[dict[str, Any]], limit: float, what: str) -> None:
    """Raises EckartError where a check is above the limit or not a number."""
    worst = max(checks, key=lambda check: math.inf if math.isnan(check["relative"]) else check["relative"])
    if not worst["relative"] <= limit:
        raise EckartError(
            f"{what} differs from torch by {worst['relative']:.2e} relative ({worst['difference']:.2e} at most) on an "
            f"input of shape {worst['shape']}; allowed is {limit:.0e}. Nothing was written; raise the tolerance only "
            "if you measure the graph yourself."
        )


def quantise_graph(path: Path) -> None:
    """Replace the float graph at ``path`` by one with 8-bit weights, as ``export_onnx(quantise="int8")`` does."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    data = path.with_name(f"{MODEL}.data")
    original = path.with_name("float.onnx")
    large = data.exists()
    path.rename(original)  # its weights beside it keep the name that it knows them by
    quantised = path.with_name("int8.onnx") if large else path
    quantize_dynamic(
        str(original),
        str(quantised),
        per_channel=True,
        weight_type=QuantType.QInt8,
        reduce_range=True,
        use_external_data_format=large,
    )
    original.unlink()
    if large:
        _gather(quantised, path, data)


def _gather(written: Path, path: Path, data: Path) -> None:
    """Rewrite a graph with outside weights under the names of :data:`MODEL`."""
    import onnx

    graph = onnx.load(str(written))
    for old in (written, written.with_name(f"{written.name}.data"), data):
        old.unlink(missing_ok=True)
    onnx.save(graph, str(path), save_as_external_data=True, all_tensors_to_one_file=True, location=data.name)


def _opset(path: Path) -> int:
    """The opset that the file itself names."""
    import onnx

    imports = onnx.load(str(path), load_external_data=False).opset_import
    return next(int(entry.version) for entry in imports if entry.domain in ("", "ai.onnx"))


def _versions() -> dict[str, str]:
    import onnx
    import onnxruntime

    packages = {"onnx": onnx, "onnxruntime": onnxruntime, "torch": torch, "transformers": transformers}
    return {"eckart": __version__, **{name: package.__version__ for name, package in packages.items()}}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _in_short(error: BaseException) -> str:
    """The beginning of a message that may go over many lines."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= 300 else f"{text[:300]} …").rstrip(".") + "."


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the notes of torch's exporter and onnxruntime's quantiser, which concern their developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
