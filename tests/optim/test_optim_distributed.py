"""Two processes take the steps that one takes, whatever the preset, and checkpoints of parts resume exactly."""

from __future__ import annotations

import json
from typing import Any

import pytest

from eckart.optim import Subspace
from two_processes import two_processes

PRESETS = sorted(cls.__name__ for cls in Subspace.__subclasses__())
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"rank": 0.25} for name in ("Apollo", "Dion", "Fira", "Frugal", "GaLore", "Trion")},
    "DCTAdamW": {"rank": 0.25, "feedback": "fp32"},
    "low bits": {"rule": "adam", "subspace": "power", "rank": 0.25, "feedback": "int8", "state_dtype": "int8"},
    "halves": {"rule": "momentum", "subspace": "svd", "rank": 2, "every": 2, "carry": "rotate", "state_dtype": "bf16"},
    "rows": {"rule": "adam", "subspace": "rows", "rank": 0.25, "every": 2, "feedback": "fp32"},
    "random": {"rule": "sign", "subspace": "randomized", "rank": 3, "every": 2, "carry": "rotate"},
    "guards": {"rule": "adam", "guards": ("clip", "radial", "growth", "rms")},
    "hybrid": {"rule": "hybrid", "subspace": "power", "rank": 3, "guards": ("radial",)},
    "other side": {"rule": "adam", "subspace": "power", "rank": 3, "side": "rows"},
}
CASES = sorted({*PRESETS, *OPTIONS})
ROUNDED = {"low bits": 0.1}
"""Blocks of 256 end where a part does, so that int8 rounds otherwise than in one process."""

SCRIPT = """
import json, sys, warnings
from pathlib import Path
import torch, torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
import eckart.optim
from eckart.errors import EckartWarning
from eckart.optim import Subspace

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 16)
        self.conv = nn.Conv1d(16, 65, 3, padding=1)       # 65 x 48 flattened
        self.fused = nn.Linear(65, 3 * 70, bias=False)    # split by rows
        self.turned = nn.Parameter(torch.randn(70, 16) / 8)  # stored (in, out)
        self.uneven = nn.Linear(16, 33)                   # 33 rows over two processes
        self.twin = nn.Linear(16, 33)
        self.stack = nn.Parameter(torch.randn(3, 40, 33) / 6)  # two matrices here, one there
        self.few = nn.Linear(40, 1)                       # no row on the second process
    def forward(self, x):
        h = torch.tanh(self.conv(self.table(x).mT).mT.mean(1))
        q, k, v = self.fused(h).chunk(3, -1)
        h = torch.tanh((q * torch.sigmoid(k) + v) @ self.turned)
        h = torch.tanh(self.uneven(h) + self.twin(h))
        return self.few(torch.tanh(torch.einsum("eij,bj->bi", self.stack, h)))[:, 0]

def groups(net, ranked=True):
    vectors = [p for n, p in net.named_parameters() if p.ndim < 2 or n.startswith("table")]
    taken = {id(p) for p in vectors} | {id(net.conv.weight), id(net.fused.weight), id(net.turned), id(net.few.weight)}
    return [
        {"params": [p for p in net.parameters() if id(p) not in taken]},
        {"params": [net.conv.weight], "view": "flatten"},
        {"params": [net.fused.weight], "split": (70, 70, 70)},
        {"params": [net.turned], "transposed": True},
        # One process would span the rows, which are fewer, but cut over two.
        {"params": [net.few.weight], "side": "columns", "rank": 1 if ranked else None},
        {"params": vectors, "matrix": False},
    ]

def optimizer_of(net, name):
    options = OPTIONS.get(name, {})
    cls = getattr(eckart.optim, name) if name[0].isupper() else Subspace
    return cls(groups(net, "rank" in options), lr=0.01, weight_decay=0.1, **options)

def net():
    torch.manual_seed(0)
    return Net()

def steps(run, optimizer, count, x, y):
    for _ in range(count):
        optimizer.zero_grad()
        (run(x) - y).square().mean().backward()
        optimizer.step()

def whole(p):
    return p.full_tensor() if hasattr(p, "full_tensor") else p

def off(one, two):
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    return max(float((whole(p) - whole(q)).abs().max()) for p, q in pairs)

def case(name, folder, rank):
    generator = torch.Generator().manual_seed(1)
    # More rows than any basis has directions: in the null space of a gradient rounding would pick them.
    x = torch.randint(0, 9, (128, 5), generator=generator)
    y = torch.randn(128, generator=generator)
    half = slice(64 * rank, 64 * rank + 64)
    one, start = net(), net()
    steps(one, optimizer_of(one, name), 4, x, y)
    found = {"moved": off(one, start)}

    parts = net()
    fully_shard(parts)
    optimizer = optimizer_of(parts, name)
    steps(parts, optimizer, 2, x[half], y[half])
    model_state, state = get_state_dict(parts, optimizer)
    dcp.save({"model": model_state, "optimizer": state}, checkpoint_id=str(folder))
    steps(parts, optimizer, 2, x[half], y[half])
    found["parts"] = off(one, parts)

    again = net()
    fully_shard(again)
    resumed = optimizer_of(again, name)
    model_state, state = get_state_dict(again, resumed)
    loaded = {"model": model_state, "optimizer": state}
    dcp.load(loaded, checkpoint_id=str(folder))
    set_state_dict(again, resumed, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    steps(again, resumed, 2, x[half], y[half])
    found["resumed"] = off(parts, again)
    found["report"] = [layer.top for layer in resumed.report().layers]

    if name in COPIED:
        copies = net()
        run = DistributedDataParallel(copies)
        steps(run, optimizer_of(copies, name), 4, x[half], y[half])
        found["copies"] = off(one, copies)
    return found

def nonfinite(rank):
    parts = net()
    fully_shard(parts)
    optimizer = Subspace(groups(parts), lr=0.01, nonfinite="skip")
    x, y = torch.zeros(4, 5, dtype=torch.long), torch.zeros(4)
    (parts(x) - y).square().mean().backward()
    if rank == 0:
        parts.uneven.weight.grad.to_local()[0, 0] = float("nan")
    before = whole(parts.twin.weight).clone()
    optimizer.step()
    return {"skipped": optimizer.skipped, "off": float((whole(parts.twin.weight) - before).abs().max())}

OPTIONS, COPIED = json.loads(sys.argv[3]), sys.argv[4].split(",")
dist.init_process_group("gloo")
rank, results = dist.get_rank(), {}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for name in sys.argv[2].split(","):
        results[name] = case(name, Path(sys.argv[1], name.replace(" ", "-")), rank)
    results["nonfinite"] = nonfinite(rank)
results["warnings"] = [str(w.message) for w in caught if issubclass(w.category, EckartWarning)]
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(results))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found, case by case."""
    folder = tmp_path_factory.mktemp("optimizers")
    two_processes(SCRIPT, folder, folder, ",".join(CASES), json.dumps(OPTIONS), "DCTAdamW,Muon")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_take_the_steps_of_one(ran: list[dict[str, Any]], name: str) -> None:
    for found in (rank[name] for rank in ran):
        assert found["moved"] > 1e-3
        assert found["parts"] <= ROUNDED.get(name, 1e-7) * found["moved"]
        assert found.get("copies", 0.0) <= 1e-9 * found["moved"]
        assert found["report"] == ran[0][name]["report"]


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_of_parts_resumes_exactly(ran: list[dict[str, Any]], name: str) -> None:
    assert [rank[name]["resumed"] for rank in ran] == [0.0, 0.0]


def test_what_cannot_be_done_in_parts_warns_once(ran: list[dict[str, Any]]) -> None:
    for found in ran:
        assert len(found["warnings"]) == 1
        assert "gathered whole on every process" in found["warnings"][0]


def test_a_nan_on_one_process_skips_the_step_on_all(ran: list[dict[str, Any]]) -> None:
    assert [rank["nonfinite"] for rank in ran] == [{"skipped": 1, "off": 0.0}] * 2
