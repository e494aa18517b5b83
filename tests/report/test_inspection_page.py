"""The inspection page as a file: whole, offline, escaped, small, and nothing left out."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from dataclasses import replace

import pytest
import sample_inspections
from test_report_page import read

from eckart.inspection.record import Inspection
from eckart.report import inspection_note, render_inspection
from eckart.report.charts import plot, sparkline
from eckart.report.document import data_block

LIMIT = 800_000


@pytest.fixture(scope="module")
def minilm() -> Inspection:
    return sample_inspections.minilm(panels=sample_inspections.PANELS)


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S).group(1))


def test_every_tensor_is_a_row_and_every_measured_one_a_cell(minilm) -> None:
    reader = read(render_inspection(minilm))
    ids = [a["id"] for tag, a in reader.elements if tag == "tr" and a.get("id")]
    assert ids == [f"weight-{i}" for i in range(len(minilm.matrices))]
    cells = [a for tag, a in reader.elements if tag == "a" and "data-i" in a]
    assert len(cells) == sum(not facts.skipped for facts in minilm.matrices)
    text = " ".join(reader.text)
    assert "not measured: 1-D: no spectrum" in text
    assert "6 (1-D: no spectrum)" in text


def test_seven_findings_are_shown_the_worst_first_and_the_others_folded(minilm) -> None:
    page = render_inspection(minilm)
    assert "<summary>2 more</summary>" in page
    shown = re.findall(r'<li class="is-(\w+)"', page)
    assert len(shown) == 9
    order = ["broken", "warning", "advice", "good"]
    assert [order.index(s) for s in shown] == sorted(order.index(s) for s in shown)


def test_no_finding_is_said_to_be_none(minilm) -> None:
    page = render_inspection(replace(minilm, observations=()))
    assert "Nothing stands out." in page
    assert "Nothing looks broken." in page
    assert not [a for _, a in read(page).elements if "noted" in (a.get("class") or "").split() and "href" in a]
    assert 'value="noted"' not in page


def test_nothing_points_outside(minilm) -> None:
    page = render_inspection(minilm)
    for tag, attributes in read(page).elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        for name in ("src", "href", "srcset", "action", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    without = page.replace("http://www.w3.org/2000/svg", "")  # the name of a namespace, never fetched
    assert not re.search(r"https?:|url\(|@import|//cdn|fetch\(|XMLHttp", without)


def test_the_policy_names_the_one_script_that_runs(minilm) -> None:
    page = render_inspection(minilm)
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    policy = next(a["content"] for t, a in read(page).elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


def test_hostile_names_stay_text() -> None:
    bad = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
    found = sample_inspections.minilm(hostile=bad, title=bad)
    worst = replace(found.observations[0], claim=bad, number=bad, why=bad, command=bad)
    found = replace(found, observations=(worst,), meta={bad: bad, "command": bad}, base=bad, source=bad)
    page = render_inspection(found)
    reader = read(page)
    assert sum(tag == "script" for tag, _ in reader.elements) == 2  # the data and the script
    assert not any(tag == "img" or "onerror" in attributes for tag, attributes in reader.elements)
    assert bad in data_of(page)["title"]
    assert "<script>alert" not in inspection_note(found)


@pytest.mark.parametrize("blocks", [32, 80])
def test_big_models_stay_small_files(blocks: int) -> None:
    page = render_inspection(sample_inspections.seven_billion(blocks))
    size = len(page.encode())
    assert size < (LIMIT if blocks == 32 else 2 * LIMIT)
    assert len(data_of(page)["spectra"]) == 7 * blocks


def test_the_embedded_data_give_back_what_was_measured(minilm) -> None:
    data = data_of(render_inspection(minilm))
    rows = {row[0]: row for row in data["rows"]}
    assert set(rows) == {facts.name for facts in minilm.matrices}
    names = [name for name, _, _ in data["findings"]]
    order = [row[0] for row in data["rows"]]
    for facts in minilm.matrices:
        row = rows[facts.name]
        assert row[6] == facts.skipped
        for name, packed in zip(names, row[9], strict=True):
            finding = facts.findings.get(name)
            if finding is None:
                assert packed is None
                continue
            value, uncertainty, at_least, notes = packed if isinstance(packed, list) else (packed, 0, 0, [])
            assert value == pytest.approx(finding.value, rel=1e-5)
            assert uncertainty == (
                None if finding.uncertainty is None else pytest.approx(finding.uncertainty, rel=1e-5)
            )
            assert bool(at_least) == finding.at_least
            assert tuple(data["notes"][i] for i in notes) == finding.notes
        if facts.singular_values:
            place, first, sigma, noise_first, noise, energy = data["spectra"][str(order.index(facts.name))]
            places, at = data["places"][place], 0
            for k, step in enumerate(sigma):
                at += step
                expected = facts.singular_values[facts.places.index(places[k])]
                assert first * 10 ** (at / 1000) == pytest.approx(expected, rel=2e-3)
            assert noise_first == pytest.approx(facts.noise[0], rel=1e-5)
            assert sum(energy) / 10_000 == pytest.approx(1, abs=1e-4)
            assert len(noise) == len(sigma) == len(energy) == len(places)


def test_figures_that_are_not_finite_are_left_open_and_zeros_are_drawn(minilm) -> None:
    first = next(facts for facts in minilm.matrices if not facts.skipped)
    zero = replace(first, singular_values=(1.0, 0.0), places=(0, 1), noise=(), energy=(1.0, 1.0))
    nan = replace(first, findings={"frobenius": replace(first.findings["frobenius"], value=math.nan)})
    dead = replace(first, singular_values=(0.0, 0.0), places=(0, 1), noise=(), energy=())
    data = data_of(render_inspection(replace(minilm, matrices=(zero, nan, dead), observations=())))
    assert data["spectra"]["0"][2] == [0, -20_000]
    assert data["rows"][1][9][0] == [None, 0, 0, []]
    assert "2" not in data["spectra"]


def test_a_model_of_nothing_but_skipped_tensors_has_a_page() -> None:
    found = replace(
        sample_inspections.minilm(), matrices=(sample_inspections.vector("a", 4),), observations=(), panels=()
    )
    text = " ".join(read(render_inspection(found)).text)
    assert "No weight was measured." in text
    assert "0 measured weights" in text
    assert "Nothing was measured." in text
    assert "Nothing looks broken" not in text
    empty = replace(found, matrices=(), meta={})
    assert "0 tensors" in " ".join(read(render_inspection(empty)).text)


def test_the_quick_tier_maps_the_stable_rank() -> None:
    page = render_inspection(sample_inspections.minilm(tier="quick"))
    assert "the stable rank over the full rank" in page
    assert "break-even" not in re.sub(r"<script>.*?</script>", "", page, flags=re.S)


def test_panels_are_there_only_where_measured(minilm) -> None:
    reader = read(render_inspection(minilm))
    ids = [a.get("id") for tag, a in reader.elements if tag == "section"]
    assert ids[-3:] == ["panel-1", "panel-2", "method"]
    drawn = [a for tag, a in reader.elements if tag == "svg" and a.get("class") == "plot"]
    assert [a["aria-label"] for a in drawn] == [panel.title for panel in minilm.panels]
    assert "panel-1" not in render_inspection(replace(minilm, panels=()))


def test_the_note_for_notebooks_is_a_fragment_without_a_script(minilm) -> None:
    note = inspection_note(minilm)
    reader = read(note)
    assert not {"script", "style", "html"} & {tag for tag, _ in reader.elements}
    assert sum(tag == "tr" for tag, _ in reader.elements) == len(minilm.matrices) + 1


def test_json_in_a_page_cannot_end_its_element() -> None:
    block = data_block({"a": "</script><!--", "b": [math.inf, 1.5]})
    assert "<" not in block
    assert json.loads(block) == {"a": "</script><!--", "b": [None, 1.5]}


def test_a_plot_leaves_out_what_is_not_finite_and_scales_a_wide_range_by_its_logarithm() -> None:
    drawing = plot({"a": [(1, 1), (10, math.nan), (100, 1000)]}, x="<x>", y="y", label='"')
    assert "&lt;x&gt;" in drawing
    assert ">100<" in drawing
    assert plot({"a": [(1.0, 2.0)], "b": [(1.0, 3.0)]}, x="", y="", label="one point") == ""
    assert str(plot({"a": [(1.0, 2.0), (2.0, 2.0)]}, x="", y="", label="level")).count("<circle") == 2
    assert plot({"a": []}, x="", y="", label="none") == ""


def test_a_sparkline_is_short() -> None:
    values = [1 / (i + 1) for i in range(200)]
    assert len(sparkline(values, list(range(200)))) < 300
    assert sparkline([0.0, 0.0], [0, 1]) == ""
