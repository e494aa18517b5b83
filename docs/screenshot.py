"""Takes the pictures of README and docs.

python docs/screenshot.py eckart-demo/report.html             docs/images/report.png
python docs/screenshot.py inspected.html --name inspection    docs/images/inspection.png
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

IMAGES = Path(__file__).resolve().parent / "images"


def main() -> None:
    """Writes docs/images/NAME.png: from the verdict to the map, without the budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--name", default="report")
    asked = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    with sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 1840}, color_scheme="light")
        page.goto(asked.page.resolve().as_uri())
        page.add_style_tag(content="nav, #budget { display: none } header { padding-top: 2.5rem }")
        page.screenshot(path=IMAGES / f"{asked.name}.png")
        browser.close()


if __name__ == "__main__":
    main()
