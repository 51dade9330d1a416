"""A client that leaves frees what it has: of its prompt no further chunk is read, of its texts no further batch is computed."""

import json
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

pytest.importorskip("starlette")
pytest.importorskip("llguidance")

from serving import Client, Exchange, language_model, serving, until

from llmjax.agents.react import Budget
from llmjax.agents.tools import from_function
from llmjax.infer import constrained, given
from llmjax.infer.engine import Engine
from llmjax.infer.scheduler import Read
from llmjax.serve import sources
from llmjax.serve.agent import Agents

LONG = "word " * 300  # chunks of 256 bytes


def look(where: str) -> str:
    """Look somewhere."""
    return "nothing"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder: Path = tmp_path_factory.mktemp("leaving")
    with sqlite3.connect(folder / "songs.sqlite") as db:
        db.execute(f"CREATE TABLE Song (Id INTEGER, Title TEXT, {', '.join(f'Column{i} INTEGER' for i in range(30))})")
    db.close()
    agents = Agents([from_function(look, effect="read")], Budget(), False, folder / "transcript.jsonl")
    found = [sources.database(folder / "songs.sqlite")]
    with serving(language_model(model__max_length=2048), slots=2, sources=found, agents=agents) as served:
        yield served


class Hook:
    """A place in the engines' thread that is reached: it waits there until `go_on`."""

    def __init__(self) -> None:
        self.times = 0
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.times += 1
        self.reached.set()
        assert self.go_on.wait(60)


def left(client: Client, hook: Hook, exchange: Exchange) -> None:
    """Leave at the hook; the places are free while the thread is still there."""
    assert hook.reached.wait(60), exchange.wait().text
    exchange.leave()
    assert until(lambda: client.server.admission.taken == 0)
    hook.go_on.set()
    assert until(lambda: not client.server.worker.texts and not client.server.worker.engines["tiny"].busy)
    client.run(client.server.worker.call(lambda: None))


MESSAGES = [{"role": "user", "content": LONG}]
PROMPTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": MESSAGES}),
    "stream": ("/v1/chat/completions", {"messages": MESSAGES, "stream": True}),
    "constrained": ("/v1/chat/completions", {"messages": MESSAGES, "response_format": {"type": "json_object"}}),
    "completions": ("/v1/completions", {"prompt": LONG}),
    "responses": ("/v1/responses", {"input": LONG}),
    "documents": ("/ask", {"question": "Which word?", "files": [{"name": "a.txt", "text": LONG}]}),
    "database": ("/ask", {"question": "Which titles are there?", "source": "songs"}),
    "chat about a source": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "Which titles are there?"}], "source": "songs"},
    ),
    "agent": ("/agent", {"goal": "Look here."}),
    "agent, streaming": ("/agent", {"goal": "Look there.", "stream": True}),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_the_prompt_of_a_client_that_left_is_read_no_further_than_its_chunk(client, monkeypatch, name):
    path, body = PROMPTS[name]
    hook, do = Hook(), Engine._do

    def held(engine: Engine, action: Any) -> None:
        do(engine, action)
        if isinstance(action, Read):
            hook()

    engine = client.server.worker.engines["tiny"]
    client.run(client.server.worker.call(engine._scheduler.prefixes.forget))
    monkeypatch.setattr(Engine, "_do", held)
    left(client, hook, client.open("POST", path, body))
    assert hook.times == 1


TEXTS = [f"text {number}" for number in range(3 * given.ROWS)]
COMPUTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "embeddings": ("/v1/embeddings", {"input": TEXTS}, "_means"),
    "rerank": ("/v1/rerank", {"query": "text", "documents": TEXTS}, "_means"),
    "echo": ("/v1/completions", {"prompt": TEXTS[:10], "echo": True, "logprobs": 0, "max_tokens": 0}, "_scores"),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_the_texts_of_a_client_that_left_are_computed_no_further_than_their_batch(client, monkeypatch, name):
    path, body, program = COMPUTED[name]
    hook, run = Hook(), getattr(given, program)

    def held(*arguments: Any, **settings: Any) -> Any:
        hook()
        return run(*arguments, **settings)

    held.lower = run.lower
    monkeypatch.setattr(given, program, held)
    left(client, hook, client.open("POST", path, body))
    monkeypatch.setattr(given, program, run)
    assert client.post(path, body).status == 200 and hook.times == 1


def test_texts_are_written_between_the_batches_of_others(client, monkeypatch):
    hook, run, step, order = Hook(), given._means, Engine.step, list[str]()

    def held(*arguments: Any) -> Any:
        order.append("batch")
        hook()
        return run(*arguments)

    held.lower = run.lower

    def stepped(engine: Engine, *arguments: Any) -> Any:
        order.append("step")
        return step(engine, *arguments)

    monkeypatch.setattr(given, "_means", held)
    monkeypatch.setattr(Engine, "step", stepped)
    vectors = client.open("POST", "/v1/embeddings", {"input": TEXTS})
    assert hook.reached.wait(60)
    text = client.open("POST", "/v1/completions", {"prompt": "hi", "max_tokens": 1})
    assert until(lambda: client.server.worker._inbox.qsize() == 1)
    hook.go_on.set()
    assert text.wait().status == vectors.wait().status == 200
    assert order.count("batch") == 3 and "step" in order[: len(order) - order[::-1].index("batch")]


@pytest.mark.parametrize("name", ["embeddings", "echo"])
def test_texts_are_written_while_the_program_of_a_new_shape_is_compiled(client, monkeypatch, name):
    """And nothing is left to compile for the thread that writes them."""
    path, body, program = COMPUTED[name]
    compiled: list[str] = []

    def listen(event: str, _: float, **more: Any) -> None:
        if "backend_compile" in event:
            compiled.append(threading.current_thread().name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    hook, run = Hook(), getattr(given, program)

    def lower(*arguments: Any, **settings: Any) -> Any:
        hook()
        return run.lower(*arguments, **settings)

    run.clear_cache()
    client.complete(max_tokens=1)
    with monkeypatch.context() as patch:

        def called(*arguments: Any, **settings: Any) -> Any:
            return run(*arguments, **settings)

        called.lower = lower
        patch.setattr(given, program, called)
        computed = client.open(
            "POST", path, {key: value[:2] if key == "prompt" else value for key, value in body.items()}
        )
        assert hook.reached.wait(60)
        assert client.complete(max_tokens=3).status == 200
        compiled.clear()
        hook.go_on.set()
        assert computed.wait().status == 200
    jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled and {one.partition("_")[0] for one in compiled} == {"programs"}


def test_constraints_of_clients_that_left_do_not_hold_up_those_of_others(client, monkeypatch):
    hook, compiled, asked = Hook(), constrained.compiled, list[str]()

    def held(vocabulary: Any, kind: str, constraint: str) -> Any:
        asked.append(constraint)
        hook()
        return compiled(vocabulary, kind, constraint)

    def opened(regex: str) -> Exchange:
        body = {"prompt": "hi", "max_tokens": 4, "structured_outputs": {"regex": regex}}
        return client.open("POST", "/v1/completions", body)

    monkeypatch.setattr(constrained, "compiled", held)
    first = [opened(f"a{number}") for number in range(constrained.THREADS)]
    assert until(lambda: hook.times == constrained.THREADS)
    gone = opened("gone")
    assert until(lambda: client.server.worker.engines["tiny"]._constraints._pool._work_queue.qsize() == 1)
    gone.leave()
    assert until(lambda: client.server.admission.taken == constrained.THREADS)  # while all threads are busy
    hook.go_on.set()
    assert [one.wait().json["choices"][0]["text"] for one in [*first, opened("b")]] == ["a0", "a1", "b"]
    assert json.dumps(asked).count("gone") == 0
