"""A folder's state, for whole folders and for every way of being broken."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from eckart.checkpoint import MANIFEST, Manifest, inspect_folder, read_header
from eckart.checkpoint.folder import climbs_out
from eckart.errors import FileError

ENTRY = {"kind": "linear", "form": "lowrank", "rank": 2, "bias": False}


def tensors():
    return {
        "x.a.weight": torch.zeros(2, 5),
        "x.b.weight": torch.zeros(4, 2),
        "x.weight": torch.zeros(0),
        "y.weight": torch.ones(3, 3, dtype=torch.bfloat16),
    }


@pytest.fixture
def folder(tmp_path):
    config = {
        "architectures": ["ToyModel"],
        "quantization_config": {"quant_method": "eckart", "format_version": 1, "modules": {"x": ENTRY}},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    Manifest(base="toy", fingerprint="f", modules={"x": ENTRY}, version="0.1.0").write(tmp_path)
    return tmp_path


@pytest.fixture
def sharded(folder):
    (folder / "model.safetensors").unlink()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    parts = [dict(list(tensors().items())[:2]), dict(list(tensors().items())[2:])]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name)
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    Manifest(base="toy", fingerprint="f").write(folder)
    return folder


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_a_whole_folder(folder):
    state = inspect_folder(folder)
    assert state.whole, state.problems
    assert state.kind == "eckart"
    assert "import eckart" in state.loads
    assert state.architecture == "ToyModel"
    assert (state.tensors, state.parameters) == (4, 10 + 8 + 9)
    assert state.modules == {"x": ENTRY}
    assert state.manifest.base == "toy"
    assert state.bytes == (folder / "model.safetensors").stat().st_size
    assert state.require_whole() is state
    assert json.loads(json.dumps(state.to_json()))["whole"] is True


def test_a_whole_sharded_folder(sharded):
    state = inspect_folder(sharded)
    assert state.whole, state.problems
    assert len(state.weight_files) == 2


def test_plain_and_remote_code_folders(folder):
    edit_json(folder / "config.json", lambda c: c.pop("quantization_config"))
    assert inspect_folder(folder).loads == "plain transformers"
    edit_json(folder / "config.json", lambda c: c.update(auto_map={"AutoModel": "modeling_toy.Toy"}))
    state = inspect_folder(folder)
    assert state.kind == "remote-code"
    assert "trust_remote_code" in state.loads
    assert any("modeling_toy.py is missing" in p for p in state.problems)


def cut(path, count=1):
    path.write_bytes(path.read_bytes()[:-count])


def header_of(path, change):
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


W = "model.safetensors"
BREAKS = {
    "cut by a byte": (lambda f: cut(f / W), "cut short"),
    "cut in the header": (lambda f: (f / W).write_bytes((f / W).read_bytes()[:40]), "does not fit"),
    "empty": (lambda f: (f / W).write_bytes(b""), "cut short"),
    "something behind": (lambda f: (f / W).write_bytes((f / W).read_bytes() + b"x"), "longer"),
    "no header": (lambda f: (f / W).write_bytes(b"\x05\0\0\0\0\0\0\0hello"), "no valid safetensors header"),
    "absurd header length": (lambda f: (f / W).write_bytes(b"\xff" * 100), "does not fit"),
    "header is a list": (lambda f: (f / W).write_bytes(b"\x02\0\0\0\0\0\0\0[]"), "no JSON object"),
    "wrong shape": (lambda f: header_of(f / W, lambda h: h["y.weight"].update(shape=[4, 3])), "wrong header"),
    "negative shape": (lambda f: header_of(f / W, lambda h: h["y.weight"].update(shape=[-3, -3])), "wrong header"),
    "unknown dtype": (lambda f: header_of(f / W, lambda h: h["y.weight"].update(dtype="F7")), "wrong header"),
    "overlap": (lambda f: header_of(f / W, lambda h: h.update(z=h["y.weight"])), "overlap"),
    "entry is a number": (lambda f: header_of(f / W, lambda h: h.update({"y.weight": 3})), "wrong header"),
    "no weights": (lambda f: (f / W).unlink(), "there are no weights"),
    "pickled": (lambda f: (f / W).rename(f / "pytorch_model.bin"), "pickled"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config cut": (lambda f: cut(f / "config.json", 9), "not valid JSON"),
    "config list": (lambda f: (f / "config.json").write_text("[]"), "JSON object"),
    "factor missing": (lambda f: header_of(f / W, lambda h: h.update(q=h.pop("x.a.weight"))), "x.a and b"),
    "another rank": (
        lambda f: edit_json(f / "config.json", lambda c: c["quantization_config"]["modules"]["x"].update(rank=3)),
        "another rank",
    ),
    "damaged entry": (
        lambda f: edit_json(f / "config.json", lambda c: c["quantization_config"]["modules"]["x"].pop("rank")),
        "entry of x is damaged",
    ),
    "modules a list": (
        lambda f: edit_json(f / "config.json", lambda c: c["quantization_config"].update(modules=[])),
        "should map",
    ),
    "no guard": (
        lambda f: save_file({k: v for k, v in tensors().items() if v.numel()}, f / W),
        "random weights",
    ),
    "manifest cut": (lambda f: cut(f / MANIFEST, 9), "not valid JSON"),
    "manifest later": (lambda f: edit_json(f / MANIFEST, lambda m: m.update(format_version=9)), "later Eckart"),
    "manifest climbs": (
        lambda f: edit_json(f / MANIFEST, lambda m: m["files"].update({"../x": 1})),
        "leads out of the folder",
    ),
    "file lost": (lambda f: edit_json(f / MANIFEST, lambda m: m["files"].update({"lost": 1})), "lost is missing"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_is_broken_is_said(folder, name):
    damage, message = BREAKS[name]
    damage(folder)
    state = inspect_folder(folder)
    assert not state.whole
    assert any(message in problem for problem in state.problems), state.problems
    json.dumps(state.to_json())
    with pytest.raises(FileError, match="not whole"):
        state.require_whole()


INDEX = "model.safetensors.index.json"
SHARDS = {
    "missing shard": (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "is missing"),
    "climbs": (
        lambda f: edit_json(f / INDEX, lambda i: i["weight_map"].update(z="../../etc/passwd")),
        "leads out of the folder",
    ),
    "absolute": (lambda f: edit_json(f / INDEX, lambda i: i["weight_map"].update(z="/etc/passwd")), "leads out"),
    "not in file": (
        lambda f: edit_json(f / INDEX, lambda i: i["weight_map"].update(z="model-00001-of-00002.safetensors")),
        "in the index but not in its file: z",
    ),
    "not in index": (
        lambda f: edit_json(f / INDEX, lambda i: i["weight_map"].pop("y.weight")),
        "in a file but not in the index: y.weight",
    ),
    "twice": (
        lambda f: save_file(tensors(), f / "model-00001-of-00002.safetensors"),
        "is in both",
    ),
    "no map": (lambda f: (f / INDEX).write_text("{}"), "no valid weight_map"),
    "index cut": (lambda f: cut(f / INDEX, 5), "not valid JSON"),
}


@pytest.mark.parametrize("name", SHARDS)
def test_what_is_broken_in_shards_is_said(sharded, name):
    damage, message = SHARDS[name]
    damage(sharded)
    state = inspect_folder(sharded)
    assert any(message in problem for problem in state.problems), state.problems


def test_no_folder_at_all(tmp_path):
    with pytest.raises(FileError, match="does not exist"):
        inspect_folder(tmp_path / "x")
    (tmp_path / "f").write_text("")
    with pytest.raises(FileError, match="is a file"):
        inspect_folder(tmp_path / "f")


def test_header_reads_what_was_saved(folder):
    header = read_header(folder / W)
    assert {k: v.shape for k, v in header.items()} == {k: tuple(v.shape) for k, v in tensors().items()}
    assert header["y.weight"].dtype == "BF16"
    assert header["y.weight"].bytes == 18


def test_manifest_there_and_back_and_its_future(folder):
    manifest = Manifest.read(folder)
    assert manifest.files["config.json"] == (folder / "config.json").stat().st_size
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert Manifest.from_json({**manifest.to_json(), "later": 1}) == manifest
    for change, message in (
        ({"requires": ["residual"]}, "requires residual"),
        ({"requires": "x"}, "requires"),
        ({"format_version": 2}, "format version 2"),
        ({"format_version": "1"}, "no valid format_version"),
        ({"base": 3, "plan": []}, "2 problems"),
    ):
        with pytest.raises(FileError, match=message):
            Manifest.from_json({**manifest.to_json(), **change})
    with pytest.raises(FileError, match="JSON object"):
        Manifest.from_json([])


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "C:\\x", "..\\x", "", "a\0b", "\\\\host\\x"])
def test_names_that_climb_out(name):
    assert climbs_out(name)


@pytest.mark.parametrize("name", ["x", "a/x.txt", "model-00001-of-00002.safetensors", "a..b"])
def test_names_that_do_not(name):
    assert not climbs_out(name)
