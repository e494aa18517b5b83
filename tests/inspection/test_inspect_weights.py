"""A whole model: every tensor listed, streamed, cached, compared, and what stands out said in order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import eckart.inspection.run
from eckart.errors import FileError, InputError, MismatchError
from eckart.inspection import Inspection, MatrixFacts, Severity, inspect_weights
from eckart.inspection.names import kind_of, partners, places
from eckart.records import as_plain


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def block(seed: int) -> dict[str, Tensor]:
    return {
        "attn.q.weight": randn(24, 24, seed=seed),
        "mlp.up.weight": randn(48, 24, seed=seed + 100) + randn(48, 4, seed=seed + 1) @ randn(4, 24, seed=seed + 2),
        "norm.weight": torch.ones(24),
    }


def model(blocks: int = 3) -> dict[str, Tensor]:
    tensors = {"embed_tokens.weight": randn(100, 24, seed=50)}
    for i in range(blocks):
        tensors |= {f"layers.{i}.{name}": tensor for name, tensor in block(i).items()}
    return tensors | {"head.weight": randn(30, 24, seed=60)}


def by_name(found: Inspection) -> dict[str, MatrixFacts]:
    return {facts.name: facts for facts in found.matrices}


def claims(found: Inspection) -> str:
    return "\n".join(observation.claim for observation in found.observations)


def test_nothing_is_left_out_and_everything_has_its_place(tmp_path: Path) -> None:
    tensors = model() | {
        "ids": torch.arange(6).reshape(2, 3),
        "codes.qweight": torch.ones(4, 4, dtype=torch.int32),
        "half.weight": randn(8, 8).to(torch.float8_e4m3fn),
        "empty.weight": torch.empty(0, 4),
        "scalar": torch.tensor(1.0),
    }
    save_file(tensors, tmp_path / "weights.safetensors")
    found = inspect_weights(tmp_path / "weights.safetensors")
    facts = by_name(found)
    assert set(facts) == set(tensors)
    for name, reason in {
        "ids": "indices",
        "codes.qweight": "quantised",
        "half.weight": "quantised",
        "empty.weight": "empty",
        "scalar": "0-D",
        "layers.1.norm.weight": "1-D",
    }.items():
        assert reason in facts[name].skipped
        assert not facts[name].findings
    up = facts["layers.1.mlp.up.weight"]
    assert (up.role, up.depth, up.out_features, up.in_features) == ("mlp.up", 1, 48, 24)
    assert up.parameters == 48 * 24
    assert up.bytes == 4 * 48 * 24
    table = facts["embed_tokens.weight"]
    assert (table.out_features, table.in_features, table.depth) == (24, 100, None)
    assert next(f.name for f in found.matrices) == "embed_tokens.weight"
    assert "`codes.qweight`" in claims(found) or "more were not measured" in claims(found)
    json.dumps(as_plain(found), allow_nan=False)


def test_figures_are_those_of_the_weights() -> None:
    tensors = model(1)
    for name, facts in by_name(inspect_weights(tensors)).items():
        if facts.skipped:
            continue
        values = torch.linalg.svdvals(tensors[name].double())
        assert facts.findings["spectral_norm"].value == pytest.approx(float(values[0]))
        assert facts.singular_values == pytest.approx(values.tolist(), rel=1e-5)
        assert facts.places == tuple(range(24))
        assert len(facts.noise) == 24
        assert facts.energy[-1] == pytest.approx(1)
        assert facts.verdict in {"fits noise", "spikes above noise", "heavy tail", "no noise"}
        assert {"spikes", "alpha_farms", "distance_from_noise", "alpha_ks", "dead_rows"} <= set(facts.findings)


def test_quick_takes_no_spectra() -> None:
    quick = by_name(inspect_weights(model(), tier="quick"))["layers.0.attn.q.weight"]
    assert {"frobenius", "spectral_norm", "stable_rank", "alpha_farms"} <= set(quick.findings)
    assert not quick.singular_values
    assert "rank_95" not in quick.findings


def test_a_long_spectrum_is_kept_at_200_places() -> None:
    facts = inspect_weights({"w": randn(300, 320)}).matrices[0]
    assert len(facts.places) == len(facts.singular_values) == len(facts.noise) == len(facts.energy)
    assert 100 < len(facts.places) <= 200
    assert (facts.places[0], facts.places[-1]) == (0, 299)
    assert list(facts.places) == sorted(set(facts.places))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.conv = nn.Conv2d(12, 12, 3, groups=2)
        self.head = nn.Linear(12, 20, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.ones(3, 3, dtype=torch.bool))
        self.later = nn.LazyLinear(4)


def test_modules_with_ties_kernels_buffers_and_lazy_weights() -> None:
    found = inspect_weights(Tied())
    facts = by_name(found)
    assert "the same tensor as embed.weight" in facts["head.weight"].skipped
    assert facts["head.weight"].parameters == 0
    assert (facts["conv.weight"].slices, facts["conv.weight"].out_features) == (2, 6)
    assert len(facts["conv.weight"].findings["stable_rank"].details["slices"]) == 2
    assert "indices or a mask" in facts["mask"].skipped
    assert "no shape yet" in facts["later.weight"].skipped
    assert (facts["embed.weight"].out_features, facts["embed.weight"].in_features) == (12, 20)


def test_meta_sparse_and_nan_weights_say_so() -> None:
    broken = randn(10, 12)
    broken[3, 4] = float("nan")
    found = inspect_weights({"a": torch.empty(4, 4, device="meta"), "b": torch.eye(4).to_sparse(), "c": broken})
    facts = by_name(found)
    assert "meta" in facts["a"].skipped
    assert "sparse" in facts["b"].skipped
    assert facts["c"].findings["not_finite"].value == 1
    first = found.observations[0]
    assert (first.severity, first.matrices) == ("broken", ("c",))
    assert "1 of 120" in first.number


def test_findings_are_ordered_and_name_what_is_wrong() -> None:
    tensors = model()
    tensors["layers.0.attn.q.weight"][2] = 0
    tensors["layers.1.mlp.up.weight"][5] = tensors["layers.1.mlp.up.weight"][3]
    tensors["layers.2.attn.q.weight"] = torch.zeros(24, 24)
    tensors["head.weight"] = randn(30, 2) @ randn(2, 24, seed=1)
    found = inspect_weights(tensors)
    order = [get_args(Severity).index(o.severity) for o in found.observations]
    assert order == sorted(order)
    said = {o.claim: o for o in found.observations}
    for words, name in {
        "constant": "layers.2.attn.q.weight",
        "dead rows": "layers.0.attn.q.weight",
        "repeats rows": "layers.1.mlp.up.weight",
        "rank-deficient": "head.weight",
    }.items():
        observation = next(o for claim, o in said.items() if words in claim)
        assert name in observation.matrices
        assert observation.number
        assert observation.why
    assert not any(o.severity == "good" for o in found.observations)


def test_a_model_of_noise_is_called_one_and_a_healthy_one_is_not() -> None:
    noise = inspect_weights({f"layers.{i}.w.weight": randn(40, 60, seed=i) for i in range(3)})
    assert any("noise" in o.claim and "may not have been trained" in o.why for o in noise.observations)
    assert any(o.severity == "good" for o in noise.observations)


def test_truncated_missing_pickled_and_foreign_sources(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(model(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(FileError, match="cut short"):
        inspect_weights(path)
    path.write_bytes(whole[:5])
    with pytest.raises(FileError, match="cut short"):
        inspect_weights(path)
    with pytest.raises(FileError, match="does not exist"):
        inspect_weights(tmp_path / "nothing")
    (tmp_path / "w.bin").write_bytes(b"x")
    with pytest.raises(FileError, match="pickled"):
        inspect_weights(tmp_path / "w.bin")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileError, match="neither"):
        inspect_weights(tmp_path / "folder")
    with pytest.raises(InputError, match="mapping"):
        inspect_weights(42)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="x are none"):
        inspect_weights({"x": [1]})  # type: ignore[dict-item]
    with pytest.raises(InputError, match="tier"):
        inspect_weights(model(), tier="slow")  # type: ignore[arg-type]


def test_folders_of_several_files(tmp_path: Path) -> None:
    tensors = model()
    names = list(tensors)
    save_file({n: tensors[n] for n in names[:4]}, tmp_path / "model-1.safetensors")
    save_file({n: tensors[n] for n in names[4:]}, tmp_path / "model-2.safetensors")
    loose = inspect_weights(tmp_path)
    assert set(by_name(loose)) == set(tensors)
    index = {"weight_map": {n: f"model-{1 if n in names[:4] else 2}.safetensors" for n in names}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text("{}")
    indexed = inspect_weights(tmp_path)
    assert [f.findings for f in indexed.matrices] == [f.findings for f in loose.matrices]
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(FileError, match="missing"):
        inspect_weights(tmp_path)
    save_file({names[0]: tensors[names[0]]}, tmp_path / "other.safetensors")
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileError, match="is in both"):
        inspect_weights(tmp_path)


def test_patterns_choose_and_say_so() -> None:
    facts = by_name(inspect_weights(model(), include=["attn.*"], exclude=["re:layers.1"]))
    measured = {name for name, f in facts.items() if not f.skipped}
    assert measured == {"layers.0.attn.q.weight", "layers.2.attn.q.weight"}
    assert len(facts) == len(model())
    assert "re:layers.1" in facts["layers.1.attn.q.weight"].skipped
    with pytest.raises(InputError, match="atn"):
        inspect_weights(model(), include=["atn.*"])
    with pytest.raises(InputError, match="regular expression"):
        inspect_weights(model(), exclude=["re:("])


def test_a_killed_run_is_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = inspect_weights(model())
    measure, calls = eckart.inspection.run.measure, []

    def dying(W, entry, tier, base=None):  # type: ignore[no-untyped-def]
        calls.append(entry.name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(W, entry, tier, base)

    monkeypatch.setattr(eckart.inspection.run, "measure", dying)
    with pytest.raises(KeyboardInterrupt):
        inspect_weights(model(), cache=tmp_path / "cache")
    done = calls[:3]
    calls.clear()
    calls.extend([""] * 10)
    again = inspect_weights(model(), cache=tmp_path / "cache")
    assert not set(calls) & set(done)
    assert again.meta["taken from the cache"] == 3
    for one, two in zip(plain.matrices, again.matrices, strict=True):
        assert as_plain(one.findings) == as_plain(two.findings)
        assert (one.singular_values, one.verdict) == (two.singular_values, two.verdict)
    calls.clear()
    damaged = next(iter((tmp_path / "cache").glob("*.json")))
    damaged.write_text(damaged.read_text()[:50])
    third = inspect_weights(model(), cache=tmp_path / "cache")
    assert len(calls) == 1
    assert as_plain(third.observations) == as_plain(plain.observations)
    assert not list((tmp_path / "cache").glob(".*"))


def test_the_cache_knows_other_numbers_tiers_and_bases(tmp_path: Path) -> None:
    tensors = model(1)
    inspect_weights(tensors, cache=tmp_path)
    changed = dict(tensors) | {"head.weight": tensors["head.weight"] * 1.01}
    assert inspect_weights(changed, cache=tmp_path).meta["taken from the cache"] == 3
    assert inspect_weights(tensors, cache=tmp_path, tier="quick").meta["taken from the cache"] == 0
    assert inspect_weights(tensors, cache=tmp_path, base=changed).meta["taken from the cache"] == 0
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot be a cache"):
        inspect_weights(tensors, cache=tmp_path / "file")


def test_a_base_is_compared_weight_by_weight() -> None:
    base = model()
    tuned = dict(base) | {"extra.weight": randn(5, 5), "head.weight": randn(31, 24)}
    name = "layers.1.attn.q.weight"
    tuned[name] = base[name] + 0.1 * torch.outer(randn(24, seed=8), randn(24, seed=9))
    found = inspect_weights(tuned, base=dict(base) | {"gone.weight": randn(3, 3)}, tier="full")
    facts = by_name(found)
    assert facts[name].findings["delta_rank_95"].value == 1
    assert facts[name].findings["delta_lora_rank"].value == 1
    assert "delta_overlap_left" in facts[name].findings
    assert facts["layers.0.attn.q.weight"].base == "equal"
    assert "another shape" in facts["head.weight"].base
    assert "no such" in facts["extra.weight"].base
    assert found.meta["only in the base"] == ["gone.weight"]
    assert any("1 of" in o.claim and "changed" in o.claim for o in found.observations)
    assert any("3 tensors have no counterpart" in o.claim for o in found.observations)


def test_a_base_inside_of_another_model_and_a_stranger() -> None:
    base = model(1)
    wrapped = {f"bert.{name}": tensor for name, tensor in base.items()}
    for one, other in ((base, wrapped), (wrapped, base)):
        found = inspect_weights(one, base=other)
        assert all(f.base == "equal" for f in found.matrices if not f.skipped)
        assert any("equal those of the base" in o.claim for o in found.observations)
    with pytest.raises(MismatchError, match="another model"):
        inspect_weights(base, base={"other.weight": randn(3, 3)})


def test_too_large_a_gram_matrix_is_listed_not_dropped() -> None:
    found = inspect_weights(model(), most_gram_bytes=8 * 23**2)
    assert "GiB" in by_name(found)["head.weight"].skipped
    assert any("not measured" in o.claim and o.severity == "warning" for o in found.observations)


def test_progress_ends_at_its_total() -> None:
    told: list[tuple[str, int, int]] = []
    inspect_weights(model(), progress=lambda *args: told.append(args))
    assert [stage for stage, _, _ in told] == ["weights"] * len(told)
    done = [count for _, count, _ in told]
    assert done == sorted(done)
    assert done[0] == 0
    assert done[-1] == told[-1][2]


def test_nothing_to_measure_is_a_result_too() -> None:
    found = inspect_weights({"norm.weight": torch.ones(4)})
    assert "Nothing was measured" in claims(found)
    assert inspect_weights({}).matrices == ()


def test_experts_in_a_stack() -> None:
    facts = inspect_weights({"layers.0.mlp.experts.up_proj": randn(3, 20, 24)}).matrices[0]
    assert (facts.slices, facts.out_features, facts.in_features) == (3, 20, 24)
    assert facts.role == "mlp.experts.up_proj"
    assert len(facts.findings["rank_95"].details["slices"]) == 3


def test_roles_and_depths_by_name() -> None:
    names = [
        "encoder.block.0.layer.1.q.weight",
        "encoder.block.11.layer.1.q.weight",
        "decoder.block.2.layer.0.q.weight",
        "shared.weight",
        "0.weight",
    ]
    found = places(names)
    assert [(found[n].role, found[n].depth) for n in names] == [
        ("encoder.layer.1.q", 0),
        ("encoder.layer.1.q", 11),
        ("decoder.layer.0.q", 2),
        ("shared", None),
        ("0", None),
    ]
    one = places(["model.layers.3.mlp.up_proj.weight"])["model.layers.3.mlp.up_proj.weight"]
    assert (one.role, one.depth) == ("mlp.up_proj", 3)


def test_kinds_by_name() -> None:
    assert kind_of("bert.embeddings.word_embeddings.weight", (100, 8)) == "embedding"
    assert kind_of("transformer.wte.weight", (100, 8)) == "embedding"
    assert kind_of("gpt_neox.embed_out.weight", (100, 8)) == "linear"
    assert kind_of("h.0.attn.c_attn.weight", (8, 24), input_first=True) == "conv1d"
    assert kind_of("h.0.attn.c_attn.weight", (24, 8)) == "linear"
    assert kind_of("conv.weight", (8, 8, 3)) == "conv"
    assert kind_of("mlp.experts.down_proj", (8, 16, 8)) == "experts"
    assert kind_of("conv.weight", (8, 8, 3, 3)) == "conv"


def test_partners_are_unique_or_none() -> None:
    assert partners(["a.x.weight"], ["x.weight", "b.x.weight"]) == {"a.x.weight": "x.weight"}
    assert partners(["x.weight"], ["a.x.weight", "b.x.weight"]) == {}
    assert partners(["weight"], ["weight"]) == {"weight": "weight"}
