"""The studio in a browser: every view is whole, accessible and narrow enough, growing runs move, keys work."""

import json
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

pytest.importorskip("starlette")

import uvicorn
from browsing import SIZES, keep_screenshot, serious
from helpers import tiny_config
from test_report import make_run, metrics_row
from test_studio import HOSTILE, hostile, root  # noqa: F401 - fixtures

from llmjax import config
from llmjax.serve.http import bind, configured
from llmjax.studio.app import Studio, make_app
from llmjax.studio.chat import Chat
from llmjax.studio.places import Places
from llmjax.sweep import study

pytestmark = pytest.mark.slow


@pytest.fixture
def url(hostile: Any, root: Path) -> Iterator[str]:  # noqa: F811
    """The studio of a folder in which every text of a run is an attack, and of a run that is being written."""
    live = make_run(root / "live", steps=20)
    (live / "train" / "results.json").unlink()
    (live / "config.json").write_text(config.to_json(tiny_config(train__duration="1000 steps")))
    chat = Chat(config.base(), hosts={"127.0.0.1"}, idle_seconds=60)
    with bind("127.0.0.1", 0) as listening:
        app = make_app(Studio(Places(root), chat), hosts={"127.0.0.1"})
        server = uvicorn.Server(configured(app, connections=64))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(30)


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    """A page that asks nothing but the studio, and whose scripts do not fail."""
    with browser.new_context(viewport=SIZES["wide"]) as context:
        found, asked, failed = context.new_page(), list[str](), list[str]()
        found.set_default_timeout(20_000)
        found.on("request", lambda request: asked.append(request.url))
        found.on("dialog", lambda dialog: failed.append(dialog.message))
        found.on("pageerror", lambda error: failed.append(str(error)))
        found.on("console", lambda message: message.type == "error" and failed.append(message.text))
        found.goto(url)
        yield found
        assert failed == []
        assert [one for one in asked if not one.startswith((url, "data:"))] == []


NAME = quote(f"{HOSTILE}&\"'")
# View -> (address, what is there when it is whole).
VIEWS = {
    "list": ("#/", "tr[data-name]"),
    "curves": (f"#/run?name={NAME}", ".plot path.line"),
    "facts": (f"#/run?name={NAME}&tab=facts", "meter"),
    "batch": (f"#/run?name={NAME}&tab=batch", ".token.learnt"),
    "samples": (f"#/run?name={NAME}&tab=samples", "td.text"),
    "rounds": (f"#/run?name={NAME}&tab=rounds", "td.text"),
    "settings": (f"#/run?name={NAME}&tab=settings", "#tab pre"),
    "compare": (f"#/compare?name={NAME}&name=other", "text=Settings that differ"),
    "study": ("#/study?name=study", "figure svg"),
    "chain": ("#/chain?name=chain", "td"),
    "data": (f"#/data?place=runs&name={NAME}", ".files a"),
    "rows": ("#/rows?place=runs&name=data.jsonl", "td.text"),
    "tokens": (f"#/rows?place=runs&name={NAME}%2Ftokenizer%2Ftokens%2Ftrain%2Fsources0", ".token.control"),
}


def test_every_view_is_whole_accessible_and_narrow_enough(page, url, tmp_path):
    found = []
    for name, (address, part) in VIEWS.items():
        for size, dark in (("wide", False), ("phone", True)):
            page.set_viewport_size(SIZES[size])
            page.emulate_media(color_scheme="dark" if dark else "light")
            page.goto("about:blank")
            page.goto(f"{url}/{address}")
            page.wait_for_selector(part)
            keep_screenshot(page, f"studio-{name}-{size}-{'dark' if dark else 'light'}", tmp_path)
            if page.evaluate("document.documentElement.scrollWidth - innerWidth") > 0:
                found.append(f"{name} ({size}) is too wide")
            found += [f"{name} ({size}): {one}" for one in serious(page)]
    assert found == []


def test_a_run_that_is_written_moves_without_a_reload(page, url, root):  # noqa: F811
    page.goto(f"{url}/#/run?name=live")
    page.wait_for_selector("text=step 20 of 1,000")
    with (root / "live" / "metrics.jsonl").open("a") as file:
        for step in range(21, 31):
            file.write(json.dumps(metrics_row(step, steps=1000)) + "\n")
        file.write('{"step": 31, "loss"')
    page.wait_for_selector("text=step 30 of 1,000")
    assert page.locator(".pill.running").count() == 1


def test_a_run_is_marked_and_found_by_its_tag(page, url, root, tmp_path):  # noqa: F811
    page.goto(f"{url}/#/run?name=other")
    page.get_by_text("Tags and note").click()
    page.get_by_role("textbox", name="Tags").fill("#good, seed-3")
    page.get_by_role("textbox", name="Note").fill("It spikes at step 12.")
    for size, scheme in (("wide", "light"), ("phone", "dark")):
        page.set_viewport_size(SIZES[size])
        page.emulate_media(color_scheme=scheme)
        keep_screenshot(page, f"studio-marks-{size}-{scheme}", tmp_path)
        assert serious(page) == [] and page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.get_by_role("button", name="Save").click()
    page.wait_for_selector("text=saved")
    assert json.loads((root / "other" / "marks.json").read_text()) == {"tags": ["good", "seed-3"], "note": "It spikes at step 12."}  # fmt: skip
    page.goto(f"{url}/#/")
    page.wait_for_selector("tr[data-name]")
    page.get_by_label("Filter").fill("#seed-3 spikes")
    page.wait_for_function("document.querySelectorAll('tr[data-name]').length === 1")
    assert page.locator("tr[data-name=other] .pill").all_inner_texts()[:2] == ["#good", "#seed-3"]
    assert serious(page) == []


def test_the_arms_of_a_study_have_a_band_and_a_plot_is_saved(page, url, root, tmp_path):  # noqa: F811
    found = study.read(root / "study")
    for number, trial in enumerate(found.trials):
        make_run(found.run_folder(trial), steps=20, level=1.0 + number / 10)
    page.goto(f"{url}/#/study?name=study")
    page.get_by_text("Curves of the arms").click()
    page.wait_for_selector(".plot path.area")
    for size, scheme in (("wide", "light"), ("phone", "dark")):
        page.set_viewport_size(SIZES[size])
        page.emulate_media(color_scheme=scheme)
        page.wait_for_selector(".plot path.area")
        keep_screenshot(page, f"studio-arms-{size}-{scheme}", tmp_path)
        assert serious(page) == [] and page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    with page.expect_download() as csv:
        page.get_by_role("button", name="Loss as CSV", exact=True).click()
    lines = csv.value.path().read_text().splitlines()
    assert (
        lines[0] == "line,step,value,low,high"
        and lines[1].startswith("a (")
        and csv.value.suggested_filename == "Loss.csv"
    )
    with page.expect_download() as picture:
        page.get_by_role("button", name="Loss as SVG", exact=True).click()
    tree = ElementTree.parse(picture.value.path()).getroot()
    assert (
        tree.tag.endswith("svg")
        and tree.get("width")
        and not [one for one in tree.iter() if one.tag.endswith(("script", "foreignObject"))]
    )
    (line,) = [one for one in tree.iter() if one.get("class") == "line s0"]
    assert line.get("stroke", "").startswith("rgb") and line.get("fill") == "none"


def test_the_keys_find_open_and_compare_runs(page, url):
    page.wait_for_selector("tr[data-name]")
    page.keyboard.press("/")
    page.keyboard.type("other")
    page.wait_for_function("document.querySelectorAll('tr[data-name]').length === 1")
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Curves")
    page.keyboard.press("]")
    page.wait_for_selector(".tile")
    assert page.locator(".tabs [aria-current=page]").inner_text() == "Facts"
    page.keyboard.press("g")
    page.wait_for_selector("tr[data-name]")
    for _ in range(2):
        page.keyboard.press("j")
        page.keyboard.press("x")
    page.locator("tr[data-name=other] input").check()
    page.locator("tr[data-name=live] input").check()
    page.keyboard.press("c")
    page.wait_for_selector("text=Settings that differ")
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
