"""What the page and the terminal say of an inspection."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import sample_inspections
from rich.console import Console

from eckart.records import Finding
from eckart.report import render_inspection_terminal
from eckart.report.format import SPACE
from eckart.report.inspection_view import cell_text, factored_size, meta, verdict_line
from eckart.report.layout import group_of, maps, stack_of
from eckart.report.measures import MEASURES, measure_of, sure, value_text


def printed(inspection, width: int = 110) -> str:
    console = Console(width=width, file=io.StringIO(), highlight=False)
    console.print(render_inspection_terminal(inspection))
    return console.file.getvalue().replace(SPACE, " ")


def test_the_verdict_counts_and_judges() -> None:
    found = sample_inspections.minilm()
    line = verdict_line(found).replace(SPACE, " ")
    assert line.startswith("all-MiniLM-L6-v2 holds 22.3 M parameters, nearly all of them in 37 measured weights. ")
    assert line.endswith("1 finding says that something is broken.")
    calm = replace(found, observations=tuple(o for o in found.observations if o.severity == "advice"))
    assert verdict_line(calm).endswith("Nothing looks broken.")
    warned = replace(found, observations=found.observations[1:])
    assert verdict_line(warned).endswith("Nothing looks broken; 2 warnings.")
    assert "energy" not in verdict_line(sample_inspections.minilm(tier="quick"))


def test_the_factored_size_is_never_more_than_the_dense_one() -> None:
    facts = sample_inspections.matrix("a.weight", "", None, 100, 400, 0)
    rank = {"rank_99": Finding(name="rank_99", value=10)}
    assert factored_size([replace(facts, findings=rank)]) == (40_000, 10 * 500)
    rank = {"rank_99": Finding(name="rank_99", value=99)}
    assert factored_size([replace(facts, findings=rank)]) == (40_000, 40_000)
    # A stack: each matrix by its own rank, where they are known.
    stack = replace(facts, parameters=80_000, slices=2)
    many = {"rank_99": Finding(name="rank_99", value=50, details={"slices": [10.0, 90.0]})}
    assert factored_size([replace(stack, findings=many)]) == (80_000, 10 * 500 + 40_000)
    assert factored_size([replace(facts, findings={})]) == (0, 0)


def test_the_terminal_shows_every_measured_weight_and_counts_the_others() -> None:
    found = sample_inspections.minilm(panels=sample_inspections.PANELS)
    text = printed(found, width=160)
    for facts in found.matrices:
        assert (facts.name.removesuffix(".weight") in text) is not bool(facts.skipped)
    assert "not measured: 6 (1-D: no spectrum)" in text
    assert "2 more findings" in text
    assert "$ eckart compress MODEL" in text
    assert "✕ broken" in text
    assert "Rank of the activations" in text
    assert "Effective rank: 123 ± 2.1 (n = 4,096)" in text


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_terminal_keeps_to_its_width(width: int) -> None:
    assert max(map(len, printed(sample_inspections.minilm(), width).splitlines())) <= width


def test_measures_have_meanings_and_unknown_ones_keep_their_names() -> None:
    assert all(measure.meaning and measure.label for measure in MEASURES.values())
    assert measure_of("delta_stable_rank").label == "ΔW: Stable rank"
    assert measure_of("new_thing").label == "New thing"
    assert measure_of("delta_new_thing").label == "ΔW: new thing"


def test_values_say_bounds_and_gaps() -> None:
    assert value_text(None) == "–"
    assert value_text(Finding(name="rank_95", value=None)) == "–"
    assert value_text(Finding(name="rank_95", value=12.0)) == "12"
    assert value_text(Finding(name="condition_number", value=3e4, at_least=True)) == f"≥{SPACE}30000"
    assert value_text(Finding(name="distance_from_noise", value=0.5)) == "+0.50"


def test_how_sure_a_number_is() -> None:
    exact = Finding(name="a", value=1.0, uncertainty=0)
    rough = Finding(name="a", value=1.0, uncertainty=0.25)
    vague = Finding(name="a", value=1.0)
    none = Finding(name="a", value=None)
    assert sure([exact, exact]) == "exact up to rounding"
    assert sure([exact, rough]).replace(SPACE, " ") == "estimate, 95 % within ± 0.25 or less"
    assert sure([vague]) == "estimate, its error is not known"
    assert sure([none]) == "not measured"
    assert sure([exact, none, replace(exact, at_least=True)]) == (
        "exact up to rounding; a lower bound in 1 of 2; not measured in 1"
    )


def test_cells_are_short() -> None:
    assert [cell_text(x) for x in (None, 0.0, 0.5, 0.994, 0.996, 1.26, 2.0)] == [
        "–",
        ".00",
        ".50",
        ".99",
        "1.0",
        "1.3",
        "2.0",
    ]


def test_the_meta_leaves_out_what_is_empty_and_writes_units() -> None:
    found = replace(
        sample_inspections.minilm(), base="b", meta={"seconds": 75, "bytes": 2_000_000, "hash": "", "command": "c"}
    )
    shown = {name: text.replace(SPACE, " ") for name, text in meta(found).items()}
    assert shown == {"tier": "standard", "compared with": "b", "took": "1 min 15 s", "bytes": "2.00 MB"}


def test_stacks_and_groups_come_from_names_with_or_without_weight() -> None:
    assert stack_of("encoder.layer.0.mlp.up", 0, "mlp.up") == "encoder.layer"
    assert stack_of("encoder.layer.0.mlp.up.weight", 0, "mlp.up") == "encoder.layer"
    assert stack_of("other.mlp.up", 0, "mlp.up") == ""
    assert stack_of("table.weight", None, "") == ""
    assert group_of("table", "", None, "") == "table"
    assert group_of("encoder.layer.0.up", "encoder.layer", 0, "up") == "encoder.layer up"
    assert maps([]) == ((), ())
