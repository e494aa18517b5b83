"""What every exported folder needs: a whole source, the files beside the weights, a README, a manifest."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from eckart.checkpoint import MANIFEST, FolderState, Manifest, inspect_folder
from eckart.errors import InputError


def require_eckart(directory: str | Path) -> FolderState:
    """The state of a whole folder that ``eckart.save`` wrote; InputError for other folders, FileError for broken."""
    state = inspect_folder(directory).require_whole()
    if state.kind == "dense":
        raise InputError(
            f"{directory} is a plain folder, which loads in transformers as it is; there is nothing to export."
        )
    if state.kind != "eckart":
        raise InputError(f"expected a folder that eckart.save wrote; {directory} is for {state.loads}.")
    return state


def _files(source: Path) -> Iterator[Path]:
    return (p for p in source.rglob("*") if p.is_file() and not p.relative_to(source).parts[0].startswith("."))


def copy_rest(source: Path, folder: Path, skip: set[str]) -> None:
    """Copy tokenizer and other files, without what speaks of the folder that they come from."""
    left = skip | {MANIFEST, "README.md", "report.html", "model.safetensors.index.json"}
    for path in _files(source):
        name = path.relative_to(source).as_posix()
        if name not in left:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)


def finish(source: Path, folder: Path, target: str, loads: str) -> None:
    """A short README and, where the source has one, its manifest with the new sizes."""
    text = f"# {source.resolve().name}, exported to {target}\n\nLoads in {loads}.\n"
    if (source / MANIFEST).is_file():
        manifest = Manifest.read(source)
        text += f"\nCompressed from `{manifest.base}` with Eckart; `{MANIFEST}` says how.\n"
        (folder / "README.md").write_text(text, encoding="utf-8")
        manifest.write(folder)
    else:
        (folder / "README.md").write_text(text, encoding="utf-8")
