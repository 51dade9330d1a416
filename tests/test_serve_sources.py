"""Questions through the server to databases and documents of its operator: the command's answers, and the command's limits."""

import argparse
import functools
import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("llguidance")

from serving import Client, joined, language_model, scripted, serving, until
from test_ask_attacks import ATTACKS

from llmjax.errors import UserError
from llmjax.retrieve import command as ask_command
from llmjax.retrieve import questions
from llmjax.retrieve.database import execute, grammar
from llmjax.serve import command, sources

SQL = "SELECT Title FROM Song ORDER BY Title LIMIT 2"


@pytest.fixture(scope="module")
def song(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("secret place") / "songs.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE Song (Id INTEGER PRIMARY KEY, Title TEXT, Length INTEGER)")
        db.executemany("INSERT INTO Song VALUES (?, ?, ?)", [(i, f"<b>{i}</b>", i * 10) for i in range(30)])
    db.close()
    return path


@pytest.fixture(scope="module")
def client(song: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("papers")
    (folder / "ships.md").write_text("# Ships\n\nThe Vasa sank in 1628 before Stockholm.\n")
    found = [sources.database(song), sources.documents(folder, folder / "index")]
    with serving(language_model(), make_engines=dict, sources=found, keys=("first",)) as served:
        yield served


def asked(client: Client, monkeypatch: pytest.MonkeyPatch, *texts: str, **fields: Any) -> Any:
    """The answer when a script writes the texts."""
    left = list(texts)
    with scripted(monkeypatch, lambda _: left.pop(0)):
        body = {"question": "Which titles are there?", "source": "songs", **fields}
        answer = client.post("/ask", body, authorization="Bearer first")
    assert not left
    return answer


def test_sources_are_listed_and_a_question_has_sql_and_rows_or_a_refusal(client, monkeypatch):
    listed = client.get("/sources", authorization="Bearer first").json["data"]
    assert listed[0] == {"id": "songs", "object": "source", "kind": "database"} and listed[1]["kind"] == "documents"
    answer = asked(client, monkeypatch, "Song", SQL).json
    assert answer["sql"] == SQL and answer["columns"] == ["Title"] and answer["rows"] == [["<b>0</b>"], ["<b>10</b>"]]
    assert answer["object"] == "answer" and not answer["refused"] and "transcript" not in answer
    assert asked(client, monkeypatch, "none").json["refused"]
    changing = asked(client, monkeypatch, question="Delete all songs").json
    assert changing["refused"] and changing["rows"] is None and "only read" in changing["reason"]
    quoted = asked(client, monkeypatch, '[1] "The Vasa sank in 1628 before Stockholm." It sank in 1628.', source=listed[1]["id"],
                   question="When did the Vasa sink?").json  # fmt: skip
    assert quoted["answer"] == "It sank in 1628. [1]" and quoted["citations"][0]["path"] == "ships.md"


@pytest.mark.parametrize("stream", [False, True])
def test_clients_of_openai_get_sql_and_rows_beside_a_chat_completion(client, monkeypatch, stream):
    left = ["Song", SQL]
    body = {
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "Which titles?"}],
        "source": "songs", "stream": stream, "temperature": 0.7, "max_tokens": 3, "stream_options": {"include_usage": True} if stream else None,
    }  # fmt: skip
    with scripted(monkeypatch, lambda _: left.pop(0)):
        answer = client.post("/v1/chat/completions", body, authorization="Bearer first")
    if stream:
        text, chunks = joined(answer.chunks)["content"], answer.chunks
        assert [one.get("answer") is not None for one in chunks] == [False, False, True, False] and chunks[-1]["usage"]
        found = chunks[2]["answer"]
    else:
        text, found = answer.json["choices"][0]["message"]["content"], answer.json["answer"]
    assert found["rows"] == [["<b>0</b>"], ["<b>10</b>"]] and found["sql"] == SQL and found["source"] == "songs"
    assert text.startswith(SQL) and "<b>10</b>" in text
    for wrong in (
        {"source": "no"},
        {"n": 2},
        {"stop": "x"},
        {"logprobs": True},
        {"top_k": 3},
        {"min_p": 0.1},
        {"messages": body["messages"][:2]},
    ):
        refused = client.post("/v1/chat/completions", {**body, **wrong}, authorization="Bearer first")
        assert refused.status in (400, 404) and refused.error["param"] in wrong, wrong


def test_an_answer_is_made_again_from_its_transcript(client, song, monkeypatch, tmp_path):
    path, answer = tmp_path / "transcript.jsonl", asked(client, monkeypatch, "Song", SQL, transcript=True).json
    path.write_text(answer["transcript"] + "\n")
    start, *_ = ask_command._database(argparse.Namespace(db=song))
    assert list(questions.replay(path, start)) == [(answer["id"], "")]
    path.write_text(path.read_text().replace("LIMIT 2", "LIMIT 3"))
    assert [difference for _, difference in questions.replay(path, start)] != [""]


def test_what_cannot_be_asked_is_named(client, monkeypatch):
    file = {"name": "a", "text": "b"}
    for wrong, status in (
        ({"source": "no"}, 404), ({"source": "../songs"}, 404), ({"source": "songs.sqlite"}, 404), ({"source": None}, 400), ({"files": [file]}, 400),
        ({"source": 1}, 400), ({"question": ""}, 400), ({"question": "x" * 2001}, 400), ({"model": "no"}, 404),
    ):  # fmt: skip
        assert asked(client, monkeypatch, **wrong).status == status, wrong


def test_nothing_of_a_database_is_told_without_a_key(client, song):
    for path in ("/sources", "/openapi.json", "/v1/models"):
        assert client.get(path).status == 401
    assert client.post("/ask", {"question": "Which titles?", "source": "songs"}).status == 401
    for path in ("/", "/app.js", "/health"):
        answer = client.get(path)
        assert answer.status == 200 and "songs" not in answer.text and "Song" not in answer.text


@pytest.mark.parametrize("layer", ATTACKS)
def test_attacks_through_the_server_are_stopped_by_the_commands_layers(client, song, monkeypatch, layer):
    """Whatever the model is made to write: as if the grammar were no wall."""
    before = hashlib.sha256(song.read_bytes()).hexdigest()
    for sql in ATTACKS[layer][::40]:
        texts = ["Song", sql, *([sql] if layer in ("syntax", "schema", "authorizer", "functions", "statement") else [])]
        answer = asked(client, monkeypatch, *texts).json
        assert answer["refused"] and answer["rows"] is None and answer["reason"].startswith(layer), sql
        assert str(song.parent) not in json.dumps(answer)
    assert hashlib.sha256(song.read_bytes()).hexdigest() == before and list(song.parent.iterdir()) == [song]


def test_a_database_that_is_gone_is_an_error_without_its_path(client, song, monkeypatch):
    away = song.with_suffix(".away")
    song.rename(away)
    try:
        answer = asked(client, monkeypatch)
        assert answer.status == 503 and answer.error["code"] == "source_unavailable"
        song.write_text("no database")
        assert asked(client, monkeypatch).status == 503
        song.write_bytes(b"SQLite format 3\0 damaged")
        assert asked(client, monkeypatch).status == 503 and str(song.parent) not in answer.text
    finally:
        away.rename(song)


def test_an_index_that_is_gone_or_damaged_is_an_error_and_no_empty_answer(client, monkeypatch, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "ships.md").write_text("The Vasa sank in 1628 before Stockholm.\n")
    source = sources.documents(tmp_path / "docs", tmp_path / "index")
    monkeypatch.setitem(client.server.sources, "docs", source)
    for mend in (
        lambda path: path.write_bytes(b"SQLite format 3\0" + bytes(range(256)) * 20),
        lambda path: path.unlink(),
    ):
        mend(tmp_path / "index" / "index.sqlite")
        answer = asked(client, monkeypatch, source="docs", question="When did the Vasa sink?")
        assert (
            answer.status == 503 and answer.error["code"] == "source_unavailable" and str(tmp_path) not in answer.text
        )


def test_questions_of_a_client_that_leaves_end_and_their_place_is_free(client, monkeypatch):
    began, go_on = threading.Event(), threading.Event()

    def begin(question: str, today: str) -> Any:
        began.set()
        go_on.wait(20)
        yield from ()

    waiting = sources.Source("slow", "database", begin, lambda answer: {}, str)
    monkeypatch.setitem(client.server.sources, "slow", waiting)
    exchange = client.open("POST", "/ask", {"question": "a?", "source": "slow"}, {"authorization": "Bearer first"})
    assert began.wait(10) and client.server.admission.taken == 1
    exchange.leave()
    assert until(lambda: client.server.admission.taken == 0)
    go_on.set()


def test_the_query_of_a_client_that_leaves_ends(client, monkeypatch):
    """It would run for a minute. No other query of the question begins."""
    monkeypatch.setattr(execute, "Limits", functools.partial(execute.Limits, seconds=60, cpu_seconds=60))
    left = ["Song", "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT COUNT(*) FROM n"]
    with scripted(monkeypatch, lambda _: left.pop(0)):
        exchange = client.open(
            "POST", "/ask", {"question": "Which?", "source": "songs"}, {"authorization": "Bearer first"}
        )
        assert until(lambda: not left and execute.running)
        exchange.leave()
        assert until(lambda: client.server.admission.taken == 0 and not execute.running)


def test_names_of_sources_differ(song, tmp_path):
    other = tmp_path / "songs.sqlite"
    other.write_bytes(song.read_bytes())
    args = argparse.Namespace(db=[song, other], docs=[], tools=[], workdir=tmp_path)
    with pytest.raises(UserError, match="have the name songs"):
        command._sources(args)
    args.db, args.tools = [song.rename(tmp_path / "tools.sqlite")], ["tools.py"]
    with pytest.raises(UserError, match="have the name tools"):
        command._sources(args)
    args.db[0].rename(song)
    args.db = [tmp_path / "no.sqlite"]
    with pytest.raises(UserError, match="there is no database"):
        command._sources(args)


@pytest.mark.slow
def test_a_random_model_answers_a_database_under_its_grammar(song):
    with serving(language_model(model__max_length=2048), sources=[sources.database(song)]) as roomy:
        answer = roomy.post("/ask", {"question": "Which titles are long?", "source": "songs", "transcript": True})
        assert answer.status == 200
        value = answer.json
        assert value["usage"]["completion_tokens"] > 0
        for one in json.loads(value["transcript"])["asked"]:
            assert one["finish"] == "length" or grammar.accepts(one["asked"]["grammar"], one["text"])
        assert value["refused"] == (value["rows"] is None)
