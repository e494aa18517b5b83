"""The report page in headless Chromium: no errors, everything works, nothing sticks out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sample_runs
from test_report_page import page_of

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = os.environ.get("ECKART_CHROMIUM") or shutil.which("chromium")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is missing (Debian: apt install chromium, or set ECKART_CHROMIUM)"
)

OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
VISIBLE = "rows => rows.filter(row => row.offsetParent !== null).length"


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with playwright.sync_playwright() as tools:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        found = tools.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield found
        found.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    outcome, curves = sample_runs.minilm()
    many, more = sample_runs.llama(32)
    long, far = sample_runs.minilm(hostile="_a_very_long_name_without_a_break" * 4)
    bad, worse = sample_runs.minilm(hostile="<script>alert(1)</script>")
    written = {
        "minilm": page_of(outcome, curves),
        "many": page_of(many, more, evaluation=sample_runs.language_evaluation(many)),
        "long": page_of(replace(long, notes=("x" * 300,)), far, title="y" * 200, command="z" * 400),
        "hostile": page_of(bad, worse, title="<script>alert(1)</script>"),
    }
    for name, text in written.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in written}


@pytest.fixture
def visit(browser, pages):
    """Opens a page; fails at the end if it wrote to the console, threw, or asked for anything but itself."""
    contexts, complaints = [], []

    def go(name: str, *, width: int = 1280, **settings):
        context = browser.new_context(viewport={"width": width, "height": 900}, **settings)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append("dialog"), dialog.dismiss()))
        address = pages[name].as_uri()
        page.on("request", lambda r: None if r.url.split("#")[0] == address else complaints.append(r.url))
        page.goto(address)
        return page

    yield go
    for context in contexts:
        context.close()
    assert complaints == []


def shown(page) -> int:
    return page.eval_on_selector_all(".layers tbody tr[data-i]", VISIBLE)


def column(page, number: int) -> list[str]:
    return page.locator(f".layers tbody tr[data-i] > :nth-child({number})").all_text_contents()


@pytest.mark.parametrize("name", ["minilm", "many", "long", "hostile"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [380, 800, 1280])
def test_no_page_is_wider_than_its_window(visit, name: str, scheme: str, width: int) -> None:
    page = visit(name, width=width, color_scheme=scheme)
    assert page.evaluate(OVERFLOW) == 0


def test_dark_is_dark_and_light_is_light(visit) -> None:
    background = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)"
    assert max(visit("minilm", color_scheme="dark").evaluate(background)) < 60
    assert min(visit("minilm", color_scheme="light").evaluate(background)) > 230


def test_sorting_goes_both_ways_and_keeps_every_row(visit) -> None:
    page = visit("minilm")
    heading = page.locator(".layers thead th").nth(4)
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    kept = [float(text.split()[0]) for text in column(page, 5)]
    assert kept == sorted(kept)
    assert len(kept) == 36
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    assert [float(text.split()[0]) for text in column(page, 5)] == sorted(kept, reverse=True)


def test_sorting_puts_layers_without_a_figure_last(visit) -> None:
    page = visit("minilm")
    button = page.locator(".layers thead th").nth(5).locator("button")
    for _ in range(2):
        button.click()
        assert column(page, 6)[-1] == "–"


def test_names_sort_by_their_numbers(visit) -> None:
    page = visit("many")
    page.locator(".layers thead th").first.locator("button").click()
    names = column(page, 1)
    assert names[0].startswith("model.layers.0.")
    assert names[-1].startswith("model.layers.31.")
    assert [int(name.split(".")[2]) for name in names] == sorted(int(name.split(".")[2]) for name in names)


def test_the_search_filters_and_show_all_brings_back(visit) -> None:
    page = visit("minilm")
    page.fill("#find", "SELF.query")
    assert shown(page) == 6
    assert page.text_content("#shown") == "6 of 36 layers"
    assert page.locator(".map a.faded").count() == 30
    assert page.locator(".line.out").count() == 30
    page.fill("#find", "nothing is called this")
    assert shown(page) == 0
    assert page.locator("tr.none").is_visible()
    page.click("#reset")
    assert shown(page) == 36


def test_the_form_filters(visit) -> None:
    page = visit("minilm")
    outcome, _ = sample_runs.minilm()
    for form in ("dense", "lowrank", "pivoted"):
        page.select_option("#form", form)
        assert shown(page) == sum(layer.form == form for layer in outcome.layers)


def test_the_map_filters_by_cell_row_and_column(visit) -> None:
    page = visit("minilm")
    page.locator(".map a").nth(7).click()
    assert shown(page) == 1
    page.locator(".map a").nth(7).click()
    assert shown(page) == 36
    page.locator(".map tbody th button").nth(2).click()
    assert shown(page) == 6
    page.locator(".map thead th button").nth(3).click()
    assert shown(page) == 6
    assert all(".3." in text for text in page.locator(".layers tbody tr:not([hidden]) th").all_text_contents())


def test_the_map_works_by_keyboard(visit) -> None:
    page = visit("minilm")
    assert page.locator('.map a[tabindex="0"]').count() == 1
    page.locator(".map a").first.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp", "ArrowUp"):
        page.keyboard.press(key)
    focused = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert focused.startswith("encoder.layer.1.attention.self.query")
    page.keyboard.press("Enter")
    assert shown(page) == 1


def test_without_a_script_everything_is_there(visit) -> None:
    page = visit("minilm", java_script_enabled=False)
    assert page.locator(".layers tbody tr[data-i]").count() == 36
    assert page.locator(".layers tbody tr[data-i]").last.is_visible()
    assert page.locator(".line").count() == 36
    assert not page.locator(".controls").is_visible()
    page.locator(".map a").nth(7).click()
    assert page.url.endswith("#" + page.locator(".layers tbody tr:target").get_attribute("id"))


def test_copy_copies_the_command(visit) -> None:
    page = visit("minilm", permissions=["clipboard-read", "clipboard-write"])
    page.locator("[data-copy=command]").click()
    page.wait_for_function("document.querySelector('[data-copy=command]').textContent === 'Copied'")


def test_every_control_has_a_name(visit) -> None:
    page = visit("minilm")
    unnamed = page.eval_on_selector_all(
        "a, button, input, select, [role=region], [role=img]",
        "all => all.filter(e => !(e.getAttribute('aria-label') || e.textContent.trim()"
        " || (e.labels && e.labels.length))).map(e => e.outerHTML)",
    )
    assert unnamed == []


def test_a_hostile_name_does_not_run(visit) -> None:
    page = visit("hostile")
    assert page.locator("h1").text_content() == "<script>alert(1)</script>"
    assert page.locator("script").count() == 1
