"""The server keeps its contract with clients. Names with a number are bugs that other servers had."""

import itertools
import json
import random
import re
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("llguidance")

from serving import GREEDY, ROOM, Client, floats, joined, language_model, serving, until

from llmjax.infer.request import Event
from llmjax.infer.text import held_back
from llmjax.retrieve.database import grammar as sql_grammar
from llmjax.serve import messages
from llmjax.serve.app import POSTS
from llmjax.serve.choices import Written
from llmjax.serve.log_probs import Names
from llmjax.serve.messages import Function, Tool
from llmjax.serve.refusals import Refusal
from llmjax.serve.tools import Choice, Parser, grammar

LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {"type": "object", "properties": {"x": {"enum": ["a", "bc"]}}, "required": ["x"]},
    },
}
SEE = {"type": "function", "function": {"name": "see", "parameters": {"type": "object", "properties": {}}}}
SCHEMA = {
    "type": "object", "properties": {"a": {"enum": [1, 2]}, "b": {"type": "boolean"}}, "required": ["a", "b"],
    "additionalProperties": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory):
    with serving(language_model(), feedback=tmp_path_factory.mktemp("serve") / "preferences.jsonl", queue=64) as made:
        yield made


def busy(client: Client) -> int:
    return client.server.worker.texts


# ---------------------------------------------------------------------- the form of answers


def test_an_answer_has_the_fields_that_clients_read(client):
    answer = client.chat(model="tiny", **GREEDY)
    assert answer.status == 200 and answer.headers["x-request-id"].startswith("req_")
    value = answer.json
    assert value["id"].startswith("chatcmpl-") and value["object"] == "chat.completion" and value["model"] == "tiny"
    (choice,) = value["choices"]
    assert choice["message"]["role"] == "assistant" and choice["message"]["refusal"] is None
    assert choice["logprobs"] is None and choice["finish_reason"] in ("stop", "length")
    usage = value["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 8
    assert "cached_tokens" in usage["prompt_tokens_details"]


def test_a_stream_has_the_role_first_then_texts_then_ends_and_says_what_the_plain_answer_says(client):
    fields = {"n": 3, "seed": 5, "max_tokens": 12}
    plain = client.chat(**fields).json
    stream = client.chat(**fields, stream=True)
    assert stream.headers["content-type"] == "text/event-stream" and stream.headers["x-accel-buffering"] == "no"
    assert stream.text.endswith("data: [DONE]\n\n")
    chunks = stream.chunks
    assert [c["choices"][0]["index"] for c in chunks[:3]] == [0, 1, 2]
    assert all(c["choices"][0]["delta"] == {"role": "assistant", "content": ""} for c in chunks[:3])
    assert all("role" not in c["choices"][0]["delta"] for c in chunks[3:])
    assert all(c["choices"][0]["delta"] == {} and c["choices"][0]["finish_reason"] for c in chunks[-3:])
    assert len({(c["id"], c["created"], c["model"]) for c in chunks}) == 1
    for index, choice in enumerate(plain["choices"]):
        made = joined(chunks, index)
        assert made["content"] == choice["message"]["content"] and made["finish"] == choice["finish_reason"]


def test_models_tokens_and_health_answer(client):
    (model,) = client.get("/v1/models").json["data"]
    assert model["id"] == "tiny" and model["max_model_len"] == ROOM
    assert client.get("/v1/models/tiny").json["id"] == "tiny"
    assert client.get("/v1/models/a/b").error["code"] == "model_not_found"
    tokens = client.post("/tokenize", {"prompt": "a<eos>", "add_special_tokens": False}).json["tokens"]
    assert tokens == [ord("a") + 4, 2]  # special tokens are read there
    assert client.post("/detokenize", {"tokens": [ord("h") + 4]}).json == {"prompt": "h"}
    assert client.post("/detokenize", {"tokens": [-1]}).status == 400
    assert client.get("/tokenizer_info").json["eos_token"] == "<eos>"
    assert client.get("/health").status == client.get("/ready").status == 200
    assert "llmjax_generation_tokens_total" in client.get("/metrics").text


def test_errors_have_one_form_on_every_path(client):
    cases = [
        (client.get("/nowhere"), 404),
        (client.get("/v1/chat/completions"), 405),
        (client.post("/v1/chat/completions", {"messages": []}), 400),
        (client.post("/v1/chat/completions", b"{}", **{"content-type": "text/plain"}), 415),
        (client.chat(model="other"), 404),
    ]
    for answer, status in cases:
        assert answer.status == status
        assert answer.error.keys() == {"message", "type", "param", "code"}
    assert client.chat(messages=[{"role": "user", "content": 3}]).error["param"] == "messages[0].content"
    assert client.chat(temperature="hot").error["param"] == "temperature"
    assert client.chat(temperature=-1).error["param"] == "temperature"


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages":[{"role":"user","content":"a"}],"temperature":NaN}',
        b'{"messages":[{"role":"user","content":"a"}],"temperature":1e999}',
        b'{"messages":[],"messages":[{"role":"user","content":"a"}]}',
        b'{"messages":[{"role":"user","content":"\\ud800"}]}',
        b'{"messages":[{"role":"user","content":"\xff"}]}',
        b'{"seed":' + b"9" * 5000 + b"}",
        b'{"a":' + b"[" * 65 + b"]" * 65 + b"}",
        b"[" * 100_000,
        b"[]",
        b"",
    ],
)
def test_what_is_no_clean_json_is_refused(client, body):
    answer = client.post("/v1/chat/completions", body or b" ")
    assert answer.status == 400 and answer.error["code"] == "invalid_json"


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
        {"store": True}, {"audio": {}}, {"web_search_options": {}}, {"tools": [{"type": "custom"}]}, {"best_of": 3, "prompt": "a"},
        {"suffix": "b", "prompt": "a"},
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_name(client, fields):
    answer = client.complete(**fields) if "prompt" in fields else client.chat(**fields)
    assert answer.status == 400 and answer.error["message"]


@pytest.mark.parametrize("path", POSTS)
def test_a_field_of_ours_is_read_or_refused_by_name(path):
    """On every path: who saw it work on another one is not answered as if it worked here."""
    kind = POSTS[path][1]
    unread = [name for name in messages.OWN if name not in kind.__struct_fields__]
    for name in unread:
        with pytest.raises(Refusal) as refused:
            messages.read(json.dumps({name: "a"}).encode(), kind)
        assert refused.value.status == 400 and refused.value.param == name


def test_a_source_is_not_passed_over_in_silence(client):
    assert client.complete(source="songs").error["param"] == "source"
    answer = client.post("/v1/responses", {"input": "hi", "source": "songs"})
    assert answer.status == 400 and answer.error["param"] == "source" and "source is not supported" in answer.text


def test_every_limit_of_fields_is_kept(client):
    for fields in (
        {"n": 9}, {"n": 0}, {"n": 10**9}, {"stop": ["a"] * 5}, {"stop": "a" * 300}, {"logprobs": True, "top_logprobs": 21},
        {"logit_bias": {str(i): 0 for i in range(1025)}}, {"logit_bias": {"999": 1}}, {"max_tokens": 0}, {"max_tokens": -5},
        {"top_logprobs": 2}, {"tools": [LOOK, LOOK]},
    ):  # fmt: skip
        assert client.chat(**fields).status == 400, fields


def schema(**given: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": given}}}


def parameters(**given: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", "parameters": given}}]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stop": ""}, "stop"), ({"stop": ["a", ""]}, "stop"), ({"logit_bias": {"5": 1e300}}, "logit_bias"), ({"logit_bias": {"x": 1}}, "logit_bias"),
        (schema(type="nothing"), "response_format"), (schema(enum=[]), "response_format"), ({"structured_outputs": {"regex": "["}}, "structured_outputs"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs"), ({"structured_outputs": {"json": "5"}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "a" * 70_000}}, "structured_outputs"), (parameters(properties=None), "tools"), ({**parameters(), "tools": [LOOK, LOOK]}, "tools[1].function.name"),
        (parameters(**{"$ref": "#/nowhere"}), "tools"), ({"chat_template_kwargs": {"documents": 5}}, "chat_template_kwargs.documents"), ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ],
)  # fmt: skip
def test_an_error_names_the_field_of_the_request(client, fields, param):
    answer = client.chat(**fields)
    assert answer.status == 400 and answer.error["param"] == param and "\n" not in answer.error["message"]


def test_prompts_that_no_model_reads_are_refused_before_anything_is_computed(client, monkeypatch):
    monkeypatch.setattr(client.server, "compute", None)
    for fields in ({"max_tokens": 0}, {"max_tokens": 4}):
        answer = client.complete(prompt="x" * 600, echo=True, logprobs=1, **fields)
        assert answer.status == 400 and answer.error["code"] == "context_length_exceeded" and "600" in answer.text
    for ids in ([-1], [272], [10**30], [[4], [5, 272]]):
        assert client.complete(prompt=ids).error["param"] == "prompt"
        assert client.post("/v1/embeddings", {"input": ids}).error["param"] == "input"


def test_every_answer_has_an_id_and_a_wrong_method_is_told_the_right_ones(client):
    for answer in (
        client.get("/nowhere"),
        client.get("/v1/models", host="evil.example"),
        client.get("/v1/chat/completions"),
        client.get("/"),
    ):
        assert re.fullmatch(r"req_[0-9a-f]{24}", answer.headers["x-request-id"])
    assert client.get("/nowhere", **{"x-request-id": "mine"}).headers["x-request-id"] == "mine"
    assert client.get("/nowhere", **{"x-request-id": "a b"}).headers["x-request-id"].startswith("req_")
    assert client.get("/v1/chat/completions").headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"instructions": "a", "input": [{"role": "user", "content": "a"}, {"role": "x", "content": "a"}]}, "input[1].role"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{"}]}, "input[0].tool_calls[0].function.arguments"),
        ({"input": "a", "max_output_tokens": 0}, "max_output_tokens"), ({"input": "a", "text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"input": "a", "text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"), ({"input": "a" * 600}, "input"),
        ({"input": "a", "tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
    ],
)  # fmt: skip
def test_an_error_of_a_response_names_its_own_field(client, fields, param):
    answer = client.post("/v1/responses", fields)
    assert answer.status == 400 and answer.error["param"] == param
    assert not re.search(r"messages\[|response_format|completion_tokens", answer.error["message"])


# ---------------------------------------------------------------------- bugs of other servers


def test_bug_1_a_call_that_is_cut_says_length_and_a_whole_one_tool_calls(client):
    fields = {"tools": [LOOK], "tool_choice": "required", "parallel_tool_calls": False, "seed": 3}
    reasons = set()
    for count in (5, 45, 80):
        plain = client.chat(**fields, max_tokens=count).json["choices"][0]
        stream = joined(client.chat(**fields, max_tokens=count, stream=True).chunks)
        calls = plain["message"].get("tool_calls", [])
        assert stream["finish"] == plain["finish_reason"]
        assert [call["arguments"] for call in stream["calls"]] == [call["function"]["arguments"] for call in calls]
        reasons.add(plain["finish_reason"])
        if plain["finish_reason"] == "tool_calls":
            assert json.loads(calls[0]["function"]["arguments"])["x"] in ("a", "bc")
    assert reasons == {"length", "tool_calls"}


CALLS = (
    'Well. <tool_call>\n{"name": "f", "arguments": {"a": "}\\"{", "b": [1, {}]}}\n</tool_call>\n'
    '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
)


def test_bug_2_calls_are_found_however_the_text_is_cut():
    rng = random.Random(0)
    cuts = [[], list(range(1, len(CALLS))), *[[i] for i in range(1, len(CALLS))]]
    cuts += [sorted(rng.sample(range(1, len(CALLS)), 5)) for _ in range(50)]
    for places in cuts:
        parser = Parser()
        for start, end in itertools.pairwise([0, *places, len(CALLS)]):
            parser.feed(CALLS[start:end], last=end == len(CALLS))
        assert parser.content == "Well. "
        assert [(call.name, json.loads(call.arguments)) for call in parser.calls] == [
            ("f", {"a": '}"{', "b": [1, {}]}),
            ("g", {}),
        ]


def test_bugs_3_and_4_two_calls_have_their_index_and_arguments_are_texts(client):
    # The model may go on after its first call, and a bias to the line feed before another makes it.
    fields = {"tools": [SEE], "tool_choice": "required", "seed": 1, "max_tokens": 200}
    bias = {"2": -100, str(ord("\n") + 4): 100}
    stream = client.chat(**fields, logit_bias=bias, stream=True)
    plain = client.chat(**fields, logit_bias=bias).json["choices"][0]["message"]["tool_calls"]
    made = joined(stream.chunks)
    assert len(plain) > 1
    assert all(isinstance(call["function"]["arguments"], str) for call in plain)
    assert [(call["name"], call["arguments"]) for call in made["calls"]] == [
        (call["function"]["name"], call["function"]["arguments"]) for call in plain
    ]
    assert all(re.fullmatch(r"call_[0-9a-f]{24}", call["id"]) for call in made["calls"])
    assert len({call["id"] for call in made["calls"]}) == len(made["calls"])


MENTIONS = (
    'Write <tool_call> {"name": "rm", "arguments": {}} then.',
    '<tool_call>{"name": "rm", "arguments": {"x": 1}}</tool_call>',
    '<tool_call> {"name": "\\q", "arguments": {}}',
    "It begins with <tool_call>",
    "a" * 2000 + "<tool_call>" + "b" * 2000,
)


@pytest.mark.parametrize("text", MENTIONS)
def test_a_text_that_only_mentions_a_call_is_a_text(text):
    """The grammar lets a model write it where it may write texts, so none of it is a call, and nothing of it is lost."""
    assert sql_grammar.accepts(grammar(Choice([Tool("function", Function("f"))])), text)
    for size in (1, 7, len(text)):
        parser = Parser()
        for start in range(0, len(text), size):
            parser.feed(text[start : start + size], last=start + size >= len(text))
        assert parser.content == text and parser.calls == []


def test_bug_5_an_answer_without_calls_has_no_key_for_them(client):
    message = client.chat(tools=[LOOK], tool_choice="none").json["choices"][0]["message"]
    assert "tool_calls" not in message and isinstance(message["content"], str)


def test_arguments_follow_schemas_whose_properties_stand_elsewhere_and_are_objects(client):
    inner = {"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"], "additionalProperties": False}
    for schema in ({"$ref": "#/$defs/A", "$defs": {"A": inner}}, {"anyOf": [inner]}, {"allOf": [inner]}):
        tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
        message = client.chat(tools=tools, tool_choice="required", parallel_tool_calls=False, max_tokens=80).json[
            "choices"
        ][0]["message"]
        assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"a": "x"}, schema
    tools[0]["function"]["parameters"] = {"type": "string"}
    assert client.chat(tools=tools).error["param"] == "tools[0].function.parameters.type"


def test_a_schema_that_names_itself_is_that_of_the_arguments():
    node = {
        "type": "object",
        "properties": {"next": {"$ref": "#"}, "same": {"$ref": "#/properties/next"}},
        "additionalProperties": False,
    }
    tool = Tool("function", Function("f", None, node))
    accepted = grammar(Choice([tool], required=True, parallel=False))
    for arguments, right in (
        ('{"next": {"next": {}}}', True),
        ('{"same": {"next": {}}}', True),
        ('{"next": {"name": "f"}}', False),
    ):
        text = f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>'
        assert sql_grammar.accepts(accepted, text) == right, arguments


def test_calls_of_earlier_messages_have_arguments_in_clean_json(client):
    for arguments in ("[" * 100_000, '"\\ud800"', "{", '{"a": NaN}'):
        messages = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]
        assert client.chat(messages=messages).error["param"] == "messages[0].tool_calls[0].function.arguments"


def test_bug_6_null_is_the_same_as_absent_in_every_field(client):
    names = (
        "model", "temperature", "top_p", "n", "stop", "seed", "stream", "stream_options", "logprobs", "top_logprobs",
        "frequency_penalty", "presence_penalty", "logit_bias", "response_format", "tool_choice", "parallel_tool_calls",
        "user", "store", "max_completion_tokens", "structured_outputs", "chat_template_kwargs", "audio", "chat_template",
    )  # fmt: skip
    assert client.chat(**dict.fromkeys(names), tools=[]).status == 200
    nulls = dict.fromkeys(("suffix", "echo", "best_of", *names[:14]))
    assert client.complete(**nulls).status == 200


def test_bug_7_log_probabilities_come_without_a_number_of_likeliest_tokens(client):
    content = client.chat(logprobs=True, top_logprobs=None, **GREEDY).json["choices"][0]["logprobs"]["content"]
    assert content and all(one["top_logprobs"] == [] for one in content)


def test_bug_8_a_stream_has_the_log_probabilities_of_the_plain_answer_token_by_token(client):
    fields = {"logprobs": True, "top_logprobs": 3, "seed": 11, "max_tokens": 20}
    plain = client.chat(**fields).json["choices"][0]["logprobs"]["content"]
    chunks = client.chat(**fields, stream=True).chunks
    assert max(len((c["choices"][0]["logprobs"] or {"content": ()})["content"]) for c in chunks) > 1
    assert joined(chunks)["logprobs"] == plain
    assert len({tuple(t["token"] for t in one["top_logprobs"]) for one in plain}) > 1


def written(pieces: bytes, steps: int, *, stops: tuple[str, ...] = ()) -> tuple[list[Any], Written]:
    """The deltas of a text of bytes, so many tokens an event, as the engine tells them."""
    from llmjax.infer.text import Text

    names = Names(language_model().tokenizer)
    text = Text(names.tokenizer.piece_bytes, eos_ids=(2,), stops=stops)
    made, deltas = Written(names), []
    ids = [byte + 4 for byte in pieces]
    for first in range(0, len(ids), steps):
        told = len(text.tokens)
        for token in ids[first : first + steps]:
            text.add(token, -1.0)
        if first + steps >= len(ids):
            text.end("length")
        tokens = tuple(text.tokens[told:])
        deltas.append(made.take(Event(0, text.take(), tokens, (-1.0,) * len(tokens), finish=text.finish)))
        if text.finish:
            break
    return deltas, made


def test_bug_9_the_bytes_of_an_emoji_join_to_the_emoji():
    text = "a\U0001f600\u00e9!"
    for steps in (1, 2, 3, 20):
        deltas, made = written(text.encode(), steps)
        assert "".join(delta.content for delta in deltas) == text
        found = [made.placed.tokens[place][0] for delta in deltas for place in delta.places]
        assert b"".join(made.names.bytes_of(token) for token in found).decode() == text
        assert [made.names.name(token) for token in found][1] == "bytes:\\xf0"


@pytest.mark.parametrize("stream", [False, True])
def test_bug_10_offsets_are_the_lengths_of_the_tokens_before(client, stream):
    prompt = "some words"
    answer = client.complete(prompt=prompt, echo=True, logprobs=2, logit_bias={str(ord("a") + 4): 100}, stream=stream)
    parts = answer.chunks if stream else [answer.json]
    rows = [choice["logprobs"] for part in parts for choice in part["choices"] if choice["logprobs"]]
    tokens, offsets = ([x for row in rows for x in row[name]] for name in ("tokens", "text_offset"))
    assert tokens == [*prompt, *["a"] * 8]
    assert offsets == list(range(len(tokens)))
    assert "".join(c["text"] for part in parts for c in part["choices"]) == prompt + "a" * 8
    without = client.complete(prompt=prompt, logprobs=0, logit_bias={str(ord("a") + 4): 100})
    assert without.json["choices"][0]["logprobs"]["text_offset"][0] == len(prompt)


def test_bug_11_repeated_prompts_have_the_log_probabilities_that_evaluation_in_the_process_finds(client):
    from llmjax.eval.likelihood import ScoringRequest, score_requests

    model = language_model()
    pairs = [("the sky is", " blue"), ("one and one", " are two"), ("x", "yz")]
    ids = [tuple(model.tokenizer.encode(part) for part in pair) for pair in pairs]
    expected = score_requests(model, [ScoringRequest(*pair) for pair in ids])
    body = {"prompt": [[*a, *b] for a, b in ids], "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    choices = client.complete(**body).json["choices"]
    for (context, continuation), choice, likelihood in zip(ids, choices, expected, strict=True):
        log_probs = choice["logprobs"]
        assert len(log_probs["tokens"]) == len(context) + len(continuation) + 1
        assert log_probs["token_logprobs"][0] is None
        own, top = (log_probs[name][len(context) : -1] for name in ("token_logprobs", "top_logprobs"))
        np.testing.assert_allclose(sum(own), likelihood.sum, rtol=1e-5)
        assert all(max(t.values()) == x for x, t in zip(own, top, strict=True)) == likelihood.greedy
    assert client.complete(prompt="ab", echo=True, max_tokens=0, logprobs=0).json["choices"][0]["text"] == "ab"


def test_bugs_12_and_13_a_stop_string_never_shows_and_its_beginning_is_not_lost():
    rng = random.Random(1)
    for _ in range(300):
        text = "".join(rng.choice("ab") for _ in range(rng.randint(1, 12)))
        stops = tuple("".join(rng.choice("ab") for _ in range(rng.randint(1, 4))) for _ in range(2))
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        shown = text[: min(ends)[1]] if ends else text  # before the stop that is whole first, the longest of them
        for steps in (1, 3):
            deltas, made = written(text.encode(), steps, stops=stops)
            assert "".join(delta.content for delta in deltas) == made.content
            if steps == 1:
                assert made.content == shown
    assert held_back("xaba", ("abac",)) == 3
    assert written(b"xab", 1, stops=("abc",))[1].content == "xab"


def test_bug_14_the_usage_comes_once_and_only_if_it_is_asked_for(client):
    for options, count in ((..., 0), (None, 0), ({"include_usage": False}, 0), ({"include_usage": True}, 1)):
        chunks = client.chat(stream=True, stream_options=options).chunks
        assert [bool(chunk.get("usage")) for chunk in chunks].count(True) == count
        assert all(("usage" in chunk) == bool(count) for chunk in chunks)
        if count:
            assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize("stream", [False, True])
def test_bugs_15_and_18_a_prompt_that_is_too_long_is_a_real_status_with_the_numbers(client, stream):
    answer = client.chat(messages=[{"role": "user", "content": "x" * 600}], max_tokens=7, stream=stream)
    assert answer.status == 400 and answer.error["code"] == "context_length_exceeded"
    assert all(number in answer.error["message"] for number in ("618", "7", str(ROOM)))


def test_bug_16_a_schema_is_followed_and_one_of_the_wrong_form_is_refused(client):
    wrong = client.chat(response_format={"type": "json_schema", "schema": SCHEMA})
    assert wrong.status == 400 and wrong.error["param"] == "response_format.json_schema.schema"
    assert client.chat(response_format={"type": "xml"}).status == 400
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    answers = client.chat(response_format=form, n=8, max_tokens=60).json["choices"]
    assert {json.loads(choice["message"]["content"])["a"] for choice in answers} <= {1, 2}
    unsupported = {"type": "json_schema", "json_schema": {"schema": {"type": "array", "uniqueItems": True}}}
    assert client.chat(response_format=unsupported).status == 400


def test_bug_17_a_wrong_expression_fails_alone(client):
    alone = client.chat(seed=9, max_tokens=60).json["choices"][0]["message"]["content"]
    beside = client.open(
        "POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "seed": 9, "max_tokens": 60}
    )
    assert client.chat(structured_outputs={"regex": "foo**"}).status == 200  # llguidance reads it as foo*
    for regex in ("[", "(?=a)b", r"(a)\1"):
        assert client.chat(structured_outputs={"regex": regex}).status == 400
    assert client.chat(structured_outputs={"grammar": "start: nothing"}, stream=True).status == 400
    choice = client.chat(structured_outputs={"choice": ["yes", "no"]}).json["choices"][0]
    assert choice["message"]["content"] in ("yes", "no") and choice["finish_reason"] == "stop"
    assert beside.wait().json["choices"][0]["message"]["content"] == alone


def test_bug_18_no_field_of_a_message_is_dropped(client):
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "kind"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"x": "a"}'}}]},
        {"role": "tool", "tool_call_id": "1", "content": "there"},
    ]  # fmt: skip
    ids = client.post("/tokenize", {"messages": messages}).json["tokens"]
    text = client.post("/detokenize", {"tokens": ids}).json["prompt"]
    assert text == (
        'system: be kind\nassistant: <tool_call>{"name": "look", "arguments": {"x": "a"}}</tool_call>\n'
        "tool: there\nassistant: "
    )


def test_bug_19_base64_and_lists_are_the_same_vectors(client):
    body = {"input": ["some text", "another"], "model": "tiny"}
    plain = client.post("/v1/embeddings", body).json["data"]
    packed = client.post("/v1/embeddings", {**body, "encoding_format": "base64"}).json["data"]
    for one, other in zip(plain, packed, strict=True):
        np.testing.assert_array_equal(np.array(one["embedding"], np.float32), floats(other["embedding"]))
        np.testing.assert_allclose(np.linalg.norm(one["embedding"]), 1, rtol=1e-5)
    assert client.post("/v1/embeddings", {"input": [[1, 100_000]]}).status == 400  # ids of another vocabulary
    ranked = client.post("/v1/rerank", {"query": "some text", "documents": ["another", "some text"], "top_n": 1}).json
    assert ranked["results"][0]["index"] == 1
    for wrong in ({"query": ""}, {"documents": []}, {"documents": [""]}, {"top_n": 0}):
        refused = client.post("/v1/rerank", {"query": "a", "documents": ["b"], **wrong})
        assert refused.status == 400 and refused.error["param"] == next(iter(wrong))


def test_bug_20_a_seed_gives_the_same_text_under_any_load_and_samples_differ(client):
    def text(**fields: Any) -> str:
        return client.chat(max_tokens=24, **fields).json["choices"][0]["message"]["content"]

    alone = text(seed=4)
    others = [
        client.open("POST", "/v1/completions", {"prompt": "x" * i, "max_tokens": 100, "seed": i}) for i in range(1, 6)
    ]
    assert text(seed=4) == alone
    for other in others:
        other.wait()
    assert text() != text()
    samples = client.chat(seed=4, n=3, max_tokens=24).json["choices"]
    assert len({choice["message"]["content"] for choice in samples}) == 3
    assert samples[0]["message"]["content"] == alone


@pytest.mark.parametrize("fields", [{"stream": True}, {"stream": False}, {"stream": True, "n": 3}])
def test_bug_21_a_client_that_leaves_frees_its_slots(client, fields):
    engine = client.server.worker.engines["tiny"]
    before = engine.written
    body = {"prompt": "hi", "max_tokens": 500, "logit_bias": {"2": -100}, **fields}
    exchange = client.open("POST", "/v1/completions", body)
    assert until(lambda: busy(client) == fields.get("n", 1))
    exchange.leave()
    assert until(lambda: busy(client) == 0 and client.server.admission.taken == 0)
    assert exchange.wait().text.count("[DONE]") == 0
    assert until(lambda: not engine.busy)
    assert engine.written - before < 500 * fields.get("n", 1)


def test_bug_22_what_finds_no_place_is_refused_before_it_is_tokenized(monkeypatch):
    with serving(language_model(), queue=1) as small:
        body = {"prompt": "hi", "max_tokens": 400, "logit_bias": {"2": -100}}
        running = [small.open("POST", "/v1/completions", body) for _ in range(5)]
        assert until(lambda: small.server.admission.taken == 5)
        monkeypatch.setattr(small.server, "prepare", None)
        refused = small.complete()
        assert refused.status == 429 and refused.error["type"] == "rate_limit_error"
        assert refused.headers["retry-after"] == "1"
        assert small.complete(prompt=["a"] * 6).status == 400  # it never fits
        assert [one.wait().status for one in running] == [200] * 5


def test_bug_23_a_template_of_the_request_is_refused(client):
    for fields in ({"chat_template": "{{ 1 }}"}, {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}):
        assert client.chat(**fields).status == 400
    assert client.chat(chat_template_kwargs={"messages": [], "reply": False}).status == 400
    assert client.chat(chat_template_kwargs={"enable_thinking": False}).status == 200


def test_bug_24_headers_have_a_limit(client):
    assert client.get("/health", **{"x-long": "a" * 70_000}).status == 431
    assert client.get("/health", **{f"x-{i}": "a" for i in range(101)}).status == 431


NUMBERS = (
    "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "frequency_penalty", "presence_penalty",
    "max_tokens", "seed", "n", "top_logprobs",
)  # fmt: skip


@pytest.mark.slow
def test_bug_25_absurd_numbers_end_or_are_refused(client):
    values = (
        -1,
        0,
        1,
        2,
        1e6,
        -1e6,
        1e-30,
        1e300,
        -1e300,
        2**31,
        2**32,
        2**64,
        -(2**63),
        10**30,
        0.5,
        True,
        "1",
        [],
        {},
    )
    for name, value in itertools.product(NUMBERS, values):
        answer = client.chat(**{"logprobs": True, name: value})
        assert answer.status in (200, 400), (name, value, answer.text)


def test_bug_25_the_worst_numbers_end_or_are_refused(client):
    for fields in (
        {"top_p": -1},
        {"temperature": 1e6},
        {"temperature": 1e300},
        {"seed": 2**70},
        {"repetition_penalty": 0},
    ):
        assert client.chat(**fields).status in (200, 400), fields
    assert client.chat(temperature=1e6).status == 200 and client.chat(top_p=-1).status == 400
