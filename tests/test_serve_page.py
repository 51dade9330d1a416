"""The page shows a model's text as text: no markup of it lives, nothing is loaded, and what is cut is still shown."""

import html.parser
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")

from llmjax.serve.app import STATIC

HOSTILE = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<iframe srcdoc='<script>alert(1)</script>'>",
    "<svg/onload=alert(1)>", "<style>@import 'https://evil.example'</style>", "<a href='javascript:alert(1)'>a</a>",
    "[a](javascript:alert(1))", "[a](JaVaScRiPt:alert(1))", "[a](data:text/html,<script>alert(1)</script>)",
    "[a](vbscript:x)", "[a](&#106;avascript:alert(1))", "![x](https://evil.example/?q=secret)", "![x](javascript:alert(1))",
    "[![x](https://evil.example/a)](https://evil.example/b)", "```html\n<script>alert(1)</script>\n```",
    "$\\href{javascript:alert(1)}{x}$", "$$\\text{<img src=x onerror=alert(1)>}$$", "<base href=//evil.example>",
    "<form action=//evil.example><input></form>", "| a |\n|---|\n| <img src=x onerror=alert(1)> |", "[a](https://x'onmouseover=alert(1))",
    "# <script>x</script>", "> <iframe src=//evil.example>", "`<b>`", "[file](file:///etc/passwd)", "[a](blob:x)",
]  # fmt: skip
LONG = ["`" * 5000, "*" * 5000, "[" * 5000, "![" * 3000, "> " * 3000, "- " * 3000, "$" * 5001, "_a" * 3000, "{" * 3000, "$" + "{" * 3000 + "x$",
        "# " + "#" * 20000 + "x", "|" + "-" * 20000 + "x\n|" + "-" * 20000 + "x", "**a " * 3000, "\\(" * 2000, "http://" * 2000]  # fmt: skip
ELEMENTS = {
    "p", "div", "span", "pre", "code", "h3", "h4", "h5", "h6", "hr", "blockquote", "ul", "ol", "li", "table", "thead", "tbody",
    "tr", "th", "td", "strong", "em", "del", "a", "math", "mrow", "mi", "mo", "mn", "mtext", "msup", "msub", "msubsup", "mfrac",
    "msqrt", "mover", "mspace",
}  # fmt: skip
ATTRIBUTES = {"class", "href", "title", "rel", "target", "start", "display", "width", "linethickness", "tabindex"}
TEXTS = [
    "Hello **bold** and *soft*, `code`, ~~gone~~ \\*plain\\*.\nNext line",
    "## Title #\n\n1. one\n2. two\n   - inner\n\n---\n\n> quoted",
    "```python\nprint('a')\n```",
    "```js\nopen",
    "| a | b |\n|---|:-:|\n| 1 | *2* |",
    "[site](https://example.org/a_(b)) and https://example.org/x.",
    "Cost $5 and $6. Formula $x_1^2 + \\frac{a}{b}$, and\n\n$$\\sum_{i=1}^n i$$",
    "$\\unknown{x}$",
    "snake_case_name and 2 * 3 * 4",
]


def nodes(tree: Any) -> Iterator[list[Any]]:
    if isinstance(tree, list) and tree and isinstance(tree[0], str) and len(tree) > 1 and isinstance(tree[1], dict):
        yield tree
        tree = tree[2:]
    if isinstance(tree, list):
        for child in tree:
            yield from nodes(child)


@pytest.fixture(scope="module")
def shown() -> dict[str, Any]:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    damaged = ["", "{}", '{"chats": [{"title": "a", "nodes": [{"role": "root", "content": "", "parent": -1}]}]}',
               '{"chats": [{"title": "a", "nodes": [{"role": "user", "content": "", "parent": 0}]}]}']  # fmt: skip
    given = json.dumps({"texts": [*TEXTS, *HOSTILE, *LONG], "chats": damaged})
    script = Path(__file__).parent / "page.mjs"
    done = subprocess.run([node, script, STATIC], input=given, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_hostile_texts_become_nothing_that_runs_or_loads(shown):
    for text, tree in zip([*TEXTS, *HOSTILE, *LONG], shown["texts"], strict=True):
        for name, attributes, *_ in nodes(tree):
            assert name in ELEMENTS, (text, name)
            assert attributes.keys() <= ATTRIBUTES, (text, attributes)
            if "href" in attributes:
                assert attributes["href"].startswith(("https://", "http://", "mailto:")), text
                assert attributes["rel"] == "noopener noreferrer nofollow"


def test_an_image_becomes_a_link_that_names_its_host(shown):
    tree = shown["texts"][len(TEXTS) + HOSTILE.index("![x](https://evil.example/?q=secret)")]
    (link,) = [node for node in nodes(tree) if node[0] == "a"]
    assert link[2] == "[image at evil.example: x]"


def test_markdown_is_read(shown):
    trees = shown["texts"]
    names = [[node[0] for node in nodes(tree)] for tree in trees[: len(TEXTS)]]
    assert names[0] == ["p", "strong", "em", "code", "del"]
    assert names[1] == ["h4", "ol", "li", "li", "ul", "li", "hr", "blockquote", "p"]
    assert trees[2] == [["div", {"class": "code"}, ["pre", {"tabindex": "0"}, ["code", {}, "print('a')"]]]]
    assert trees[3] == [
        ["div", {"class": "code"}, ["pre", {"tabindex": "0"}, ["code", {}, "open"]]]
    ]  # a fence that is still open
    assert names[4] == ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td", "em"]
    assert [node[1]["href"] for node in nodes(trees[5]) if node[0] == "a"] == [
        "https://example.org/a_(b)",
        "https://example.org/x",
    ]
    assert names[6].count("math") == 2 and "mfrac" in names[6] and "msubsup" in names[6]
    assert names[7] == ["p", "code"] and names[8] == ["p"]


def test_a_text_that_grows_is_made_block_by_block_and_becomes_what_it_is_at_once(shown):
    assert shown["grown"] == shown["long"]


def test_edited_messages_are_branches_and_a_file_brings_them_back(shown):
    assert shown["branch"] == ["a", "c", "d"] and shown["other"] == ["a", "b"]
    (chat,) = shown["again"]["chats"]
    assert [(node["content"], node["parent"]) for node in chat["nodes"]] == [("a", -1), ("b", 0), ("c", 0), ("d", 2)]
    assert all(shown["refused"])


def test_a_table_is_text_and_its_csv_runs_nothing_in_a_spreadsheet(shown):
    assert shown["csv"] == 'a|b,c\r\n\'=1+1,"x""y,"\r\n,-3\r\n"<b>`|\n",\'-2\r\n'
    code = "````sql\nSELECT '```'\n````\n\n"
    assert shown["table"] == code + '| a\\|b | c |\n|---|---|\n| =1+1 | x"y, |\n| NULL | -3 |\n| <b>\\`\\|  | -2 |'


def test_what_a_user_is_asked_for_hides_nothing(shown):
    assert shown["arguments"] == [
        '{\n "to": "A\\u{202e}\u00fc\\n"\n}',
        '{"x": Infinity}',
        "\\u{200b}\\u{e0041}\\u{7}",
    ]


def test_each_of_two_personas_hears_the_other_as_its_user_and_a_file_keeps_that_they_are_simulations(shown):
    assert shown["heard"] == [
        [["user", "topic"], ["assistant", "(simulated) one"], ["user", "two"], ["assistant", "three"]],
        [["user", "one"], ["assistant", "(simulated) two"], ["user", "three"]],
    ]
    assert shown["talk"] == [None, "X", "Y", "X"] and "## x: simulates X\n" in shown["markdown"]


class Page(html.parser.HTMLParser):
    """The elements of the page, and whether they are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None], str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), "".join(self.open)))
        if tag not in ("meta", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            tag, attributes, path = self.elements[-1]
            self.elements[-1] = (tag, {**attributes, "_text": data.strip()}, path)


def test_the_page_is_whole_and_everything_on_it_has_a_name():
    page = Page()
    page.feed((STATIC / "index.html").read_text())
    assert page.open == []
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes, path in page.elements:
        if tag == "button" or (tag == "a"):
            assert attributes.get("aria-label") or attributes.get("_text"), attributes
        if tag in ("input", "textarea", "select"):
            labels = [one.get("for") for name, one, _ in page.elements if name == "label"]
            assert path.endswith("label") or attributes.get("aria-label") or attributes["id"] in labels, attributes
        for name in ("aria-controls", "aria-labelledby", "for"):
            assert attributes.get(name, ids[0]) in ids
    roles = {attributes["id"]: attributes for _, attributes, _ in page.elements if "id" in attributes}
    assert roles["log"]["role"] == "log" and roles["log"]["aria-live"] == "off"  # nobody hears every token
    assert roles["status"]["aria-live"] == "polite" and roles["error"]["role"] == "alert"
    script = "".join(path.read_text() for path in STATIC.glob("*.js"))
    assert {name for name in ids if f'"{name}"' not in script and name not in ("help-title", "settings")} == set()
