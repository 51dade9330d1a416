"""Databases and agents on the page in a browser: rows or a refusal, steps and permissions, and nothing before the key."""

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("llguidance")

from browsing import SIZES, keep_screenshot, serious
from serving import Client, language_model, listening, scripted, serving
from test_prepare_extract import make_pdf
from test_serve_agent import ANSWER, TOOLS, step, use, world
from test_serve_browser import complete, press, send, shows, texts
from test_serve_page import HOSTILE

from llmjax.agents.react import Budget
from llmjax.agents.tools import load
from llmjax.serve import sources
from llmjax.serve.agent import Agents

pytestmark = pytest.mark.slow

SQL = "SELECT Id, Title, Length FROM Song"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, str]]:
    path: Path = tmp_path_factory.mktemp("db") / "songs.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE Song (Id INTEGER, Title TEXT, Length REAL)")
        titles = [
            *HOSTILE,
            "=HYPERLINK(1)",
            "\u202etfel ot thgir",
            "a | b `c`",
            None,
            *(f"Song {i}" for i in range(100)),
        ]
        db.executemany("INSERT INTO Song VALUES (?, ?, ?)", [(i, title, i * 1.5) for i, title in enumerate(titles)])
    db.close()
    tools = path.with_name("tools.py")
    tools.write_text(TOOLS)
    agents = Agents(load(tools), Budget(), False, path.with_name("transcript.jsonl"))
    found = [sources.database(path)]
    with (
        serving(language_model(), make_engines=dict, sources=found, agents=agents, keys=("secret",)) as client,
        listening(client) as port,
    ):
        yield client, f"http://127.0.0.1:{port}"


@pytest.fixture
def page(browser: Any, served: tuple[Client, str]) -> Iterator[Any]:
    """The page before the key is given."""
    with browser.new_context(viewport=SIZES["wide"]) as context:
        found, failed = context.new_page(), []
        found.set_default_timeout(60_000)
        found.on("pageerror", lambda error: failed.append(str(error)))
        found.goto(served[1])
        yield found
        assert failed == []


def give_key(page: Any) -> None:
    page.click("#open-settings")
    page.fill("#key", "secret")
    page.dispatch_event("#key", "change")
    page.locator("#source option").nth(1).wait_for(state="attached")
    page.click("#open-settings")


def test_nothing_of_a_database_is_on_the_page_before_the_key(page):
    shows(page.locator("#error"), "this server needs an API key")
    assert not page.is_visible("#source") and "songs" not in page.content()
    give_key(page)
    assert page.is_visible("#source") and page.locator("#source option").all_inner_texts() == [
        "the model",
        "songs (database)",
        "tools (agent)",
    ]


def test_a_question_gives_sql_and_rows_or_the_refusal(page, monkeypatch, tmp_path):
    give_key(page)
    page.select_option("#source", "songs")
    left = ["Song", SQL, "none"]
    with scripted(monkeypatch, lambda _: left.pop(0)):
        send(page, "Which songs are there?")
        complete(page)
        assert page.inner_text(".rows-view pre") == SQL
        assert page.locator(".rows th").all_inner_texts() == ["Id", "Title", "Length"]
        assert page.locator(".rows tbody tr").count() == 100
        assert page.locator(".rows td *").count() == 0  # hostile texts are texts
        assert page.locator(".rows td:nth-child(2)").all_text_contents()[: len(HOSTILE)] == HOSTILE
        press(page, "Show all rows")
        assert page.locator(".rows tbody tr").count() > 100
        with page.expect_download() as csv:
            press(page, "CSV")
        assert csv.value.suggested_filename == "songs.csv" and "'=HYPERLINK(1)" in csv.value.path().read_text()
        with page.expect_download() as transcript:
            press(page, "Transcript")
        assert json.loads(transcript.value.path().read_text())["answer"]["sql"] == SQL
        send(page, "What is the shoe size of Ana?")
        page.get_by_text("Not answered: the model found no table that holds the answer").wait_for()
    assert page.inner_text("#error") == "" and len(texts(page, "assistant")) == 2
    page.reload()  # the chat remembers its source and its table
    page.click("#open-chats")
    page.locator("#chat-list button").first.click()
    assert page.input_value("#source") == "songs" and page.locator(".rows tbody tr").count() == 100
    for size in SIZES:
        for theme in ("light", "dark"):
            page.set_viewport_size(SIZES[size])
            page.emulate_media(color_scheme=theme)
            if page.is_visible("#chats"):
                page.click("#open-chats")
            keep_screenshot(page, f"database-{size}-{theme}", tmp_path)
            assert serious(page) == []
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_an_agent_shows_its_steps_and_asks_before_it_writes(page, served, monkeypatch, tmp_path):
    give_key(page)
    page.select_option("#source", "tools")
    hidden = "Ann\u202e\U000e0041"  # turns around and hides what stands behind
    left = [use("look", where="mail"), use("send", to=hidden), use("send", to="Eve"), step(answer=HOSTILE[0])]
    sent = world(served[0])["SENT"]
    with scripted(monkeypatch, lambda _: left.pop(0)):
        send(page, "Write to Ann.")
        page.get_by_role("button", name="Allow").wait_for()
        shows(page.locator("#status"), "the model asks for your permission")
        assert "Ann\\u{202e}\\u{e0041}" in page.locator(".step pre").last.inner_text() and sent == []
        keep_screenshot(page, "permission-wide", tmp_path)
        assert serious(page) == []
        press(page, "Allow")
        page.get_by_text("agreed").wait_for()
        press(page, "Deny")
        complete(page)
    assert sent == [hidden] and page.inner_text("#error") == ""
    assert page.locator(".step").count() == 3 and page.locator(".step.failed").count() == 1
    assert texts(page, "assistant") == [HOSTILE[0]] and page.locator(".steps script, .text script").count() == 0
    assert (
        "written after reading what others may have written: look"
        in page.locator("article.assistant .tools").inner_text()
    )
    with page.expect_download() as transcript:
        press(page, "Transcript")
    assert [one["verdict"] for one in json.loads(transcript.value.path().read_text())["answer"]["steps"]] == [
        "allowed",
        "agreed",
        "denied",
    ]
    page.locator("summary").first.click()
    for size in SIZES:
        for theme in ("light", "dark"):
            page.set_viewport_size(SIZES[size])
            page.emulate_media(color_scheme=theme)
            keep_screenshot(page, f"agent-{size}-{theme}", tmp_path)
            assert serious(page) == []
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_stopped_agent_is_denied_what_it_asked_for(page, served, monkeypatch):
    give_key(page)
    page.select_option("#source", "tools")
    count = len(world(served[0])["SENT"])
    left = [use("send", to="Ann"), ANSWER]
    with scripted(monkeypatch, lambda _: left.pop(0)):
        send(page, "Write to Ann.")
        page.get_by_role("button", name="Allow").wait_for()
        page.keyboard.press("Escape")
        complete(page)
    assert page.inner_text("#status") == "answer stopped" and "not answered" in page.locator(".step").inner_text()
    assert page.get_by_role("button", name="Allow").count() == 0 and len(world(served[0])["SENT"]) == count


def test_a_pdf_becomes_a_file_to_ask_about_and_a_damaged_one_an_error(page, monkeypatch):
    give_key(page)
    given = {"mimeType": "application/pdf", "name": "ships.pdf", "buffer": make_pdf([["The Vasa sank in 1628."]])}
    page.set_input_files("#attached", [given, {**given, "name": "broken.pdf", "buffer": b"%PDF-1.7 no"}])
    page.get_by_text("ships.pdf, ").wait_for()
    shows(page.locator("#error"), "broken.pdf: the file cannot be read: pdf: broken")
    with scripted(monkeypatch, lambda _: '[1] "The Vasa sank in 1628." It sank in 1628.'):
        send(page, "When did the Vasa sink?")
        complete(page)
    assert texts(page, "assistant") == ["It sank in 1628. [1]"]
    press(page, "[1] ships.pdf")
    assert page.inner_text(".passage mark") == "The Vasa sank in 1628."
