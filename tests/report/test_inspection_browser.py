"""The inspection page in headless Chromium: no errors, everything works, nothing sticks out."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import sample_inspections
from test_report_browser import CHROMIUM, OVERFLOW, VISIBLE, playwright

from eckart.report import render_inspection

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is missing (Debian: apt install chromium, or set ECKART_CHROMIUM)"
)


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
    found = {
        "minilm": sample_inspections.minilm(panels=sample_inspections.PANELS),
        "seven": sample_inspections.seven_billion(),
        "quick": sample_inspections.minilm(tier="quick"),
        "long": sample_inspections.minilm(hostile="_a_very_long_name_without_a_break" * 4, title="y" * 200),
        "hostile": sample_inspections.minilm(hostile="</script><script>alert(1)</script>", title="<b>t</b>"),
    }
    for name, inspection in found.items():
        (folder / f"{name}.html").write_text(render_inspection(inspection), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in found}


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
        own = (address, "blob:")  # a download is made by the page itself
        page.on("request", lambda r: None if r.url.startswith(own) else complaints.append(r.url))
        page.goto(address)
        return page

    yield go
    for context in contexts:
        context.close()
    assert complaints == []


def shown(page) -> int:
    return page.eval_on_selector_all(".layers tbody tr[data-i]", VISIBLE)


@pytest.mark.parametrize("name", ["minilm", "seven", "quick", "long", "hostile"])
@pytest.mark.parametrize("width", [380, 1280])
def test_no_page_is_wider_than_its_window(visit, name: str, width: int) -> None:
    assert visit(name, width=width, color_scheme="dark" if width == 380 else "light").evaluate(OVERFLOW) == 0


def test_the_table_sorts_filters_and_comes_back(visit) -> None:
    page = visit("minilm")
    assert shown(page) == 43
    page.locator(".layers thead th").nth(3).locator("button").click()
    stable = [
        float(text)
        for text in page.locator(".layers tbody tr[data-i]:not([data-skipped]) > :nth-child(4)").all_text_contents()
    ]
    assert stable == sorted(stable)
    page.fill("#find", "self.QUERY")
    assert shown(page) == 6
    page.select_option("#which", "noted")
    assert 0 < shown(page) < 6
    page.click("#reset")
    page.select_option("#which", "skipped")
    assert shown(page) == 6
    page.select_option("#which", "measured")
    assert shown(page) == 37


def test_the_map_filters_and_findings_lead_to_their_weights(visit) -> None:
    page = visit("minilm")
    page.locator(".map a").nth(3).click()
    assert shown(page) == 1
    page.locator(".map a").nth(3).click()
    page.locator(".map tbody th button").first.click()
    assert shown(page) == 6
    page.click("#reset")
    page.locator(".findings .jump").first.click()
    assert shown(page) == 3


def test_one_weight_is_drawn_and_read_off(visit) -> None:
    page = visit("minilm")
    assert page.locator("#drawings svg").count() == 3
    page.locator(".layers tbody th button").nth(5).click()
    name = page.locator(".layers tbody tr.open th").text_content()
    assert page.locator("#weight option:checked").text_content().removesuffix(".weight") in name
    page.locator("#drawings svg").first.hover()
    assert page.text_content("#reading").startswith("Direction ")
    assert "%" in page.text_content("#reading")
    assert page.locator("#figures dt", has_text="Stable rank").count() == 1
    page.select_option("#weight", index=2)
    assert page.locator("#drawings .sigma").count() == 2


def test_the_quick_tier_has_figures_and_no_drawings(visit) -> None:
    page = visit("quick")
    assert page.locator("#drawings svg").count() == 0
    assert page.locator("#figures dt").count() == 4


def test_downloads_hold_every_tensor(visit, tmp_path) -> None:
    page = visit("minilm", accept_downloads=True)
    found = sample_inspections.minilm()
    for kind in ("csv", "json"):
        with page.expect_download() as waiting:
            page.click(f"[data-download={kind}]")
        waiting.value.save_as(tmp_path / kind)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "csv").read_text())))
    assert {row["name"] for row in rows} == {facts.name for facts in found.matrices}
    table = {row["name"]: row for row in rows}
    first = next(facts for facts in found.matrices if not facts.skipped)
    assert float(table[first.name]["stable_rank"]) == pytest.approx(first.findings["stable_rank"].value, rel=1e-5)
    content = json.loads((tmp_path / "json").read_text())
    assert len(content["weights"]) == len(found.matrices)
    assert content["weights"][0]["findings"]["distance_from_noise"]["notes"] == ["the tail starts at the median"]


def test_without_a_script_everything_but_the_drawings_is_there(visit) -> None:
    page = visit("minilm", java_script_enabled=False)
    assert page.locator(".layers tbody tr[data-i]").last.is_visible()
    assert page.locator(".spark").count() == 37
    assert page.locator(".plot").count() == 2
    assert not page.locator("#detail").is_visible()
    assert not page.locator(".controls").is_visible()
    assert "need the script" in page.locator("noscript").text_content()


def test_every_control_has_a_name(visit) -> None:
    unnamed = visit("minilm").eval_on_selector_all(
        "a, button, input, select, [role=region], [role=img]",
        "all => all.filter(e => !(e.getAttribute('aria-label') || e.textContent.trim()"
        " || (e.labels && e.labels.length))).map(e => e.outerHTML)",
    )
    assert unnamed == []


def test_hostile_names_do_not_run(visit) -> None:
    page = visit("hostile")
    assert page.locator("h1").text_content() == "<b>t</b>"
    assert page.locator("script").count() == 2
    assert page.locator(".map a").count() == 36
