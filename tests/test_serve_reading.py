"""Files through the server's reader: their text, and a damaged, hostile or endless one is an error and costs nothing else."""

import base64
import zlib
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("llguidance")
pytest.importorskip("pypdfium2")

from serving import Client, language_model, serving, until
from test_prepare_extract import make_pdf, nested_forms

from llmjax.serve import reading
from llmjax.serve.server import READERS

TEXT = "The Vasa sank in 1628 before Stockholm."
MAIL = f"From: a@b.example\nSubject: Ships\nContent-Type: text/plain; charset=latin-1\n\n{TEXT} \xe9t\xe9\n".encode(
    "latin-1"
)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with serving(language_model(), make_engines=dict, keys=("first",)) as served:
        yield served


def read(client: Client, name: str, data: bytes) -> Any:
    body = {"name": name, "data": base64.b64encode(data).decode()}
    return client.post("/read", body, authorization="Bearer first")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("../../ships.PDF", make_pdf([[TEXT]])), ("a.eml", MAIL),
        ("a.html", f"<html><body><script>alert(1)</script><p>{TEXT} And it lay there for three hundred years.</p></body></html>".encode()),
    ],
)  # fmt: skip
def test_the_text_of_a_file_is_read(client, name, data):
    answer = read(client, name, data)
    assert answer.status == 200 and TEXT in answer.json["text"] and answer.json["name"] == name
    assert "alert" not in answer.json["text"] and ("\xe9t\xe9" in answer.json["text"]) == name.endswith("eml")


def test_a_damaged_file_is_a_clear_error(client):
    for name, data, reason in (
        ("a.pdf", b"%PDF-1.7 damaged", "pdf: broken"), ("a.pdf", make_pdf([[TEXT]])[:100], "pdf: broken"), ("a.pdf", b"", "empty"),
        ("a.html", b"\x00\x01\x02" * 50, ""), ("a.html", b"<p>", "html: no text"),
    ):  # fmt: skip
        answer = read(client, name, data)
        assert (
            answer.status == 400 and answer.error["code"] == "unreadable_file" and reason in answer.error["message"]
        ), name
        assert answer.error["message"].startswith("the file cannot be read: ")


def test_what_is_no_file_to_read_is_named(client):
    for name in ("a.exe", "a", "a.pdf.zip", "/etc/passwd", "a.pdf\0.exe"):
        assert read(client, name, b"x").error["param"] == "name", name
    answer = client.post("/read", {"name": "a.pdf", "data": "not base64!"}, authorization="Bearer first")
    assert answer.status == 400 and answer.error["param"] == "data"
    assert client.post("/read", {"name": "a.pdf", "data": ""}).status == 401
    assert read(client, "a.pdf", bytes(4 << 20)).status == 413


def test_a_file_that_takes_too_long_ends_and_so_does_that_of_a_client_that_leaves(client, monkeypatch):
    monkeypatch.setattr(reading, "SECONDS", 0.01)
    answer = read(client, "a.pdf", make_pdf([[TEXT]]))
    assert answer.status == 400 and "takes more than" in answer.error["message"]
    monkeypatch.setattr(reading, "SECONDS", 20.0)
    body = {"name": "a.pdf", "data": base64.b64encode(make_pdf([[TEXT]])).decode()}
    exchange = client.open("POST", "/read", body, {"authorization": "Bearer first"})
    assert until(lambda: client.server.admission.taken == 1)
    exchange.leave()
    assert until(lambda: client.server.admission.taken == 0) and client.server.readers._value == READERS


def test_memory_and_text_have_limits(client, monkeypatch):
    monkeypatch.setattr(reading, "TEXT_BYTES", 10)
    assert "its text has more than 10 bytes" in read(client, "a.pdf", make_pdf([[TEXT]])).error["message"]
    monkeypatch.setattr(reading, "TEXT_BYTES", 3 << 20)
    monkeypatch.setattr(reading, "MEMORY", 10 << 20)
    assert read(client, "a.pdf", make_pdf([[TEXT]])).error["code"] == "unreadable_file"


@pytest.mark.slow
@pytest.mark.parametrize("what", ["forms", "flate", "pages", "nested", "words"])
def test_a_bomb_ends_within_its_limits_and_the_server_goes_on(client, what):
    name, data = {
        "forms": lambda: ("a.pdf", nested_forms(40)),
        "flate": lambda: ("a.pdf", make_pdf([["x"]], raw=zlib.compress(b"BT (a) Tj ET " * 16_000_000, 9))),
        "pages": lambda: ("a.pdf", make_pdf([["x"]] * 6000)),
        "nested": lambda: ("a.html", b"<div>" * 500_000 + TEXT.encode()),
        "words": lambda: ("a.eml", b"Subject: " + b"=?utf-8?q?" * 200_000 + b"\n\nhello"),
    }[what]()
    answer = read(client, name, data)
    assert answer.status == 400 or what in ("nested", "words")
    assert answer.status in (200, 400) and (answer.status == 200 or answer.error["code"] == "unreadable_file")
    assert client.get("/health").json == {"status": "ok"}
    assert read(client, "a.pdf", make_pdf([[TEXT]])).status == 200
