"""Eckart's default against the official implementations of its peers, in one process on one causal LM.

    python benchmarks/peers.py [--testbed FOLDER] [--peers FOLDER] [--removed 0.2 0.4 0.6] [--rows WORD …]

``--peers`` is a folder that holds clones named ``lems`` (lems-svd/lems), ``SVD-LLM`` (AIoT-MLSys-Lab/SVD-LLM) and
``ASVD4LLM`` (hahnyuan/ASVD4LLM). lems imports matplotlib, pulp, gurobipy, optuna and scikit-learn; goldcrest, from
PyPI, imports tensorly and tensorly-torch. None of it belongs to Eckart: whoever runs the benchmark fetches it, and
what is absent is left out.

Everything runs on one thread of the CPU, on the same windows of ``calib.txt`` (200 of 256 tokens), over the same
maps, to the same share of their parameters. Bits per byte are measured by ``eckart.evaluate`` on ``valid.txt``.
Seconds are CPU seconds from the folder of the model to the compressed model in memory, reading and calibrating
included, imports left out. lems and ASVD4LLM cache what does not depend on the target, the former by default: the
seconds of the first share are those of a compression from nothing. The peers' own functions calibrate, search and
decompose; the adapters below hand them windows and take the factors out, and nothing in the clones is changed.
Where they insist:

- They ask for CUDA: :func:`on_cpu` answers with the CPU. No arithmetic is changed by it.
- Dobi-SVD cannot use windows longer than the model is wide: its windows are cut into halves of 128 tokens.
- LEMS searches on windows of its own and drops the first 256 positions of each: it gets 16 windows of 512 tokens from
  the same text. ASVD searches on the first 32 windows, its own number.
- SVD-LLM's attention cannot hold grouped keys and values; its factors are taken out before they are run. Its files
  for OPT and Mistral import a function that transformers no longer has; an empty module stands in.
- ASVD4LLM imports lm_eval 0.3 for zero-shot tasks; an empty module stands in. The head, which is tied, is left out of
  its search, since only the maps of the blocks are compressed here.
- goldcrest undoes its whitening with L⁻¹ where L⁻ᵀ is needed (``svd_data_whitening.py``, 0.1.0); its figures are as it
  gives them.

A method whose original did not run is measured by its published formula in Eckart and marked so, with the error.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import importlib
import importlib.metadata
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import eckart
from eckart.arch import find_sites
from eckart.hf.models import LoadedModel
from eckart.verbs.models import as_batches, as_loaded
from small_llama import trained_llama

RESULTS = Path(__file__).parent / "results"
REMOVED = (0.2, 0.4, 0.6)
WINDOWS = 100
"""Held-out windows of 256 tokens."""
OMIT = ["norm", "patch_embed", "head", "downsample", "decoder.project_", "dt_proj"]
"""What lems leaves out, as in its configs/config.yaml."""
FACTORS = ("dense", "lowrank")
PARTS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Row:
    """One method as its authors run it, or its formula."""

    name: str
    clone: str
    """The clone or package that it needs."""
    run: Callable[[Path, float], nn.Module]
    """Testbed and share to keep → compressed model."""
    formula: tuple[str, str] | None = None
    """Method and allocation in Eckart of the published formula."""


# --- what the peers are given


@contextlib.contextmanager
def on_cpu(folder: str) -> Iterator[None]:
    """Answer a peer's calls to CUDA with the CPU, in a folder for its caches, in silence."""

    def here(device: Any) -> Any:
        return "cpu" if str(device).startswith("cuda") else device

    def moving(method: Any) -> Any:
        def to(self: Any, *args: Any, **named: Any) -> Any:
            named = {key: here(value) if key == "device" else value for key, value in named.items()}
            first = (here(args[0]),) if args and isinstance(args[0], (str, torch.device)) else args[:1]
            return method(self, *first, *args[1:], **named)

        return to

    zeros_like = torch.zeros_like
    before, text = Path.cwd(), io.StringIO()
    with contextlib.ExitStack() as stack:
        os.chdir(folder)
        stack.callback(os.chdir, before)
        Path("cache").mkdir(exist_ok=True)
        stack.enter_context(contextlib.redirect_stdout(text))
        stack.enter_context(contextlib.redirect_stderr(text))
        for owner, name, value in (
            (torch.cuda, "is_available", lambda: False),
            (torch.cuda, "current_device", lambda: "cpu"),
            (torch.cuda, "device", lambda _: contextlib.nullcontext()),
            (torch.cuda, "synchronize", lambda *_: None),
            (torch.Tensor, "pin_memory", lambda self, *_: self),
            (torch.Tensor, "to", moving(torch.Tensor.to)),
            (nn.Module, "to", moving(nn.Module.to)),
            (torch, "zeros_like", lambda *args, pin_memory=False, **named: zeros_like(*args, **named)),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def opened(testbed: Path) -> LoadedModel:
    return as_loaded(testbed)


def windows(loaded: LoadedModel, testbed: Path, samples: int = 200, length: int = 256, seed: int = 0) -> list[Tensor]:
    """Windows of the calibration text (1, tokens) each; by default those of ``eckart.compress``."""
    batches, _ = as_batches(loaded, str(testbed / "calib.txt"), part="calibration", field=None, samples=samples,
                            length=length, batch_size=1, seed=seed)  # fmt: skip
    return [batch["input_ids"] for batch in batches if not isinstance(batch, Tensor)]


def named(batches: list[Tensor]) -> list[dict[str, Tensor]]:
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in batches]


# --- the peers


def lems(svd: str, search: str, svd_options: dict[str, Any], search_options: dict[str, Any], length: int = 256) -> Any:
    """One of the pipelines of lems, by the arguments that its run.py builds from its configs.

    ``length`` cuts the windows of the calibration.
    """

    def run(testbed: Path, keep: float) -> nn.Module:
        core = importlib.import_module("compression.svd_core")
        loaded = opened(testbed)
        common = {"use_cache": True, "progressive_compression": False, "blockwise_factorization": False,
                  "do_post_calibration": "default", "vision": False, "workspace_dir": "."}  # fmt: skip
        shared = {"ratio_target": keep, "sequence_length": 512, "use_cache": True, "workspace_dir": "."}
        calibration = [part for ids in windows(loaded, testbed) for part in torch.split(ids, length, dim=1)]
        factoriser = core.ModelFactorizer(svd, {**common, **svd_options}, search, {**shared, **search_options})
        model: nn.Module = factoriser.factorize_and_search(
            model=loaded.model,
            calib_data=named(calibration),
            eval_data=named(windows(loaded, testbed, samples=16, length=512, seed=1000)),
            calib_dataset_name="calib",
            mixup_fn=None,
            name_omit=OMIT,
        )[3]
        return model

    return run


SEARCH = {"sensitivity_loss": "energy2_normal_klscaled", "measurements_points": "0.1", "crosslayer_term": "harmonicv2",
          "halpha": 0.0, "hgamma": 5.0, "enforce_rank_multiples_of": 8, "solver": "gurobi"}  # fmt: skip
"""configs/search/lems.yaml"""
WHITEN = {"whitening_method": "cholesky", "memory_efficient": False, "truncate": True}
KFAC = {"fast": False, "truncate": True}


def svd_llm(testbed: Path, keep: float) -> nn.Module:
    """Whitening and truncation of SVD-LLM's SVDLLM.py (its step 1)."""
    code = importlib.import_module("SVDLLM")
    loaded = opened(testbed)
    model: Any = loaded.model
    profile = code.profle_svdllm("llama", model, named(windows(loaded, testbed)), "cpu")
    layers = [(layer.self_attn, layer.mlp) for layer in model.model.layers]
    code.whitening("llama", model, profile, keep, "cpu")
    for layer, kept in zip(model.model.layers, layers, strict=True):
        made = (layer.self_attn, layer.mlp)
        layer.self_attn, layer.mlp = kept
        for part in PARTS:
            holder, source = (kept[0], made[0]) if part in "qkvo" else (kept[1], made[1])
            down, up = (getattr(source, f"{part}_{side}_proj").weight.data for side in "vu")
            setattr(holder, f"{part}_proj", two_factors(down, up))
    return model  # type: ignore[no-any-return]


def two_factors(down: Tensor, up: Tensor) -> nn.Module:
    """up (out, rank) · down (rank, in) as two linear maps."""
    first = nn.Linear(down.shape[1], down.shape[0], bias=False)
    second = nn.Linear(up.shape[1], up.shape[0], bias=False)
    first.weight, second.weight = nn.Parameter(down), nn.Parameter(up)
    return nn.Sequential(first, second)


def asvd(testbed: Path, keep: float) -> nn.Module:
    """ASVD4LLM's asvd.py with its defaults: α = ½ of the mean absolute inputs, ranks by measured perplexity."""
    act, sensitivity, search = (
        importlib.import_module(name) for name in ("act_aware_utils", "sensitivity", "binary_search")
    )
    args = argparse.Namespace(
        scaling_method="abs_mean", alpha=0.5, n_calib_samples=32, calib_dataset="calib", rank_align=1, act_aware=True,
        sigma_fuse="UV", compress_kv_cache=False, ppl_target=-1, param_ratio_target=keep,
    )  # fmt: skip
    torch.manual_seed(233)
    loaded = opened(testbed)
    model: Any = loaded.model
    calibration = named(windows(loaded, testbed))
    act.calib_input_distribution(model, calibration, args.scaling_method, True)
    found = sensitivity.calib_sensitivity_ppl(model, calibration[:32], args, True)
    found = {name: by for name, by in found.items() if name != "lm_head"}
    search.binary_search_truncation_rank(model, found, calibration[:32], args)
    return model  # type: ignore[no-any-return]


def goldcrest(kind: str) -> Any:
    """goldcrest's SVD-LLM pipeline with its closed-form update, or its ASVD plugins."""

    def run(testbed: Path, keep: float) -> nn.Module:
        code = importlib.import_module("goldcrest.plugins.compression")
        context = importlib.import_module("goldcrest.framework.context").PipelineContext(workspace_dir="work")
        loaded = opened(testbed)
        model: Any = loaded.model
        calibration = windows(loaded, testbed)
        data = named([torch.cat(calibration[i : i + 16]) for i in range(0, len(calibration), 16)])
        sites = find_sites(model)

        def bracketed(name: str) -> str:
            return name.replace("layers.", "layers[", 1).replace(".", "].", 2).replace("].", ".", 1)

        names = [bracketed(site.name) for site in sites]
        if kind == "svd-llm":
            plugin = code.SVDLLMPipelinePlugin(target_modules=names, rank_ratio=keep, n_samples=len(calibration))
            plugin.initialize(context)
            plugin.execute(model=model, dataloader=data)
            return model  # type: ignore[no-any-return]
        collector = code.CalibrationCollectorPlugin(
            n_samples=len(calibration), collect_outputs=False, collect_xtx=False,
            target_modules=[site.name for site in sites],
        )  # fmt: skip
        scaling = code.ActivationScalingPlugin()
        for plugin, given in ((collector, {"model": model, "dataloader": data}), (scaling, {})):
            plugin.initialize(context)
            plugin.execute(**given)
        for name, site in zip(names, sites, strict=True):
            rows, columns = model.get_submodule(site.name).weight.shape
            consolidator = code.ModelConsolidator(
                compression_method="svd", target_modules=[name], rank=int(rows * columns * keep / (rows + columns)),
                use_activation_scaling=True,
            )  # fmt: skip
            consolidator.initialize(context)
            consolidator.compress_model_with_surgery(model)
        return model  # type: ignore[no-any-return]

    return run


ROWS = (
    Row("SVD, uniform", "lems", lems("svd", "uniform", {}, {}), ("svd", "uniform")),
    Row("FWSVD, uniform", "lems", lems("fwsvd", "uniform", {"alpha": 1.0}, {}), ("fwsvd", "uniform")),
    Row("ASVD, uniform", "lems", lems("asvd", "uniform", {"alpha": 1.0}, {}), ("asvd", "uniform")),
    Row("Dobi-SVD, uniform", "lems", lems("dobi_svd", "uniform", {}, {}, length=128)),
    Row("SVD-LLM, uniform", "lems", lems("svd_llm", "uniform", WHITEN, {}), ("whitened", "uniform")),
    Row(
        "SVD-LLM V2",
        "lems",
        lems("svd_llm", "svd_llmv2", {**WHITEN, "whitening_method": "svd"}, {"sensitivity_loss": "energy1"}),
        ("whitened", "typewise"),
    ),
    Row("KFAC-SVD, uniform", "lems", lems("kfac_svd", "uniform", KFAC, {}), ("kfac", "uniform")),
    Row("SVD-LLM, LEMS", "lems", lems("svd_llm", "lems", WHITEN, SEARCH)),
    Row("KFAC-SVD, LEMS", "lems", lems("kfac_svd", "lems", {**KFAC, "do_post_calibration": "False"}, SEARCH)),
    Row("GFWSVD, uniform", "lems", lems("gfwsvd", "uniform", {}, {})),
    Row("SVD-LLM", "SVD-LLM", svd_llm, ("whitened", "uniform")),
    Row("ASVD", "ASVD4LLM", asvd, ("asvd", "uniform")),
    Row("SVD-LLM with update", "goldcrest", goldcrest("svd-llm")),
    Row("ASVD, uniform", "goldcrest", goldcrest("asvd"), ("asvd", "uniform")),
)
OURS: dict[str, dict[str, Any]] = {
    "eckart: default": {},
    "eckart: default, 24 windows, no probes or certificate": {"samples": 24, "probe_rounds": 0, "certify": False},
    "eckart: kfac, uniform": {"method": "kfac", "allocation": "uniform", "forms": FACTORS, "certify": False},
    "eckart: whitened, uniform": {"method": "whitened", "allocation": "uniform", "forms": FACTORS, "certify": False},
    "eckart: asvd, uniform": {"method": "asvd", "allocation": "uniform", "forms": FACTORS, "certify": False},
    "eckart: fwsvd, uniform": {"method": "fwsvd", "allocation": "uniform", "forms": FACTORS, "certify": False},
    "eckart: svd, uniform": {"method": "svd", "allocation": "uniform", "forms": FACTORS, "data": None},
}
"""The default, the default on less, and the estimators of the peers, two factors and equal shares, without the
certificate that they do not have either."""
MODULES = {
    "lems": ("compression.svd_core", "compression.search.lems"),
    "SVD-LLM": ("SVDLLM",),
    "ASVD4LLM": ("sensitivity", "binary_search"),
    "goldcrest": ("goldcrest.plugins.compression",),
}


# --- measuring


def find_peers(folder: Path | None) -> tuple[dict[str, str], dict[str, str]]:
    """Versions of the peers that can be imported, and why the others cannot."""
    versions, missing = {}, {}
    base = types.ModuleType("lm_eval.base")
    base.BaseLM = object  # type: ignore[attr-defined]
    whole = types.ModuleType("lm_eval")
    whole.base, whole.evaluator = base, None  # type: ignore[attr-defined]
    masks = types.ModuleType("transformers.modeling_attn_mask_utils")
    masks._prepare_4d_causal_attention_mask = None  # type: ignore[attr-defined]
    stand_ins = {
        "ASVD4LLM": {"lm_eval": whole, "lm_eval.base": base},
        "SVD-LLM": {"transformers.modeling_attn_mask_utils": masks},
    }
    for peer, modules in MODULES.items():
        try:
            if peer == "goldcrest":
                versions[peer] = f"PyPI {importlib.metadata.version('goldcrest')}"
            elif folder is None or not (folder / peer).is_dir():
                raise FileNotFoundError(f"no clone {peer} in --peers")
            else:
                sys.path.insert(0, str((folder / peer).resolve()))
                versions[peer] = commit(folder / peer)
            with tempfile.TemporaryDirectory() as scratch, on_cpu(scratch), mock.patch.dict(sys.modules):
                sys.modules |= stand_ins.get(peer, {})
                for module in modules:
                    importlib.import_module(module)
                known = dict(sys.modules)
            sys.modules.update(known)
        except Exception as error:
            versions.pop(peer, None)
            missing[peer] = one_line(error)
    gc.freeze()  # lems collects garbage after every map; what others imported shall not cost it time
    return versions, missing


def commit(clone: Path) -> str:
    """The commit of a clone, or of a snapshot that keeps it in a file named COMMIT."""
    if (clone / "COMMIT").exists():
        return (clone / "COMMIT").read_text().strip()
    found = subprocess.run(["git", "-C", str(clone), "rev-parse", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def cpu_seconds() -> float:
    """CPU seconds of this process and of the solvers that it started."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


class Bench:
    """The testbed, and figures of models on it."""

    def __init__(self, testbed: Path) -> None:
        self.testbed = testbed
        self.base = as_loaded(testbed)
        self.sites = [site.name for site in find_sites(self.base.model)]
        self.parameters = sum(self.base.model.get_submodule(name).weight.numel() for name in self.sites)  # type: ignore

    def kept(self, model: nn.Module) -> float:
        """Share of the maps' parameters that the matrices at their places have.

        A diagonal between two factors, which goldcrest stores as a square matrix, could be multiplied into one of
        them and is not counted.
        """

        def counts(p: Tensor) -> bool:
            return p.ndim == 2 and not (p.shape[0] == p.shape[1] and bool((p == p.diagonal().diag()).all()))

        parameters = (p for name in self.sites for p in model.get_submodule(name).parameters())
        return sum(p.numel() for p in parameters if counts(p)) / self.parameters

    def figures(self, model: nn.Module, seconds: float, kept: float | None = None) -> dict[str, float]:
        smaller = dataclasses.replace(self.base, model=model.eval(), path=None)
        found = eckart.evaluate(smaller, self.base, str(self.testbed / "valid.txt"), latency=False, samples=WINDOWS)
        return {
            "bits_per_byte": round(found.metrics["bits_per_byte"].mean, 4),
            "kept": round(self.kept(model) if kept is None else kept, 4),
            "cpu_seconds": round(seconds, 1),
        }

    def eckart(self, keep: float, **options: Any) -> dict[str, float]:
        start = cpu_seconds()
        made = eckart.compress(self.testbed, **{"data": str(self.testbed / "calib.txt"), "keep": keep, **options})
        seconds = cpu_seconds() - start
        share = made.outcome.sites_after.parameters / made.outcome.sites_before.parameters
        return self.figures(made.model, seconds, share)

    def peer(self, row: Row, keep: float, folder: str) -> dict[str, float]:
        torch.manual_seed(0)
        with on_cpu(folder):
            start = cpu_seconds()
            model = row.run(self.testbed, keep)
            seconds = cpu_seconds() - start
        return self.figures(model, seconds)


def attempt(bench: Bench, row: Row, keep: float, folder: str) -> dict[str, float] | str:
    """The figures, or the error that the original ended in."""
    try:
        return bench.peer(row, keep, folder)
    except (Exception, SystemExit) as error:
        return one_line(error)


def run(
    testbed: Path, peers: Path | None, removed: list[float], wanted: list[str], save: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """All figures; ``save`` is called before every row."""
    bench = Bench(testbed.resolve())
    versions, missing = find_peers(peers)
    whole = eckart.evaluate(bench.base, bench.base, str(bench.testbed / "valid.txt"), latency=False, samples=WINDOWS)
    rows: dict[str, Any] = {}
    formulas: dict[tuple[str, str], dict[str, Any]] = {}
    result = {
        "testbed": bench.testbed.name,
        "maps": len(bench.sites),
        "bits_per_byte_dense": round(whole.metrics["bits_per_byte"].mean, 4),
        "versions": {
            **{name: importlib.metadata.version(name) for name in ("eckart", "torch", "transformers")},
            **versions,
        },
        "device": "one thread of the CPU",
        "rows": rows,
    }

    def note(name: str, share: float, figures: dict[str, float]) -> None:
        rows.setdefault(name, {"figures": {}})["figures"][str(share)] = figures
        print(f"{name:44s} {share:.0%} removed: {figures}", flush=True)

    for name, options in OURS.items():
        if name == "eckart: default" or not wanted or any(word in name for word in wanted):
            for share in removed:
                note(name, share, bench.eckart(round(1 - share, 3), **options))
    for row in ROWS:
        save(result)
        name = f"{row.clone}: {row.name}"
        if wanted and not any(word in name for word in wanted):
            continue
        why = missing.get(row.clone)
        with tempfile.TemporaryDirectory() as folder:
            for share in removed if why is None else []:
                found = attempt(bench, row, round(1 - share, 3), folder)
                if isinstance(found, str):
                    why = found
                    break
                note(name, share, found)
        if why is None:
            continue
        rows[name] = {"original_did_not_run": why, "figures": {}}
        print(f"{name:44s} did not run: {why}", flush=True)
        if row.formula is None:
            continue
        if row.formula not in formulas:
            method, allocation = row.formula
            formulas[row.formula] = {
                str(share): bench.eckart(
                    round(1 - share, 3), method=method, allocation=allocation, forms=FACTORS, certify=False
                )
                for share in removed
            }
        rows[name] |= {"formula": "reimplemented: {}, {}".format(*row.formula), "figures": formulas[row.formula]}
        for share in removed:
            print(f"{name + ' (formula)':44s} {share:.0%} removed: {rows[name]['figures'][str(share)]}", flush=True)
    return result


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    first = next(iter(result["rows"].values()))["figures"]
    lines = ["| bits per byte (CPU s) | " + " | ".join(f"{float(r):.0%} removed" for r in first) + " |"]
    lines.append("|---" * (len(first) + 1) + "|")
    for name, row in result["rows"].items():
        label = name + (" (formula, reimplemented)" if "formula" in row else "")
        cells = [f"{by['bits_per_byte']:.3f} ({by['cpu_seconds']:.0f})" for by in row["figures"].values()]
        lines.append(f"| {label} | " + " | ".join(cells or ["did not run"] * len(first)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--testbed", type=Path, help="folder of a causal LM with calib.txt and valid.txt")
    parser.add_argument("--peers", type=Path, help="folder of the clones")
    parser.add_argument("--removed", type=float, nargs="+", default=list(REMOVED))
    parser.add_argument("--rows", nargs="+", default=[], help="words in the names of the rows to run")
    args = parser.parse_args()
    torch.set_num_threads(1)
    file = RESULTS / "peers.json"
    old = json.loads(file.read_text())["rows"] if args.rows and file.exists() else {}

    def save(result: dict[str, Any]) -> None:
        """Whole shares only; rows that are not run again stay as they were measured."""
        if args.removed == list(REMOVED):
            RESULTS.mkdir(exist_ok=True)
            file.write_text(json.dumps({**result, "rows": {**old, **result["rows"]}}, indent=2) + "\n")

    result = run(args.testbed or trained_llama(), args.peers, args.removed, args.rows, save)
    save(result)
    print(f"dense: {result['bits_per_byte_dense']:.4f} bits per byte\n\n{table(result)}")


if __name__ == "__main__":
    main()
