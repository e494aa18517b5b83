"""The verdict, the budget, the terminal and the model card."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sample_runs
import yaml
from markdown_it import MarkdownIt
from rich.console import Console

from eckart.records import Budget, Latency, Size
from eckart.report import model_card, render_layers, render_terminal, verdict_text
from eckart.report.format import SPACE
from eckart.report.verdict import budget_reached, flagged

OUTCOME = sample_runs.minilm()[0]
MEASURED = sample_runs.sentence_evaluation(OUTCOME)


def words(*args) -> str:
    return verdict_text(*args).replace(SPACE, " ")


def printed(renderable, width: int = 100) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get().replace(SPACE, " ")


def card(**changes) -> str:
    arguments = {
        "base_name": "sentence-transformers/all-MiniLM-L6-v2",
        "title": "Small",
        "command": "eckart demo",
    }
    return model_card(OUTCOME, MEASURED, **{**arguments, **changes})


def test_the_verdict_has_sizes_quality_interval_and_speed() -> None:
    text = words(OUTCOME, MEASURED, "MiniLM")
    share = OUTCOME.sites_after.parameters / OUTCOME.sites_before.parameters
    assert text.startswith(f"MiniLM keeps {100 * share:.1f} % of the parameters of 36 layers")
    assert "on 300 unseen sentences" in text
    assert "mean cosine of 0.9324" in text
    assert "95 % interval 0.9289 to 0.9357" in text
    assert text.endswith("at batch 32 it is 1.50× as fast.")


def test_the_verdict_speaks_of_bytes_where_bits_or_zeros_save_them() -> None:
    fewer = replace(OUTCOME.sites_after, bytes=OUTCOME.sites_before.bytes // 5)
    text = words(replace(OUTCOME, sites_after=fewer), None, "M")
    assert text.startswith("M keeps 20.0 % of the bytes of 36 layers")
    assert "MB as a whole" in text


def test_the_verdict_says_what_was_not_measured() -> None:
    assert words(OUTCOME, None, "M").endswith(", which was not measured.")
    assert words(replace(OUTCOME, predicted_loss=None), None, "M").endswith("its quality was not measured.")


def test_the_verdict_calls_slower_slower() -> None:
    slow = replace(MEASURED, latency=(Latency(batch=32, length=64, model=0.3, base=0.24),))
    assert "0.80× as fast" in words(OUTCOME, slow, "M")


def test_the_verdict_of_a_language_model_has_its_unit() -> None:
    outcome = sample_runs.llama()[0]
    text = words(outcome, sample_runs.language_evaluation(outcome), "Llama")
    assert "on 240 unseen windows its loss is 0.163 nats per token above the original’s" in text


@pytest.mark.parametrize(
    ("budget", "asked", "reached"),
    [
        (Budget(keep=0.6), "60.0 %", OUTCOME.sites_after.parameters / OUTCOME.sites_before.parameters),
        (Budget(model_keep=0.8), "80.0 %", OUTCOME.model_after.parameters / OUTCOME.model_before.parameters),
        (Budget(parameters=19_000_000), "19.0 M", OUTCOME.model_after.parameters),
        (Budget(bytes=80_000_000), "80.0 MB", OUTCOME.model_after.bytes),
        (Budget(macs=7_000_000), "7.00 M", OUTCOME.sites_after.macs),
        (Budget(loss=0.05), "0.0500", OUTCOME.predicted_loss),
    ],
)
def test_budgets_are_read_in_their_own_unit(budget: Budget, asked: str, reached: float) -> None:
    found = budget_reached(replace(OUTCOME, budget=str(budget)))
    assert found is not None
    assert found.asked_text.replace(SPACE, " ") == asked
    assert found.reached == reached


def test_a_budget_without_a_number_is_left_in_words() -> None:
    assert budget_reached(replace(OUTCOME, budget="the plan in plan.json")) is None
    assert budget_reached(replace(OUTCOME, budget="keep what is needed")) is None


def test_held_out_errors_are_flagged_above_twice_the_predicted() -> None:
    layer = next(layer for layer in OUTCOME.layers if layer.form != "dense")
    assert not flagged(replace(layer, predicted=0.1, held_out=0.2))
    assert flagged(replace(layer, predicted=0.1, held_out=0.201))
    assert flagged(replace(layer, predicted=0.0, held_out=0.01))
    assert not flagged(replace(layer, predicted=1e-9, held_out=1e-7))
    assert not flagged(replace(layer, predicted=0.1, held_out=None))


def test_the_terminal_keeps_sites_and_model_apart() -> None:
    text = printed(render_terminal(OUTCOME, MEASURED))
    lines = {line.split("  ")[0].strip(): line for line in text.splitlines()}
    assert "10.6 M" in lines["sites: parameters"]
    assert "22.5 M" in lines["model: parameters"]
    assert "0.9324" in lines["Cosine to the original"]
    assert "1.50×" in lines["batch 32 × 64"]


def test_the_terminal_shows_markup_as_it_is() -> None:
    text = printed(render_terminal(replace(OUTCOME, notes=("[red]not markup[/red] [/x]",))))
    assert "[red]not markup[/red] [/x]" in text


def test_the_terminal_lists_every_layer() -> None:
    text = printed(render_layers(OUTCOME), width=160)
    assert all(layer.site.name in text for layer in OUTCOME.layers)
    assert text.count("kept dense") == sum(layer.form == "dense" for layer in OUTCOME.layers)


def test_front_matter_is_what_the_hub_reads() -> None:
    head = card(tags=["sentence-similarity"], license="apache-2.0").split("---\n")[1]
    assert yaml.safe_load(head) == {
        "library_name": "transformers",
        "license": "apache-2.0",
        "base_model": "sentence-transformers/all-MiniLM-L6-v2",
        "tags": ["eckart", "low-rank", "compressed", "sentence-similarity"],
    }


@pytest.mark.parametrize("name", ["/home/me/model", "./model", "../model", "a/b/c", "two words"])
def test_a_path_is_not_a_base_model(name: str) -> None:
    assert "base_model" not in yaml.safe_load(card(base_name=name).split("---\n")[1])


def test_the_card_has_the_honest_table_and_how_to_load() -> None:
    text = card().replace(SPACE, " ")
    assert "| parameters, compressed layers | 10.6 M |" in text
    assert "| parameters, whole model | 22.5 M |" in text
    assert "| Cosine to the original (`cosine`) | 0.9324 | 0.9289 to 0.9357 | 300 |" in text
    assert "| 1 × 64 | 9.10 ms | 8.20 ms | 1.11× |" in text
    assert "import eckart" in text
    assert "AutoModel.from_pretrained" in text


def test_the_card_without_an_evaluation_says_so() -> None:
    text = model_card(OUTCOME, None, base_name="x/y", title="T", command="c")
    assert "Not measured" in text
    assert "Latency was not measured" in text


def test_hostile_names_stay_text_in_the_card() -> None:
    bad = "<script>alert(1)</script> | ``` [a](javascript:x)"
    changed = replace(OUTCOME, notes=(bad,), method=bad)
    text = model_card(changed, replace(MEASURED, protocol={bad: bad}), base_name=bad, title=bad, command=bad)
    html = MarkdownIt("commonmark").render(text.split("---\n", 2)[2])
    assert "<script" not in html
    assert "<a " not in html


def test_a_plan_with_fences_stays_in_its_block() -> None:
    html = MarkdownIt("commonmark").render(card(plan_json='{"x": "```\\n<b>"}').split("---\n", 2)[2])
    assert "<b>" not in html


def test_sizes_of_nothing_do_not_divide_by_zero() -> None:
    nothing = Size(parameters=0, bytes=0, macs=0)
    empty = replace(OUTCOME, layers=(), sites_before=nothing, sites_after=nothing)
    assert "0 layers" in words(empty, None, "M")


@pytest.mark.parametrize(
    ("base", "shown"),
    [
        ("org/name", "`org/name`"),
        ("/home/me/my-model/", "`my-model`"),
        ("C:\\models\\bert", "`bert`"),
        ("/", "`/`"),
    ],
)
def test_the_card_does_not_name_the_folders_of_a_person(base: str, shown: str) -> None:
    text = card(base_name=base)
    assert f"Low-rank factorisation of {shown}," in text
    assert "/home/me" not in text
