"""A browser for tests of pages: Chromium of this machine, driven by Playwright, and axe's findings on a page.

`make test-browser` installs Playwright and axe; Chromium is the system's (Debian: apt install chromium).
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SIZES = {"wide": {"width": 1280, "height": 800}, "phone": {"width": 360, "height": 740}}
SCREENSHOTS = "LLMJAX_SCREENSHOTS"  # environment variable: the folder that keeps screenshots


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium; the test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="make test-browser installs Playwright")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no browser: install one of {', '.join(NAMES)}")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


def serious(page: Any) -> list[str]:
    """What axe finds on a page that is serious or critical."""
    package = pytest.importorskip("axe_playwright_python", reason="make test-browser installs axe")
    page.evaluate((Path(package.__file__).parent / "axe.min.js").read_text())
    found = page.evaluate("axe.run()")["violations"]
    return [
        f"{one['id']}: {one['help']}: {[node['html'] for node in one['nodes']]}"
        for one in found
        if one["impact"] in ("serious", "critical")
    ]


def keep_screenshot(page: Any, name: str, folder: Path) -> None:
    """Keep a picture of what a page shows."""
    kept = Path(os.environ.get(SCREENSHOTS, folder))
    kept.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=kept / f"{name}.png")
