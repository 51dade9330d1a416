"""The server behind real sockets: OpenAI's client, framing of requests, slow clients, and the life of the process."""

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")

from helpers import WORDS
from serving import language_model, listening, serving, until

from llmjax.serve import http

FIXTURE = Path(__file__).parent / "fixtures" / "run_c4ef595"
HOST = b"Host: 127.0.0.1\r\n"


@pytest.fixture(scope="module")
def served():
    with serving(language_model(), queue=32) as client, listening(client) as port:
        yield client, port


@pytest.fixture(scope="module")
def openai(served) -> Iterator[Any]:
    module = pytest.importorskip("openai")
    with module.OpenAI(base_url=f"http://127.0.0.1:{served[1]}/v1", api_key="none", max_retries=0) as made:
        yield made


MESSAGES = [{"role": "user", "content": "hi"}]


def test_openais_client_reads_chats_whole_and_as_streams(openai):
    fields: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "seed": 3, "n": 2}
    plain = openai.chat.completions.create(**fields, logprobs=True, top_logprobs=2)
    assert plain.usage.completion_tokens > 0 and len(plain.choices[0].logprobs.content[0].top_logprobs) == 2
    texts, chunks = (
        ["", ""],
        list(openai.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})),
    )
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in plain.choices]
    assert chunks[-1].usage.total_tokens == plain.usage.total_tokens


def test_openais_client_reads_calls_schemas_completions_vectors_and_models(openai):
    tool = {"type": "function", "function": {"name": "see", "parameters": {"type": "object", "properties": {}}}}
    fields: dict[str, Any] = {
        "model": "tiny",
        "messages": MESSAGES,
        "tools": [tool],
        "max_tokens": 200,
        "parallel_tool_calls": False,
    }
    call = openai.chat.completions.create(**fields, tool_choice="required").choices[0].message.tool_calls[0]
    assert call.function.name == "see" and json.loads(call.function.arguments) == {}
    with openai.chat.completions.stream(
        **fields, tool_choice={"type": "function", "function": {"name": "see"}}
    ) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls" and final.message.tool_calls[0].function.arguments == "{}"
    text = openai.completions.create(model="tiny", prompt="hi", max_tokens=3, echo=True, logprobs=1).choices[0]
    assert text.text.startswith("hi") and text.logprobs.token_logprobs[0] is None
    assert len(openai.embeddings.create(model="tiny", input=["a", "b"]).data[1].embedding) == 16
    assert [model.id for model in openai.models.list()] == ["tiny"] and openai.models.retrieve("tiny").id == "tiny"


def test_openais_client_raises_its_own_errors(openai):
    import openai as module

    with pytest.raises(module.BadRequestError, match="maximum|context") as error:
        openai.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x" * 900}], stream=True)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(module.NotFoundError):
        openai.chat.completions.create(model="other", messages=MESSAGES)


@pytest.mark.slow
def test_openais_client_reads_responses_whole_and_as_streams(openai):
    plain = openai.responses.create(
        model="tiny", input="hi", instructions="be kind", max_output_tokens=12, temperature=0
    )
    assert plain.status in ("completed", "incomplete") and plain.usage.output_tokens > 0
    events = list(
        openai.responses.create(
            model="tiny", input="hi", instructions="be kind", max_output_tokens=12, temperature=0, stream=True
        )
    )
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events if event.type != "response.output_text.delta"]
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        "response.output_text.done", "response.content_part.done", "response.output_item.done", kinds[-1],
    ]  # fmt: skip
    assert events[-1].response.output_text == plain.output_text
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == plain.output_text
    tool = {"type": "function", "name": "see", "parameters": {"type": "object", "properties": {}}}
    fields: dict[str, Any] = {
        "model": "tiny",
        "tools": [tool, {"type": "web_search"}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    first = openai.responses.create(**fields, input="hi")
    (call,) = first.output
    assert call.type == "function_call" and call.name == "see" and json.loads(call.arguments) == {}
    again = [
        {"role": "user", "content": "hi"},
        call.to_dict(),
        {"type": "function_call_output", "call_id": call.call_id, "output": "x"},
    ]
    with openai.responses.stream(**fields, input=again) as stream:
        assert stream.get_final_response().output[0].arguments == "{}"
    assert openai.responses.create(model="tiny", input=[], max_output_tokens=1).status == "incomplete"


def talk(port: int, data: bytes, *, seconds: float = 10.0) -> bytes:
    """What the server sends back on a connection, until it closes it or says nothing more."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        found = b""
        while part := connection.recv(65536):
            found += part
        return found


BODY = b'{"prompt":"a","max_tokens":1}'
POST = b"POST /v1/completions HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\nConnection: close\r\n"


@pytest.mark.parametrize(
    "headers",
    [
        b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n" % len(BODY),
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Content-Length: +5\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Content-Length : 5\r\n",
        b"X: a\r\n b\r\nContent-Length: 0\r\n",
        b"Host: evil.example\r\nContent-Length: 0\r\n",
    ],
)
def test_a_request_that_two_programs_may_read_differently_is_refused(served, headers):
    answer = talk(served[1], POST + headers + b"\r\n" + BODY + b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 400") and answer.count(b"HTTP/1.1 ") == 1


def test_headers_that_do_not_end_or_come_slowly_close_the_connection(served, monkeypatch):
    assert b" 431 " in talk(
        served[1], b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: %s\r\n" % (i, b"a" * 900) for i in range(80))
    )
    monkeypatch.setattr(http, "HEADER_SECONDS", 0.1)
    with socket.create_connection(("127.0.0.1", served[1]), timeout=10) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")
        assert connection.recv(1000) == b""


def test_a_closed_connection_frees_the_slot(served):
    client, port = served
    body = json.dumps({"prompt": "hi", "max_tokens": 500, "logit_bias": {"2": -100}}).encode()
    for more in (b"", b"stream"):
        data = body if not more else body[:-1] + b', "stream": true}'
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(data) + data)
            assert until(lambda: client.server.worker.texts == 1)
        assert until(lambda: client.server.worker.texts == 0 and client.server.admission.taken == 0)


@pytest.mark.slow
def test_the_command_tells_its_url_answers_and_finishes_answers_before_it_ends(tmp_path):
    run = shutil.copytree(FIXTURE, tmp_path / "run")
    command = [sys.executable, "-m", "llmjax", "serve", "--workdir", str(run), "--port", "0"]
    log = (tmp_path / "log").open("w+")
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
        contextlib.ExitStack() as end,
    ):
        end.callback(process.kill)  # without effect once it has ended
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "serving run at http://127.0.0.1:" in line, (tmp_path / "log").read_text()
        url = line.split()[-1]
        assert json.load(urllib.request.urlopen(f"{url}/ready"))["status"] == "ready"
        body = json.dumps({"prompt": "def f", "max_tokens": 20, "stream": True, "logit_bias": {"2": -100}}).encode()
        asked = urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json"})
        with urllib.request.urlopen(asked) as answer:
            answer.readline()
            process.send_signal(signal.SIGTERM)
            assert answer.read().endswith(b"data: [DONE]\n\n")
        assert process.wait(60) == 0
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines() if line.startswith("{")]
    assert [one["route"] for one in lines] == ["/ready", "/v1/completions"]
    assert lines[1]["completion_tokens"] == 20 and "def f" not in json.dumps(lines)


@pytest.mark.slow
def test_an_evaluation_harness_finds_over_http_what_it_finds_in_the_process(served):
    """Its remote tokenizer and its prompt log-probabilities are the server's."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from llmjax.eval.harness import make_model

    pairs = [("the sky is", choice) for choice in (" blue", " a model", " red", " 12")] + [("one", " two"), ("x", "yz")]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    url = f"http://127.0.0.1:{served[1]}/v1/completions"
    remote = LocalCompletionsAPI(base_url=url, model="tiny", tokenizer_backend="remote", batch_size=4, max_length=512)
    found, expected = remote.loglikelihood(asked), make_model(language_model()).loglikelihood(asked)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], rel=1e-5)
    ranked = [sorted(range(4), key=lambda i: rows[i][0]) for rows in (found, expected)]
    assert ranked[0] == ranked[1]  # so every choice, and with it the score of a task, is the same


@pytest.mark.slow  # the harness takes ten seconds to start
def test_a_task_of_the_harness_over_http_has_the_score_of_the_process_to_the_last_digit(served, tmp_path):
    pytest.importorskip("lm_eval")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from llmjax.eval import harness

    rows = [{"question": f"is it {w}", "passage": f"it is {w}", "idx": i, "label": i % 2} for i, w in enumerate(WORDS)]
    (tmp_path / "boolq_validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    url = f"http://127.0.0.1:{served[1]}/v1/completions"
    remote = LocalCompletionsAPI(base_url=url, model="tiny", tokenizer_backend="remote", batch_size=4, max_length=512)
    found, expected = (
        harness.evaluate(model, ["boolq"], [tmp_path])["boolq"]
        for model in (remote, harness.make_model(language_model()))
    )
    assert found.metrics["acc"] == expected.metrics["acc"] and found.metrics["acc"].count == len(WORDS)
    assert [one["acc"] for one in found.items] == [one["acc"] for one in expected.items]
