"""Takes the README's picture of a report: python docs/screenshot.py eckart-demo/report.html"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

IMAGE = Path(__file__).resolve().parent / "images" / "report.png"


def main() -> None:
    """Writes docs/images/report.png: from the verdict to the map, without the budget."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    report: Path = parser.parse_args().report
    IMAGE.parent.mkdir(exist_ok=True)
    with sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 1840}, color_scheme="light")
        page.goto(report.resolve().as_uri())
        page.add_style_tag(content="nav, #budget { display: none } header { padding-top: 2.5rem }")
        page.screenshot(path=IMAGE)
        browser.close()


if __name__ == "__main__":
    main()
