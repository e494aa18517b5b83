"""The report page as a file: whole, offline, escaped, small."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import sample_runs

from eckart.records import Site
from eckart.report import render_report

VOID = {"meta", "rect", "path", "circle", "input", "wbr", "link", "br"}
LIMIT = 800_000


class Reader(HTMLParser):
    """Collects elements, checks that they close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data) -> None:
        self.text.append(data)


def plan_of(outcome) -> str:
    steps = [
        {"site": layer.site.name, "form": layer.form, "rank": layer.rank, "method": "kfac", "options": {}}
        for layer in outcome.layers
    ]
    return json.dumps({"format_version": 1, "method": "kfac", "fingerprint": "3f" * 32, "steps": steps}, indent=2)


def page_of(outcome, curves, **changes) -> str:
    arguments = {
        "plan_json": plan_of(outcome),
        "curves": curves,
        "certificate": sample_runs.CERTIFICATE,
        "evaluation": sample_runs.sentence_evaluation(outcome),
        "title": "all-MiniLM-L6-v2",
        "command": "eckart compress MODEL --keep 0.6",
        "meta": {"Base": "all-MiniLM-L6-v2"},
    }
    return render_report(outcome, **{**arguments, **changes})


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def minilm():
    return sample_runs.minilm()


def test_every_layer_is_in_map_table_and_curves(minilm) -> None:
    outcome, curves = minilm
    reader = read(page_of(outcome, curves))
    n = len(outcome.layers)
    found = [a.get("id") or "" for tag, a in reader.elements if tag == "tr"]
    assert [i for i in found if i] == [f"layer-{i}" for i in range(n)]
    assert sum(tag == "a" and "data-i" in a for tag, a in reader.elements) == n
    assert sum(tag == "path" and "line" in (a.get("class") or "") for tag, a in reader.elements) == n
    dots = sum(tag == "circle" and "dot" in (a.get("class") or "") for tag, a in reader.elements)
    assert dots == sum(layer.form != "dense" for layer in outcome.layers)


def test_nothing_points_outside(minilm) -> None:
    reader = read(page_of(*minilm))
    for tag, attributes in reader.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        for name in ("src", "href", "srcset", "action", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert not re.search(r"https?:|url\(|@import|//cdn", page_of(*minilm))


def test_the_policy_names_the_one_script(minilm) -> None:
    page = page_of(*minilm)
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    policy = next(a["content"] for t, a in read(page).elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


def test_hostile_names_stay_text() -> None:
    bad = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
    outcome, curves = sample_runs.minilm(hostile=bad)
    outcome = replace(outcome, notes=(bad,), method=bad, budget=bad)
    evaluation = replace(sample_runs.sentence_evaluation(outcome), protocol={bad: bad}, warnings=(bad,))
    page = page_of(
        outcome,
        curves,
        evaluation=evaluation,
        title=bad,
        command=bad,
        meta={bad: bad},
        plan_json=plan_of(outcome),
    )
    reader = read(page)
    assert sum(tag == "script" for tag, _ in reader.elements) == 1
    assert not any(tag == "img" or "onerror" in attributes for tag, attributes in reader.elements)
    assert any(bad in text for text in reader.text)


@pytest.mark.parametrize("blocks", [32, 72])
def test_big_models_stay_small_files(blocks: int) -> None:
    outcome, curves = sample_runs.llama(blocks)
    assert len(outcome.layers) == 7 * blocks
    long_plan = json.dumps(json.loads(plan_of(outcome)) | {"padding": ["x" * 180] * len(outcome.layers)}, indent=2)
    page = page_of(outcome, curves, plan_json=long_plan, evaluation=sample_runs.language_evaluation(outcome))
    assert len(page.encode()) < LIMIT


def test_a_long_plan_is_still_the_same_plan() -> None:
    outcome, curves = sample_runs.llama(72)
    plan = plan_of(outcome)
    long = json.dumps(json.loads(plan) | {"x": ["y" * 200] * 800}, indent=2)
    reader = read(page_of(outcome, curves, plan_json=long))
    shown = next(text for text in reader.text if text.startswith('{\n  "format_version"'))
    assert json.loads(shown) == json.loads(long)


def test_bare_outcomes_have_a_page(minilm) -> None:
    outcome, _ = minilm
    page = render_report(outcome, plan_json="{}", title="M", command="c")
    text = " ".join(read(page).text)
    assert "Quality was not measured" in text
    assert "Error curves" not in text
    assert "Certificate" not in text


def test_sites_outside_of_blocks_and_sites_that_share_a_cell_are_shown(minilm) -> None:
    outcome, curves = minilm
    first = outcome.layers[0]
    table = Site(name="embeddings.word", kind="embedding", out_features=384, in_features=30522)
    twin = replace(first.site, name="elsewhere.query")
    more = (replace(first, site=table), replace(first, site=twin), replace(first, site=twin))
    outcome = replace(outcome, layers=(*outcome.layers, *more))
    reader = read(page_of(outcome, curves))
    labels = [a["aria-label"] for tag, a in reader.elements if tag == "a" and "data-i" in a]
    assert len(labels) == len(outcome.layers)
    assert sum(label.startswith("embeddings.word") for label in labels) == 1
    assert sum(label.startswith("elsewhere.query") for label in labels) == 2


def test_encoder_and_decoder_have_maps_of_their_own() -> None:
    encoder, curves = sample_runs.run(sample_runs.LLAMA, "encoder.block", 2, 0)
    decoder, more = sample_runs.run(sample_runs.LLAMA, "decoder.block", 3, 0)
    outcome = replace(encoder, layers=encoder.layers + decoder.layers)
    reader = read(page_of(outcome, curves | more))
    maps = [a for tag, a in reader.elements if tag == "table" and "map" in (a.get("class") or "")]
    assert len(maps) == 2
    assert {"encoder.block", "decoder.block"} <= set(reader.text)


def test_dense_layers_are_a_state_and_not_a_gap(minilm) -> None:
    outcome, curves = minilm
    layers = tuple(replace(layer, form="dense", predicted=0, held_out=None, loss=None) for layer in outcome.layers)
    text = read(page_of(replace(outcome, layers=layers), curves)).text
    assert text.count("kept dense") >= len(layers)


@pytest.mark.parametrize(("ratio", "warning"), [(float("inf"), "apart"), (None, None), (1.0, None)])
def test_certificates_with_odd_ratios(minilm, ratio, warning) -> None:
    changed = {**vars(sample_runs.CERTIFICATE), "ratio": ratio, "warning": warning}
    page = page_of(*minilm, certificate=type(sample_runs.CERTIFICATE)(**changed))
    assert ("apart" in " ".join(read(page).text)) is (warning is not None)
