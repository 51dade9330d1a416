"""The server refuses what attackers send, within the limits that are its own, and keeps on answering."""

import asyncio
import json
from pathlib import Path

import pytest

pytest.importorskip("starlette")

from serving import GREEDY, language_model, serving, until

from llmjax import cli
from llmjax.infer.engine import Engine
from llmjax.serve import calls, messages
from llmjax.serve.app import PAGE_HEADERS, STATIC
from llmjax.serve.refusals import Refusal
from llmjax.serve.tickets import MOST_BUFFERED


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory):
    with serving(language_model(), feedback=tmp_path_factory.mktemp("serve") / "preferences.jsonl") as made:
        yield made


@pytest.fixture(scope="module")
def locked():
    with serving(language_model(), keys=["first", "second"], per_key=2) as made:
        yield made


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200), ("localhost", 200), ("LOCALHOST:1", 200), ("[::1]:8000", 200), ("evil.example", 403),
        ("127.0.0.1.evil.example", 403), ("localhost.", 403), ("", 403), ("-", 400),
    ],
)  # fmt: skip
def test_only_the_servers_own_names_are_answered(client, host, status):
    assert client.get("/v1/models", host=host).status == status


def test_pages_of_other_sites_may_not_ask(client):
    assert client.get("/v1/models", origin="http://127.0.0.1:8000").status == 200
    for origin in ("http://evil.example", "null", "http://localhost:9", "https://127.0.0.1:8000.evil.example"):
        assert client.get("/v1/models", origin=origin).status == 403
        assert client.post("/feedback", {"prompt": [], "completion": "a", "label": True}, origin=origin).status == 403
    with serving(language_model(), origins=("https://good.example",)) as open_:
        answer = open_.get("/v1/models", origin="https://good.example")
        assert answer.headers["access-control-allow-origin"] == "https://good.example"
        assert "access-control-allow-credentials" not in answer.headers
        asked = open_.open("OPTIONS", "/v1/models", headers={"origin": "https://good.example"}).wait()
        assert asked.status == 204 and asked.headers["access-control-allow-methods"] == "GET, POST"
        assert open_.get("/v1/models", origin="https://evil.example").status == 403


def test_a_key_is_needed_on_every_path_but_health_and_the_page(locked):
    for path in ("/v1/models", "/sources", "/metrics", "/ready", "/tokenizer_info", "/nowhere"):
        assert locked.get(path).status == 401
        assert locked.get(path, authorization="Bearer wrong").status == 401
        assert locked.get(path, authorization="Basic first").status == 401
        assert locked.get(f"{path}?key=first").status == 401
    assert locked.get("/health").status == locked.get("/").status == 200
    for key in ("first", "second"):
        assert locked.get("/v1/models", authorization=f"Bearer {key}").status == 200
    assert locked.get("/v1/models", authorization="Bearer \xe9").error["code"] == "invalid_api_key"


@pytest.mark.parametrize("key", ["", " ", "a b", "\u00e9"])
def test_a_key_that_protects_nothing_is_refused(key, capsys):
    """Such as that of a variable which is not set: anybody would have it."""
    run = Path(__file__).parent / "fixtures" / "run_c4ef595"
    assert cli.main(["serve", "--workdir", str(run), "--config.serve.host=0.0.0.0", "--api-key", key]) == 2
    assert "an API key is empty, or has other characters" in capsys.readouterr().err


def test_a_key_has_its_own_limit(locked):
    body = {"prompt": "hi", "max_tokens": 400, "logit_bias": {"2": -100}, "n": 2}
    first = locked.open("POST", "/v1/completions", body, {"authorization": "Bearer first"})
    assert until(lambda: locked.server.admission.taken == 2)
    assert locked.post("/v1/completions", body, authorization="Bearer first").status == 429
    short = {**body, "max_tokens": 1}
    assert locked.post("/v1/completions", short, authorization="Bearer second").status == 200
    first.leave()


@pytest.mark.parametrize(
    "path",
    [
        "/../app.py",
        "/..%2fapp.py",
        "/static/../app.py",
        "//etc/passwd",
        "/index.html%00.js",
        "/\\..\\app.py",
        "/app.py",
    ],
)
def test_no_path_leads_out_of_the_page(client, path):
    assert client.get(path).status == 404


def test_the_page_loads_nothing_from_outside(client):
    files = sorted(STATIC.iterdir())
    assert {path.suffix for path in files} <= {".html", ".js", ".css"}
    for path in files:
        text = path.read_text().replace("http://www.w3.org/", "")  # names of MathML and SVG
        for pattern in (
            "http://",
            "https://",
            "<script>",
            "onclick=",
            "onload=",
            "javascript:",
            "@import",
            "style=",
            "eval(",
            "innerHTML",
            "document.write",
        ):
            assert pattern not in text, (path, pattern)
    answer = client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.headers.items() >= PAGE_HEADERS.items()
    assert "default-src 'none'" in PAGE_HEADERS["content-security-policy"]
    for path in files:
        assert client.get(f"/{path.name}").status == 200


def test_a_body_has_a_largest_size_and_a_longest_time(client, monkeypatch):
    assert client.post("/v1/completions", b" " * (calls.BODY_BYTES + 1)).error["code"] == "request_too_large"
    monkeypatch.setattr(calls, "BODY_SECONDS", 0.05)

    async def never() -> dict:
        await asyncio.sleep(60)
        raise AssertionError

    async def slow() -> int:
        scope = {"method": "POST", "headers": [(b"content-type", b"application/json")]}
        with pytest.raises(Refusal) as refusal:
            await calls._body(scope, never)
        return refusal.value.status

    assert client.run(slow()) == 408


def test_expressions_that_take_others_forever_end_here(client):
    for regex in ("(a+)+b", "(.*a){20}", ".*a.{60}"):
        assert client.chat(structured_outputs={"regex": regex}, max_tokens=4).status == 200
    deep = {"type": "object"}
    for _ in range(30):
        deep = {"type": "object", "properties": {"a": deep}}
    form = {"type": "json_schema", "json_schema": {"schema": deep}}
    assert client.chat(response_format=form).status in (200, 400)
    remote = {"type": "json_schema", "json_schema": {"schema": {"$ref": "https://evil.example/schema.json"}}}
    assert client.chat(response_format=remote).status == 400
    assert client.chat(structured_outputs={"regex": "a" * 70_000}).status == 400
    assert client.chat(**GREEDY).status == 200


def test_special_tokens_in_a_message_are_mere_characters(client):
    ids = client.post("/tokenize", {"messages": [{"role": "user", "content": "<eos><bos>"}]}).json["tokens"]
    assert 1 not in ids and 2 not in ids


def test_depth_is_counted_outside_of_texts_only():
    assert messages.parse(json.dumps({"a": "[" * 1000 + '"\\'}).encode()) == {"a": "[" * 1000 + '"\\'}
    with pytest.raises(Refusal):
        messages.parse(b'{"a":"\\\\"' + b',"b":' + b"[" * 70)


def test_a_text_without_an_end_is_looked_at_once(client):
    assert (
        messages.QUOTED.sub("", '[1, "a\\\\", "b' + '\\"' * 5) == "[1, , "
    )  # from its first quote to the end of the body
    assert messages.QUOTED.sub("", '"a\\') == ""
    answer = client.post("/v1/completions", b'{"prompt": "' + b'\\"' * 1_000_000)
    assert answer.status == 400 and answer.error["code"] == "invalid_json"


def test_a_body_that_is_packed_is_refused_by_name(client):
    answer = client.post("/v1/completions", b"\x1f\x8b\x08", **{"content-encoding": "gzip"})
    assert answer.status == 415 and "gzip" in answer.error["message"]


def test_a_reader_that_is_too_slow_is_cut_off(client):
    body = {"prompt": "hi", "max_tokens": 500, "logit_bias": {"2": -100}, "stream": True, "n": 8}
    exchange = client.open("POST", "/v1/completions", body, reads=False)
    assert until(lambda: client.server.admission.taken == 8)
    buffered = lambda: max((len(t._events) for t in client.server._tickets), default=0)  # noqa: E731
    assert until(lambda: buffered() > MOST_BUFFERED)
    client.loop.call_soon_threadsafe(exchange.held.set)
    exchange.wait()
    assert until(lambda: client.server.admission.taken == 0 and client.server.worker.texts == 0)
    assert exchange.chunks[-1]["error"]["code"] == "slow_reader"


def test_deadlines_end_an_answer(client):
    with serving(language_model(), seconds=0.05) as hasty:
        body = {"prompt": "hi", "max_tokens": 500, "logit_bias": {"2": -100}}
        answer = hasty.post("/v1/completions", {**body, "n": 8})
        assert answer.status == 504 and answer.error["code"] == "deadline_exceeded"
        assert answer.headers["x-should-retry"] == "false"
        assert until(lambda: hasty.server.worker.texts == 0)


def test_a_step_that_fails_fails_its_texts_and_the_engine_goes_on(client, monkeypatch):
    expected = client.chat(**GREEDY).json["choices"]
    step, failed = Engine.step, []

    def fail_once(self: Engine, *arguments: object) -> object:
        if not failed and self.busy:
            failed.append(1)
            raise RuntimeError("memory")
        return step(self, *arguments)

    monkeypatch.setattr(Engine, "step", fail_once)
    answer = client.chat(**GREEDY)
    assert answer.status == 500 and answer.error["code"] == "engine_error"
    assert client.chat(**GREEDY).json["choices"] == expected


def test_a_server_whose_engine_is_lost_says_so():
    def broken() -> dict:
        raise MemoryError

    with serving(language_model(), make_engines=broken) as lost:
        assert lost.get("/ready").status == lost.get("/health").status == lost.chat().status == 503


def test_rated_answers_become_rows_that_training_reads(client):
    from llmjax.data.conversations import Row, read

    asked = [{"role": "user", "content": "hi"}]
    assert client.post("/feedback", {"prompt": asked, "chosen": "a", "rejected": "b"}).status == 200
    assert client.post("/feedback", {"prompt": asked, "completion": "a", "label": True}).status == 200
    assert client.post("/feedback", {"prompt": asked}).status == 400
    for wrong in (
        {"prompt": []},
        {"prompt": [{"a": "b"}]},
        {"prompt": [{"role": "x", "content": "b"}]},
        {"completion": ""},
    ):
        answer = client.post("/feedback", {"prompt": asked, "completion": "a", "label": True, **wrong})
        assert answer.status == 400 and "no training would read this row" in answer.error["message"]
    assert client.post("/feedback", {"prompt": asked, "chosen": "a", "rejected": "a"}).status == 400
    folder = client.server.feedback.parent
    for name in ("preferences.jsonl", "ratings.jsonl"):
        (row,) = read(folder / name)
        assert isinstance(row, Row)
