"""``eckart.inspect`` and ``eckart.dimension`` on small real models and data, and on what cannot be used."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import save_file

import eckart
from eckart.errors import FileError, InputError, MismatchError, NotFiniteError

CONFIG = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def tiny(seed: int = 0, **changes) -> tf.LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return tf.LlamaForCausalLM(tf.LlamaConfig(**{**CONFIG, **changes})).eval()


def batches(rows: int = 4, length: int = 12) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 40, (rows, length), generator=generator)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny().save_pretrained(path)
    return path


def test_a_folder_a_file_a_module_and_a_mapping_give_the_same_figures(folder) -> None:
    module = tiny()
    sources = [folder, str(folder), folder / "model.safetensors", module, dict(module.named_parameters())]
    found = [eckart.inspect(source) for source in sources]
    name = "model.layers.1.mlp.up_proj.weight"
    values = [{m.name: m for m in inspection.matrices}[name].findings["stable_rank"].value for inspection in found]
    assert values == pytest.approx([values[0]] * len(values))
    assert not found[0].panels


def test_looking_does_not_change_a_module(folder) -> None:
    module = tiny().train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    eckart.inspect(module, tier="quick")
    assert module.training
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_what_is_found_shows_itself(folder, tmp_path) -> None:
    found = eckart.inspect(folder, command="eckart inspect MODEL")
    assert found.meta["version"] == eckart.__version__
    assert "eckart inspect MODEL" in found.page()
    assert "<script" not in found._repr_html_()
    found.save(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == found.page()
    assert list(tmp_path.iterdir()) == [tmp_path / "page.html"]
    again = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert [m["name"] for m in again["matrices"]] == [m.name for m in found.matrices]
    with pytest.raises(FileError, match="cannot be written"):
        found.save(tmp_path / "none" / "page.html")


def test_data_give_the_rank_of_the_activations_by_depth(folder) -> None:
    found = eckart.inspect(folder, batches(), tier="quick")
    (panel,) = found.panels
    assert panel.title == "Rank of the activations"
    # q, k and v read one input, gate and up another.
    assert len(panel.curves) == 4
    assert all([x for x, _ in line] == [0, 1, 2] for line in panel.curves.values())
    assert all(1 <= y <= 32 for line in panel.curves.values() for _, y in line)
    least, most = panel.findings
    assert least.value <= most.value
    assert least.n == 48


def test_the_rank_of_the_activations_is_that_of_the_inputs(folder) -> None:
    model, seen = tiny(), []
    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for batch in batches():
        model(**batch)
    handle.remove()
    inputs = torch.cat([x.flatten(0, 1) for x in seen]).double().detach()
    values = torch.linalg.svdvals(inputs - inputs.mean(0)).square()
    shares = values / values.sum()
    expected = float(torch.exp(-(shares * shares.log()).nansum()))
    (panel,) = eckart.inspect(folder, batches(), tier="quick").panels
    assert dict(panel.curves["mlp.down_proj"])[1] == pytest.approx(expected, rel=1e-6)


def test_the_full_tier_measures_the_curvature_of_the_loss() -> None:
    small = tiny(num_hidden_layers=1)
    found = eckart.inspect(small, batches(), tier="full")
    panel = found.panels[-1]
    assert panel.title == "Curvature"
    top = next(f for f in panel.findings if f.name == "hessian_top_eigenvalue")
    rate = next(f for f in panel.findings if f.name == "gd_max_learning_rate")
    assert rate.value == pytest.approx(2 / top.value)

    # The eigenvalue along the direction of the largest one, by finite differences of the loss itself.
    def loss(model) -> torch.Tensor:
        losses = []
        for batch in batches():
            logits, targets = model(**batch).logits[:, :-1], batch["input_ids"][:, 1:]
            losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))
        return torch.stack(losses).mean()

    parameters = list(small.parameters())
    v = [torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) for i, p in enumerate(parameters)]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for _ in range(30):
            gradients = torch.autograd.grad(loss(small), parameters, create_graph=True)
            product = torch.autograd.grad(sum((g * u).sum() for g, u in zip(gradients, v, strict=True)), parameters)
            norm = math.sqrt(sum(float(h.square().sum()) for h in product))
            v = [h / norm for h in product]
    assert norm == pytest.approx(top.value, rel=0.05)


def test_a_model_whose_loss_is_not_known_says_so() -> None:
    config = tf.BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    found = eckart.inspect(tf.BertForMaskedLM(config).eval(), batches(), tier="full")
    assert [panel.title for panel in found.panels] == ["Rank of the activations"]
    assert "no loss is known" in " ".join(found.meta["not measured"])


def test_a_model_too_large_for_its_curvature_says_so(folder, monkeypatch) -> None:
    monkeypatch.setattr("eckart.verbs.panels.CURVATURE_BYTES", 1000)
    found = eckart.inspect(folder, batches(), tier="full")
    assert len(found.panels) == 1
    assert "Lanczos would take" in found.meta["not measured"][0]


def test_nan_is_reported_with_and_without_data(tmp_path) -> None:
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    for data in (None, batches()):
        found = eckart.inspect(model, data)
        assert found.observations[0].severity == "broken"
        assert "model.layers.1.mlp.up_proj.weight" in found.observations[0].matrices
        assert found.panels == ()
        assert "NaN" in found.page()
    assert "activations: weights" in found.meta["not measured"][0]


def test_a_base_shows_what_changed_and_where(folder, tmp_path) -> None:
    model = tiny()
    with torch.no_grad():
        weight = model.model.layers[2].mlp.up_proj.weight
        weight += 0.05 * torch.outer(torch.ones(weight.shape[0]), torch.ones(weight.shape[1]))
    found = eckart.inspect(model, against=folder)
    facts = {m.name: m for m in found.matrices}
    changed = facts["model.layers.2.mlp.up_proj.weight"]
    assert changed.findings["delta_rank_99"].value == 1
    assert facts["model.layers.1.mlp.up_proj.weight"].base == "equal"
    panel = next(p for p in found.panels if p.title == "Change against the base")
    assert panel.curves == {"mlp.up_proj": ((2, changed.findings["delta_relative"].value),)}
    assert "equal" in found.page()
    with pytest.raises(MismatchError):
        eckart.inspect(model, against=tiny(hidden_size=16, intermediate_size=20, vocab_size=30))


def test_odd_tensors_are_all_listed(tmp_path) -> None:
    tensors = {
        "empty": torch.zeros(0, 4),
        "constant": torch.ones(9, 9),
        "integer": torch.arange(12).reshape(3, 4),
        "vector": torch.ones(5),
        "half": torch.randn(12, 20, generator=torch.Generator().manual_seed(0)).half(),
        "zero": torch.zeros(8, 8),
        "one": torch.ones(1, 1),
    }
    save_file(tensors, tmp_path / "odd.safetensors")
    for tier in ("quick", "standard", "full"):
        found = eckart.inspect(tmp_path / "odd.safetensors", tier=tier)
        assert {m.name for m in found.matrices} == set(tensors)
        skipped = {m.name: m.skipped for m in found.matrices if m.skipped}
        assert {"empty", "integer", "vector"} <= set(skipped)
        assert all(name in found.page() for name in tensors)
    sparse = eckart.inspect({"sparse": torch.eye(4).to_sparse(), "dense": torch.eye(4)})
    assert next(m for m in sparse.matrices if m.name == "sparse").skipped


def test_the_cache_gives_the_same_figures(folder, tmp_path) -> None:
    first = eckart.inspect(folder, cache=tmp_path / "cache")
    second = eckart.inspect(folder, cache=tmp_path / "cache")
    for one, two in zip(first.matrices, second.matrices, strict=True):
        assert one.findings == two.findings


@pytest.mark.parametrize(
    ("keywords", "kind", "words"),
    [
        ({"tier": "quik"}, InputError, "Did you mean 'quick'"),
        ({"tier": "fast", "samples": 0}, InputError, "2 problems"),
        ({"batch_size": 0}, InputError, "batch_size"),
        ({"dtype": "float32"}, InputError, "without data"),
        ({"include": ["nothing.like.this"]}, InputError, "nothing.like.this"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(folder, keywords, kind, words) -> None:
    with pytest.raises(kind, match=words):
        eckart.inspect(folder, **keywords)


def test_wrong_sources_are_refused(folder, tmp_path) -> None:
    with pytest.raises(InputError, match="data can only be run through a model"):
        eckart.inspect(folder / "model.safetensors", batches())
    with pytest.raises(InputError, match="a mapping of tensors is none"):
        eckart.inspect({"a": torch.eye(3)}, batches())
    with pytest.raises(FileError, match="does not exist"):
        eckart.inspect(tmp_path / "none.safetensors")
    with pytest.raises(FileError):
        eckart.inspect(tmp_path / "none" / "model")
    whole = (folder / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-7])
    with pytest.raises(FileError, match="cut short"):
        eckart.inspect(tmp_path / "cut.safetensors")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    with pytest.raises(FileError):
        eckart.inspect(tmp_path / "empty.safetensors")


def points(n: int = 600, d: int = 3, features: int = 12) -> np.ndarray:
    draw = np.random.default_rng(0)
    return draw.random((n, d)) @ draw.normal(size=(d, features))


def test_the_dimension_of_a_cube_from_every_kind_of_source(tmp_path) -> None:
    X = points()
    np.save(tmp_path / "X.npy", X)
    save_file({"X": torch.from_numpy(X)}, tmp_path / "X.safetensors")
    save_file({"X": torch.from_numpy(X), "Y": torch.eye(3)}, tmp_path / "XY.safetensors")
    sources = [X, torch.from_numpy(X), X.tolist(), tmp_path / "X.npy", str(tmp_path / "X.safetensors")]
    found = [eckart.dimension(source) for source in sources]
    found.append(eckart.dimension(tmp_path / "XY.safetensors", name="X"))
    values = [curve.curves["two_nn"][0].value for curve in found]
    assert values == pytest.approx([values[0]] * len(values))
    assert values[0] == pytest.approx(3, abs=0.5)
    assert found[0].title == "data"
    assert found[3].title == "X.npy"
    assert "X.npy" in found[3].page("eckart dimension X.npy")
    assert found[0].verdict.split(":")[0] in found[0]._repr_html_()
    json.dumps(found[0].to_json(), allow_nan=False)


def test_duplicates_are_dropped_and_counted_and_images_are_flattened() -> None:
    X = points(300)
    found = eckart.dimension(np.concatenate([X, X[:50]]))
    assert found.duplicates == 50
    assert any("50 of 350" in note for note in found.notes)
    assert "50 of 350" in found.page()
    assert eckart.dimension(X.reshape(300, 3, 4)).features == 12


@pytest.mark.parametrize(
    "X",
    [np.ones((50, 3)), np.ones((1, 3)), points(5), np.repeat(points(2), 9, axis=0), np.arange(60).reshape(20, 3)],
    ids=["constant", "one row", "fewer than neighbours", "two points", "integers"],
)
def test_data_that_have_no_dimension_say_why(X) -> None:
    found = eckart.dimension(X)
    assert "not measured" in found.verdict or found.notes or found.curves["mle"][0].notes
    assert found.verdict in found.page() or "&" in found.page()


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [
        (np.array(["a", "b"]), InputError, "expected numbers"),
        (np.array([1.0, 2.0]), InputError, "expected a matrix"),
        ([[1.0, 2.0], [1.0]], InputError, "same length|expected numbers"),
        (np.zeros((0, 3)), InputError, "at least one row"),
        (np.full((9, 2), np.nan), NotFiniteError, "NaN or Inf in 9 of 9 rows"),
        (np.zeros((3, 2), dtype=complex), InputError, "expected numbers"),
        ("missing.npy", FileError, "there is no file"),
    ],
    ids=["texts", "1-D", "ragged", "empty", "NaN", "complex", "missing"],
)
def test_data_that_cannot_be_used_are_refused(data, kind, words) -> None:
    with pytest.raises(kind, match=words):
        eckart.dimension(data)


def test_files_that_cannot_be_used_are_refused(tmp_path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "whole.npy", points(20))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "whole.npy").read_bytes()[:-100])
    (tmp_path / "no.npy").write_bytes(b"nothing")
    (tmp_path / "empty.npy").write_bytes(b"")
    for name in ("objects", "cut", "no", "empty"):
        with pytest.raises(FileError, match="cannot be read"):
            eckart.dimension(tmp_path / f"{name}.npy")
    (tmp_path / "table.csv").write_text("1,2\n")
    with pytest.raises(InputError, match=r"expected a \.npy or"):
        eckart.dimension(tmp_path / "table.csv")
    save_file({"X": torch.eye(3), "Y": torch.eye(3)}, tmp_path / "two.safetensors")
    with pytest.raises(InputError, match="say which one"):
        eckart.dimension(tmp_path / "two.safetensors")
    with pytest.raises(InputError, match="unknown tensor 'Z'"):
        eckart.dimension(tmp_path / "two.safetensors", name="Z")
    with pytest.raises(InputError, match="holds one array"):
        eckart.dimension(tmp_path / "whole.npy", name="X")
    with pytest.raises(InputError, match="have none"):
        eckart.dimension(points(20), name="X")


def test_a_hub_name_stands_in_title_and_commands(folder, monkeypatch) -> None:
    loaded = eckart.verbs.models.as_loaded(folder)
    monkeypatch.setattr("eckart.verbs.inspect.as_loaded", lambda *_, **__: loaded)
    found = eckart.inspect("someone/tiny")
    assert found.title == "tiny"
    assert found.source == "someone/tiny"
    commands = [o.command for o in found.observations if o.command]
    assert commands
    assert all("LlamaForCausalLM" not in command for command in commands)
