"""Folders that load without Eckart: with code of their own beside the weights, or dense."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import transformers

from eckart.checkpoint import atomic_folder
from eckart.errors import InputError, problems
from eckart.hf.exported import copy_rest, finish, require_eckart
from eckart.hf.quantizer import densify
from eckart.hf.registry import load_pretrained, prepare_for_saving

MODULE = "modeling_factored"
"""Name of the Python file that is written beside the weights."""
_KINDS = ("linear", "conv1d", "conv", "embedding")

_CLASSES = """

class FactoredConfig({config}):
    model_type = "{model_type}"

    def __init__(self, factored_layers=None, **kwargs):
        super().__init__(**kwargs)
        self.factored_layers = factored_layers or {{}}

"""
_CLASS = """
class Factored{name}(WithFactoredLayers, {name}):
    config_class = FactoredConfig

"""


def export_dense(directory: str | Path, output: str | Path, *, overwrite: bool = False) -> Path:
    """Write the model in ``directory`` with dense weights, for programs that know no factored layers.

    It keeps the quality of the compressed model (outputs equal to rounding), and saves nothing: size and speed
    are those of the original. Raises FileError for a folder that is not whole and for an output in the way.
    """
    state = require_eckart(directory)
    with atomic_folder(output, overwrite=overwrite) as folder:
        model = load_pretrained(directory, dtype="auto")
        densify(model)
        prepare_for_saving(model)
        copy_rest(Path(directory), folder, skip=set(state.weight_files))
        model.save_pretrained(folder)  # type: ignore[operator]
        finish(Path(directory), folder, "dense", "plain transformers. It is as large and as slow as the original")
    return Path(output)


def export_remote_code(directory: str | Path, output: str | Path, *, overwrite: bool = False) -> Path:
    """Write the model in ``directory`` with a small Python file that knows its layers, so that it loads with
    ``trust_remote_code=True`` where Eckart is not installed. The numbers are the very same.

    Raises InputError for layers that the file does not know (fused experts, quantised layers, tables shared with a
    head), FileError as :func:`export_dense`.
    """
    state = require_eckart(directory)
    source = Path(directory)
    config = transformers.AutoConfig.from_pretrained(source)
    strange = [
        f"{name} is of kind {entry.get('kind')!r}"
        for name, entry in state.modules.items()
        if entry.get("kind") not in _KINDS
    ]
    if config.quantization_config.get("inner"):
        strange.append("torchao has quantised layers of it")
    classes = _auto_classes(config, state.architecture)
    if not classes:
        strange.append(f"no Auto class of transformers loads {state.architecture or 'a model without architectures'}")
    if strange:
        raise InputError(problems("this model has no export to remote code; use dense", strange))
    written = json.loads((source / "config.json").read_text(encoding="utf-8"))
    del written["quantization_config"]
    written["model_type"] = f"factored_{config.model_type}"
    written["architectures"] = [f"Factored{state.architecture}"]
    written["factored_layers"] = state.modules
    written["auto_map"] = {"AutoConfig": f"{MODULE}.FactoredConfig"} | {
        auto: f"{MODULE}.Factored{name}" for auto, name in classes.items()
    }
    with atomic_folder(output, overwrite=overwrite) as folder:
        copy_rest(source, folder, skip=set(state.weight_files))
        # transformers renames some weights by model_type (ViT), and this folder gets a model_type of its own
        load_pretrained(source, dtype="auto").save_pretrained(folder, save_original_format=False)  # type: ignore[operator]
        (folder / f"{MODULE}.py").write_text(
            _code(type(config).__name__, written["model_type"], sorted(set(classes.values()))), encoding="utf-8"
        )
        (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        finish(source, folder, "remote-code", "transformers with `trust_remote_code=True`, without Eckart")
    return Path(output)


def _auto_classes(config: Any, architecture: str) -> dict[str, str]:
    """Auto class name to the name of the class that it should build: the model itself and its bare model."""
    found = {}
    for auto in dir(transformers):
        mapping = getattr(getattr(transformers, auto, None), "_model_mapping", None) if "AutoModel" in auto else None
        cls = None if mapping is None else mapping.get(type(config), None)
        for candidate in cls if isinstance(cls, (tuple, list)) else (cls,):
            name = getattr(candidate, "__name__", "")
            if name and (name == architecture or auto == "AutoModel"):
                found[auto] = name
    return found if architecture in found.values() else {}


def _code(config: str, model_type: str, names: list[str]) -> str:
    layers = resources.files("eckart.hf").joinpath("standalone.py").read_text(encoding="utf-8")
    imports = f"from torch import nn\nfrom transformers import {', '.join([config, *names])}\n"
    head = layers.replace("from torch import nn\n", imports, 1).replace("# mypy: ignore-errors\n", "")
    body = _CLASSES.format(config=config, model_type=model_type)
    return head + body + "".join(_CLASS.format(name=name) for name in names)
