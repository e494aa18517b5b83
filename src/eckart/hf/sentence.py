"""The files by which sentence-transformers knows how token vectors become one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from eckart.errors import FileError
from eckart.hf.models import model_folder

FILES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")


def copy_sentence_files(base: str, folder: Path) -> tuple[str, ...]:
    """Copy pooling and module lists of a sentence-transformers folder; returns what was copied.

    Paths in ``modules.json`` stay inside the folder; FileError where they do not. Other models have no such files.
    """
    source = model_folder(base) if base else None
    if source is None or not (source / "modules.json").is_file():
        return ()
    copied = []
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
            copied.append(name)
    modules = json.loads((source / "modules.json").read_text(encoding="utf-8"))
    for module in modules:
        part = str(module.get("path", ""))
        config = source / part / "config.json"
        if not part or not config.is_file():
            continue
        if not config.resolve().is_relative_to(source.resolve()):
            raise FileError(f"modules.json names {part!r}, which lies outside of {source}.")
        (folder / part).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(config, folder / part / "config.json")
        copied.append(f"{part}/config.json")
    return tuple(copied)
