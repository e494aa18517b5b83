"""Sums that add up, and the file that they are kept in."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from eckart.errors import FileError, InputError, MismatchError
from eckart.moments import Moments, collect
from eckart.records import Site

pytestmark = pytest.mark.filterwarnings("ignore::eckart.errors.EckartWarning")

SITES = (
    Site(name="words", kind="embedding", out_features=5, in_features=9),
    Site(name="up", kind="linear", out_features=6, in_features=5),
    Site(name="gate", kind="linear", out_features=6, in_features=5),
    Site(name="down", kind="linear", out_features=5, in_features=6),
    Site(name="idle", kind="linear", out_features=2, in_features=2),
)
PARTS = ("mean", "second", "gradient", "fisher_rows", "fisher_columns")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 5)
        self.up, self.gate, self.down = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 5)
        self.idle = nn.Linear(2, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        return self.down(self.up(x) * torch.sigmoid(self.gate(x)))


def loss(outputs: Tensor, batch: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
    return (outputs * outputs.detach().roll(1, -1)).sum() + outputs.square().sum(), float(batch.shape[0])


def batch(seed: int, rows: int = 4) -> Tensor:
    return torch.randint(0, 9, (rows, 7), generator=torch.Generator().manual_seed(seed))


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Small().double()


def moments_of(*seeds: int, model: nn.Module | None = None, **options: object) -> Moments:
    options = {"loss": loss, "fingerprint": "f" * 64, "meta": {"data": f"data {seeds}"}, **options}
    return collect(model or small(), [batch(seed) for seed in seeds], SITES, **options)


def assert_same(a: Moments, b: Moments, **tolerance: float) -> None:
    assert a.names() == b.names()
    assert a.fingerprint == b.fingerprint
    assert a.input_of == b.input_of
    assert (a.tokens, a.units, a.meta["batches"]) == (b.tokens, b.units, b.meta["batches"])
    for name in a.names():
        for half in (None, "A", "B"):
            one, two = a.site(name, half=half), b.site(name, half=half)
            assert one.count == two.count
            assert one.tokens_per_unit == two.tokens_per_unit
            for part in PARTS:
                left, right = getattr(one, part), getattr(two, part)
                assert (left is None) == (right is None)
                if left is not None:
                    torch.testing.assert_close(left, right, **tolerance)


def test_merging_two_parts_is_collecting_both() -> None:
    merged = moments_of(1, 2).merge(moments_of(3))
    assert_same(merged, moments_of(1, 2, 3), rtol=1e-13, atol=1e-13)
    assert merged.meta["data"] == "data (1, 2) + data (3,)"
    assert merged.meta["tokens"] == 84


def test_merging_leaves_its_parts_alone() -> None:
    a, b = moments_of(1), moments_of(2)
    a.merge(b)
    assert_same(a, moments_of(1), rtol=0, atol=0)
    assert_same(b, moments_of(2), rtol=0, atol=0)


class Chosen(nn.Module):
    """Each batch reaches one of two maps."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x[0, 0] > 0 else self.b(x)


def test_merging_takes_sites_that_one_part_did_not_reach() -> None:
    sites = [Site(name=name, kind="linear", out_features=3, in_features=3) for name in "ab"]
    model = Chosen().double()
    up = torch.ones(4, 3, dtype=torch.float64)

    def collected(*batches: Tensor) -> Moments:
        return collect(model, batches, sites, gradients="none", fingerprint="f")

    merged = collected(up).merge(collected(-up))
    whole = collected(up, -up)
    assert merged.meta["unreached"] == []
    for name in "ab":
        torch.testing.assert_close(merged.site(name).mean, whole.site(name).mean)
        assert merged.site(name).count == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "other"}, "two different models"),
        ({"loss": None, "gradients": "none"}, "gradients 'full' and 'none'"),
        ({"gradients": "scale"}, "gradients 'full' and 'scale'"),
        ({"fisher": False}, "fisher True and False"),
    ],
)
def test_what_does_not_add_up(change: dict[str, object], message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        moments_of(1).merge(moments_of(2, **change))


def test_other_selections_do_not_add_up() -> None:
    fewer = collect(small(), [batch(1)], SITES[:2], loss=loss, fingerprint="f" * 64)
    with pytest.raises(MismatchError, match="selections"):
        moments_of(1).merge(fewer)


def test_moments_belong_to_a_model() -> None:
    moments = moments_of(1)
    moments.check("f" * 64)
    with pytest.raises(MismatchError, match="Calibrate again"):
        moments.check("e" * 64)
    real = collect(small(), [batch(1)], SITES, loss=loss)
    with pytest.raises(MismatchError):
        real.check(collect(small(1), [batch(1)], SITES, loss=loss).fingerprint)
    real.check(collect(small(), [batch(2)], SITES, gradients="none").fingerprint)


def test_halves_slices_and_names_are_checked() -> None:
    moments = moments_of(1)
    with pytest.raises(InputError, match="slices 0 … 0"):
        moments.site("up", slice=1)
    with pytest.raises(InputError, match="'A', 'B' or None"):
        moments.site("up", half="C")
    single = collect(small(), [batch(1, rows=1)], SITES, gradients="none")
    with pytest.raises(InputError, match="half B of the calibration holds no token"):
        single.site("up", half="B")


@pytest.mark.parametrize("gradients", ["full", "scale", "none"])
def test_a_file_holds_everything(tmp_path: Path, gradients: str) -> None:
    moments = moments_of(1, 2, loss=None if gradients == "none" else loss, gradients=gradients)
    moments.save(tmp_path / "m.safetensors")
    loaded = Moments.load(tmp_path / "m.safetensors")
    assert_same(moments, loaded, rtol=0, atol=0)
    assert loaded.meta == json.loads(json.dumps(moments.meta))
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]
    assert_same(loaded.merge(moments), moments.merge(moments), rtol=0, atol=0)


def test_float32_halves_the_file(tmp_path: Path) -> None:
    moments = moments_of(1, 2)
    moments.save(tmp_path / "double")
    moments.save(tmp_path / "single", dtype=torch.float32)
    assert_same(moments, Moments.load(tmp_path / "single"), rtol=1e-6, atol=1e-6)
    with safe_open(tmp_path / "double", "pt") as double, safe_open(tmp_path / "single", "pt") as single:
        sizes = [
            sum(f.get_tensor(k).nbytes for k in f.keys() if not k.endswith("count"))  # noqa: SIM118
            for f in (double, single)
        ]
        assert sizes[0] == 2 * sizes[1]
        assert double.get_tensor("input/up/second").shape == (2, 1, 15)
    with pytest.raises(InputError, match="float64 or float32"):
        moments.save(tmp_path / "half", dtype=torch.float16)


def test_saving_replaces_an_old_file_only_when_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m"
    moments_of(1).save(path)
    before = path.read_bytes()

    def full_disk(tensors: object, target: Path, metadata: object) -> None:
        Path(target).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("eckart.moments.files.save_file", full_disk)
    with pytest.raises(FileError, match="No space left"):
        moments_of(1, 2).save(path)
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]

    def interrupted(tensors: object, target: Path, metadata: object) -> None:
        Path(target).write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr("eckart.moments.files.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        moments_of(1, 2).save(path)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="could not be written"):
        moments_of(1).save(tmp_path / "missing" / "m")
    with pytest.raises(FileError, match="could not be written"):
        moments_of(1).save(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_a_file_cut_short(tmp_path: Path, share: float) -> None:
    path = tmp_path / "m"
    moments_of(1).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(FileError, match="cut short"):
        Moments.load(path)


def test_files_of_other_kinds(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="there is no moments file"):
        Moments.load(tmp_path / "nothing")
    with pytest.raises(FileError, match="there is no moments file"):
        Moments.load(tmp_path)
    (tmp_path / "text").write_text("not a moments file, but long enough to hold a header length")
    with pytest.raises(FileError, match="no safetensors file"):
        Moments.load(tmp_path / "text")
    save_file({"weight": torch.zeros(3)}, tmp_path / "weights")
    with pytest.raises(FileError, match="holds no moments"):
        Moments.load(tmp_path / "weights")


def rewrite(path: Path, change: object) -> None:
    """Change tensors and header of a file, as a damaged or foreign writer would."""
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()["eckart"])
    header = change(tensors, header) or header
    save_file(tensors, path, metadata={"eckart": header if isinstance(header, str) else json.dumps(header)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, h: h.update(format_version=2), "format version 2; this Eckart reads 1"),
        (lambda t, h: h.pop("format_version") and None, "format version None"),
        (lambda t, h: "{", "not JSON"),
        (lambda t, h: "[]", "format version None"),
        (lambda t, h: h.pop("fingerprint") and None, "fingerprint"),
        (lambda t, h: h.update(input_of=[]), "input_of"),
        (lambda t, h: h["input_of"].update(up="elsewhere"), "input/elsewhere/count"),
        (lambda t, h: h["meta"].pop("units") and None, "units"),
        (lambda t, h: h["shapes"].update({"input/up/total": [2, 1, "5"]}), "input/up/total"),
        (lambda t, h: h["shapes"].update({"input/up/second": [2, 1, 5, 6]}), "input/up/second"),
        (lambda t, h: t.pop("gradient/up/rows") is None or None, "disagree on 'gradient/up/rows'"),
        (lambda t, h: t.update(extra=torch.zeros(1)), "disagree on 'extra'"),
        (lambda t, h: t.update({"input/up/total": torch.zeros(2, 1, 4)}), r"shape \[2, 1, 4\], expected \[2, 1, 5\]"),
        (lambda t, h: t.update({"input/up/second": torch.zeros(2, 1, 14)}), r"shape \[2, 1, 14\]"),
    ],
)
def test_damaged_files(tmp_path: Path, change: object, message: str) -> None:
    path = tmp_path / "m"
    moments_of(1).save(path)
    rewrite(path, change)
    with pytest.raises(FileError, match=message):
        Moments.load(path)


@pytest.mark.skipif(os.name != "posix", reason="permissions are those of POSIX")
def test_the_file_has_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    moments_of(1).save(tmp_path / "m")
    assert (tmp_path / "m").stat().st_mode == (tmp_path / "plain").stat().st_mode
