"""Pretrained models from a folder or the hub, with what Eckart must know about them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from eckart.errors import FileError, InputError, unknown
from eckart.hf.mapped import map_pretrained
from eckart.hf.registry import register

Task = Literal["embedding", "causal-lm", "masked-lm", "logits"]
Pooling = Literal["mean", "cls", "max", "lasttoken"]

WEIGHT_FILES = ("*.safetensors", "*.bin")
_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
# √length scaling is undone by the normalisation that follows it.
_POOLINGS: dict[str, Pooling] = {
    "mean": "mean",
    "mean_tokens": "mean",
    "mean_sqrt_len_tokens": "mean",
    "cls": "cls",
    "cls_token": "cls",
    "max": "max",
    "max_tokens": "max",
    "lasttoken": "lasttoken",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedModel:
    """A model in evaluation mode and how its output is to be read."""

    model: nn.Module
    tokenizer: Any | None
    """The transformers tokenizer; None for models that do not read text."""
    task: Task
    """``embedding``: token vectors are pooled; ``logits``: any other output that is a distribution."""
    name: str
    """What the caller gave: a folder, a hub name, or the class of a model in memory."""
    path: Path | None = None
    """The folder, where there is one."""
    revision: str | None = None
    """Commit of the hub's repository."""
    pooling: Pooling = "mean"
    """How token vectors become one vector, for embedding models."""
    max_length: int | None = None
    """Longest input in tokens that model and tokenizer take; None where neither says."""

    @property
    def device(self) -> torch.device:
        """Where the inputs must lie: the device of the first parameter."""
        return first_parameter(self.model).device

    @property
    def dtype(self) -> torch.dtype:
        return first_parameter(self.model).dtype


def first_parameter(model: nn.Module) -> Tensor:
    """The first parameter of the model; raises InputError where it has none."""
    for parameter in model.parameters():
        return parameter
    raise InputError(f"{type(model).__name__} has no parameters. Pass a model with weights.")


def load_model(
    name_or_path: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    mapped: bool = False,
) -> LoadedModel:
    """A pretrained model from a folder or the hub.

    The class is the one that the checkpoint's config names, as it stands in transformers; code that comes
    with a checkpoint is never run. ``dtype`` None keeps the dtype of the checkpoint. A sentence-transformers
    folder (``modules.json``) is an embedding model whatever head its config names. ``mapped`` leaves the weights
    in their files (:mod:`eckart.hf.mapped`), for models larger than memory: a folder, on the CPU, as stored.

    Raises FileError where there is no such model, or where files are missing, cut short or need a login, and
    where weights would be left at random values. Raises InputError for a dtype or device that does not exist.
    """
    register()
    name = str(name_or_path)
    path = model_folder(name_or_path)
    weight_dtype = parse_dtype(dtype)
    target = _parse_device(device)
    source = name if path is None else str(path)
    if path is not None:
        check_folder(path)
    if mapped and (path is None or weight_dtype is not None or target not in (None, torch.device("cpu"))):
        raise InputError(
            f"weights are read from the files of a local folder, in the dtype that they are stored in, on the CPU; got "
            f"{name}, dtype {dtype}, device {device}. Download a hub model first: hf download NAME --local-dir DIR"
        )
    with _quiet(), _explained(name, path):
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        modules = _companion(source, "modules.json")
        cls = _model_class(config, name, embedding=modules is not None)
        if mapped:
            model = map_pretrained(cls, Path(source), config)
        else:
            model = _from_pretrained(cls, source, config, weight_dtype, name)
        tokenizer = _load_tokenizer(source, config)
    if target is not None:
        model.to(target)
    return LoadedModel(
        model=model.eval(),
        tokenizer=tokenizer,
        task="embedding" if modules is not None else task_of(type(model).__name__),
        name=name,
        path=path,
        revision=getattr(config, "_commit_hash", None),
        pooling="mean" if modules is None else _read_pooling(source, modules, name),
        max_length=_max_length(model, tokenizer, source),
    )


def wrap_model(
    model: nn.Module, tokenizer: Any | None = None, *, task: Task | None = None, pooling: Pooling = "mean"
) -> LoadedModel:
    """A model in memory, put into evaluation mode.

    ``task`` None reads it off the class name; modules that are not transformers models count as ``logits``.
    """
    model.eval()
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        task=task or (task_of(type(model).__name__) if hasattr(model, "config") else "logits"),
        name=type(model).__name__,
        pooling=pooling,
        max_length=_max_length(model, tokenizer, None),
    )


def task_of(class_name: str) -> Task:
    """What the outputs of a transformers class mean; a class without a head gives embeddings."""
    if class_name.endswith("ForMaskedLM"):
        return "masked-lm"
    if class_name.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal-lm"
    if "For" in class_name or class_name.endswith("HeadModel"):
        return "logits"
    return "embedding"


def model_folder(name_or_path: str | Path) -> Path | None:
    """The folder that is meant, or None for a hub name. Raises FileError for a path where nothing lies."""
    name = str(name_or_path)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise FileError(f"expected the folder of a model, got the file {name}. Give its folder.")
    parts = name.split("/")
    looks_like_path = name.startswith((".", "/", "~")) or "\\" in name or len(parts) > 2 or "" in parts
    if isinstance(name_or_path, Path) or looks_like_path:
        raise FileError(f"there is no folder {name}. Give a folder saved by save_pretrained, or a hub name.")
    return None


def check_folder(path: Path) -> None:
    """Raises FileError unless the folder holds a readable config.json and weights."""
    config = path / "config.json"
    if not config.is_file():
        adapter = (
            " It holds a PEFT adapter: merge it into its base model first."
            if (path / "adapter_config.json").exists()
            else ""
        )
        raise FileError(
            f"{path} is not the folder of a transformers model: it has no config.json.{adapter} "
            "Expected a folder written by save_pretrained or by eckart."
        )
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FileError(f"{config} is not valid JSON ({error}). Copy or download the file again.") from error
    if not isinstance(content, dict):
        raise FileError(f"{config} holds a {type(content).__name__}, expected a JSON object. Copy it again.")
    if not any(next(path.glob(pattern), None) for pattern in WEIGHT_FILES):
        raise FileError(f"{path} has a config.json but no weights (*.safetensors). Copy or download them.")


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A torch dtype out of its name; raises InputError for others than float64, 32, 16 and bfloat16."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise InputError(unknown("dtype", dtype, _DTYPES))
    return _DTYPES[dtype]


def _parse_device(device: str | torch.device | None) -> torch.device | None:
    if device is None:
        return None
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"unknown device {device!r}. Expected cpu, cuda, cuda:0, mps, ….") from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device!r} was asked for, but torch sees no CUDA device here. Use cpu.")
    return target


def _model_class(config: Any, name: str, *, embedding: bool) -> Any:
    """The class named by the config, or AutoModel where an embedding is wanted or nothing is named."""
    architectures = getattr(config, "architectures", None) or []
    if embedding or not architectures:
        return transformers.AutoModel
    architecture = architectures[0]
    cls = getattr(transformers, architecture, None)
    if not (inspect.isclass(cls) and issubclass(cls, transformers.PreTrainedModel)):
        raise FileError(
            f"{name} wants the class {architecture}, which transformers {transformers.__version__} does not "
            "have. Eckart never runs code out of a checkpoint: load the model yourself and pass the module."
        )
    return cls


def _from_pretrained(cls: Any, source: str, config: Any, dtype: torch.dtype | None, name: str) -> nn.Module:
    """from_pretrained that leaves no weight at random values."""
    keywords = {
        "config": config,
        "dtype": dtype or "auto",
        "trust_remote_code": False,
        "output_loading_info": True,
    }
    model, info = cls.from_pretrained(source, **keywords)
    missing = sorted(info["missing_keys"])
    if missing and all("pooler" in key for key in missing):
        # Without the option, transformers would put a pooler of random weights on the model.
        if "add_pooling_layer" not in inspect.signature(type(model).__init__).parameters:
            return _complete(model, info, name)
        model, info = type(model).from_pretrained(source, **keywords, add_pooling_layer=False)
    return _complete(model, info, name)


def _complete(model: nn.Module, info: dict[str, Any], name: str) -> nn.Module:
    lost = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if lost:
        shown = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
        raise FileError(
            f"{name} does not hold all weights of {type(model).__name__}: {shown} would be random. "
            "Expected a complete checkpoint of that class; check `architectures` in its config.json."
        )
    if info["error_msgs"]:
        raise FileError(f"{name} could not be loaded whole: {'; '.join(map(str, info['error_msgs']))}")
    return model


def _load_tokenizer(source: str, config: Any) -> Any | None:
    """The tokenizer, or None for a checkpoint that comes without one (vision models, bare weights)."""
    files = (
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
        "vocab.json",
        "tokenizer.model",
        "spiece.model",
    )
    if not any(_companion(source, file) for file in files):
        return None
    return transformers.AutoTokenizer.from_pretrained(source, config=config, trust_remote_code=False)


def _companion(source: str, file: str) -> Path | None:
    """A file that lies beside the weights, in the folder or on the hub; None where there is none."""
    found = cached_file(
        source,
        file,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FileError(f"{path} is not valid JSON ({error}). Copy or download the file again.") from error


def _read_pooling(source: str, modules: Path, name: str) -> Pooling:
    """How a sentence-transformers model pools, out of the folder that its modules.json names."""
    folders = [entry["path"] for entry in _read_json(modules) if str(entry.get("type", "")).endswith("Pooling")]
    if not folders:
        return "mean"
    file = _companion(source, f"{folders[0]}/config.json")
    if file is None:
        raise FileError(f"{name}: modules.json names {folders[0]}/config.json, which is missing. Copy it too.")
    config = _read_json(file)
    if "pooling_mode" in config:
        modes = [config["pooling_mode"]]
    else:
        modes = [
            key.removeprefix("pooling_mode_") for key, on in config.items() if "pooling_mode_" in key and on is True
        ]
    if len(modes) == 1 and modes[0] in _POOLINGS:
        return _POOLINGS[modes[0]]
    raise FileError(
        f"{name} pools by {' and '.join(map(str, modes)) or 'nothing'}; "
        f"Eckart knows {', '.join(sorted(_POOLINGS))}. Load the model yourself and wrap it with pooling=."
    )


def _max_length(model: nn.Module, tokenizer: Any | None, source: str | None) -> int | None:
    limits: list[int] = []
    config = getattr(model, "config", None)
    limits += [getattr(config, key) for key in ("max_position_embeddings", "n_positions") if hasattr(config, key)]
    if tokenizer is not None:
        limits.append(tokenizer.model_max_length)
    if source is not None and (file := _companion(source, "sentence_bert_config.json")) is not None:
        limits.append(_read_json(file).get("max_seq_length") or 0)
    # Tokenizers without a limit say 10^30; relative-position models say 0 or -1.
    limits = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 10**9]
    return min(limits, default=None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bar, which would mix with the caller's own."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextmanager
def _explained(name: str, path: Path | None) -> Iterator[None]:
    """Turns what transformers and safetensors raise for bad files into a FileError that says what to do."""
    try:
        yield
    except SafetensorError as error:
        raise FileError(
            f"the weights of {name} cannot be read: {error}. The file is cut short or not safetensors; "
            "copy or download it again."
        ) from error
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, (FileError, InputError)):
            raise
        chain = " ".join(f"{type(e).__name__}: {e}" for e in _causes(error))
        if path is not None:
            raise FileError(f"{name} could not be loaded as a transformers model: {error}") from error
        if "GatedRepo" in chain:
            hint = "It is gated: accept its terms on its hub page and log in with `hf auth login`."
        elif "LocalEntryNotFound" in chain or "OfflineMode" in chain or "ConnectionError" in chain:
            hint = (
                "The hub could not be reached and the model is not in the cache. Check the connection and "
                "HF_HUB_OFFLINE, or give a folder."
            )
        elif "RepositoryNotFound" in chain or "HFValidation" in chain:
            hint = "There is neither a folder nor a public hub model of that name; check the spelling."
        else:
            hint = str(error)
        raise FileError(f"the model {name!r} could not be loaded. {hint}") from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__
