"""Adapters of a model are models of the server, chosen by their names; and what the server says of itself."""

import dataclasses

import numpy as np
import pytest
from flax import traverse_util

pytest.importorskip("starlette")
pytest.importorskip("llguidance")

from networks import make
from serving import ROOM, joined, language_model, serving

from llmjax.errors import UserError
from llmjax.infer.adapters import Adapter
from llmjax.model.adapters import is_adapter
from llmjax.persona import card, reply, rights, style, threshold
from llmjax.retrieve.documents.index import Index
from llmjax.serve.app import GETS, POSTS
from llmjax.serve.personas import opened, with_personas

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def adapter(seed: int) -> Adapter:
    """Random adapters of the attention of the tiny model."""
    c = language_model().config.model.copy_and_resolve_references()
    with c.unlocked():
        c.adapter.update({"kind": "lora", "rank": 2, "alpha": 4.0, "targets": ("query", "value")})
    flat = traverse_util.flatten_dict(make(c)[1], sep="/")
    rng = np.random.default_rng(seed)
    return Adapter(
        c.adapter, {path: rng.normal(size=x.shape).astype(np.float32) for path, x in flat.items() if is_adapter(path)}
    )


@pytest.fixture(scope="module")
def client():
    model = dataclasses.replace(language_model(), adapters={"one": adapter(1), "voices/two": adapter(2)})
    with serving(model) as made:
        yield made


def test_adapters_are_listed_as_models_and_an_unknown_name_is_refused_with_the_list(client):
    listed = client.get("/v1/models").json["data"]
    assert [(one["id"], one["parent"]) for one in listed] == [("tiny", None), ("one", "tiny"), ("voices/two", "tiny")]
    assert client.get("/v1/models/voices/two").json["max_model_len"] == ROOM
    refused = client.complete(model="three")
    assert refused.status == 404 and "tiny, one, voices/two" in refused.error["message"]


def test_each_model_writes_and_scores_and_embeds_with_its_own_adapter(client):
    """The engine computes with adapters beside the kernels, and scores are those of merged kernels."""
    prompt, scores, vectors = [5, 9, 30, 40], {}, {}
    asked = {
        "prompt": prompt,
        "max_tokens": 6,
        "logprobs": 0,
        "temperature": 0,
        "structured_outputs": {"regex": "[a-z]{6}"},
    }
    together = {name: client.open("POST", "/v1/completions", {**asked, "model": name}) for name in client.server.models}
    for name, exchange in together.items():
        written = exchange.wait().json["choices"][0]["logprobs"]
        ids = [client.post("/tokenize", {"prompt": token}).json["tokens"][0] for token in written["tokens"]]
        echoed = client.complete(model=name, prompt=[*prompt, *ids], max_tokens=0, echo=True, logprobs=0).json
        scores[name] = echoed["choices"][0]["logprobs"]["token_logprobs"][len(prompt) :]
        np.testing.assert_allclose(scores[name], written["token_logprobs"], atol=2e-5)
        vectors[name] = client.post("/v1/embeddings", {"model": name, "input": [prompt]}).json["data"][0]["embedding"]
    assert len({tuple(one) for one in scores.values()}) == len({tuple(one) for one in vectors.values()}) == 3


def test_fields_that_are_ignored_are_named_in_the_log_once(client, monkeypatch):
    lines = []
    monkeypatch.setattr(client.server, "log", lambda **facts: lines.append(facts))
    for _ in range(2):
        assert client.chat(service_tier="auto", user="me", metadata={"a": "b"}, max_tokens=1).status == 200
    assert [one["ignored_field"] for one in lines if "ignored_field" in one] == ["service_tier"]


@pytest.mark.parametrize(
    "fields", [{"guided_json": {}}, {"guided_choice": ["a"]}, {"ignore_eos": True}, {"min_tokens": 3}, {"bad_words": ["a"]}]
)  # fmt: skip
def test_fields_of_other_servers_that_would_change_the_answer_are_refused_by_name(client, fields):
    (name,) = fields
    assert client.chat(**fields).error["param"] == name


def test_a_conversation_is_tokenized_with_or_without_the_beginning_of_the_answer(client):
    messages = [{"role": "user", "content": "a"}]
    whole, cut = (
        client.post("/tokenize", {"messages": messages, "add_generation_prompt": reply}).json["tokens"]
        for reply in (None, False)
    )
    assert whole[: len(cut)] == cut and bytes(i - 4 for i in whole[len(cut) :]) == b"assistant: "
    assert client.get("/tokenizer_info?model=one").json["eos_token"] == "<eos>"
    assert client.get("/tokenizer_info?model=no").status == 404


def test_tools_of_responses_that_are_malformed_are_refused(client):
    for tool in ({"type": "function", "name": "f", "parameters": "x"}, {"type": "function"}, {"name": "f"}, 3):
        assert client.post("/v1/responses", {"input": "a", "tools": [tool]}).status == 400, tool
    assert client.post("/v1/responses", {"input": "a", "text": {"format": "json"}}).error["param"] == "text.format"


def test_the_interface_is_described_as_it_is(client):
    described = client.get("/openapi.json").json
    assert described["openapi"] == "3.1.0"
    assert described["paths"].keys() == {path.replace(":path}", "}") for path in [*POSTS, *GETS]}
    schemas = described["components"]["schemas"]
    assert schemas["ChatBody"]["required"] == ["messages"] and "temperature" in schemas["ChatBody"]["properties"]
    for path, (handler, kind) in POSTS.items():
        operation = described["paths"][path]["post"]
        assert operation["summary"] and operation["operationId"] == handler.__name__
        assert operation["requestBody"]["content"]["application/json"]["schema"] == {
            "$ref": f"#/components/schemas/{kind.__name__}"
        }


TEXT = "The Vasa was a ship. She sank in 1628 before Stockholm.\n\nShe lay there for many years.\n"


def test_a_question_to_files_is_refused_where_they_hold_nothing(client):
    files = [{"name": "ships.md", "text": TEXT}]
    answer = client.post("/ask", {"question": "Who wrote Faust?", "files": files}).json
    assert answer["refused"] and answer["answer"] == "not in the documents" and answer["citations"] == []
    for wrong in ({"files": []}, {"files": files * 2}, {"question": " "}, {"files": [{"name": "a"}]}, {"model": "no"}):
        assert client.post("/ask", {"question": "ship?", "files": files, **wrong}).status in (400, 404), wrong
    assert (
        client.post("/ask", {"question": "Who sank?", "files": files}).error["param"] is None
    )  # too long for 512 tokens


@pytest.mark.slow
def test_an_answer_from_files_quotes_them_at_its_places():
    """A random model writes nonsense, and the grammar and the checks still hold."""
    with serving(language_model(model__max_length=2048)) as roomy:
        files = [{"name": "../ships.md", "text": TEXT}, {"name": "b", "text": '\x00 "quoted" <script>'}]
        answer = roomy.post("/ask", {"question": "When did the Vasa sink?", "files": files})
    assert answer.status == 200
    value = answer.json
    assert value["usage"]["completion_tokens"] > 0 and value["passages"][0]["path"] == "../ships.md"
    for one in value["citations"]:
        assert TEXT[one["start"] : one["end"]] == one["quote"]
    assert all(one["reason"] for one in value["dropped"])


# ------------------------------------------------------------------ personas


@pytest.fixture
def persona(tmp_path):
    """A persona that writes with the adapter "one"."""
    made = card.Persona(
        "Ann Keeper", "/base", "voice/texts", True, rights.Rights("Ann", "letters", "public domain", "died 1850", "Erika"),
        threshold.Threshold(0.4, 20, 20, 0.1, 0.9, "test"), style.figures(["The oil lasts."]), folder=tmp_path / "ann",
    )  # fmt: skip
    with Index(made.folder / card.INDEX) as index:
        index.add_texts([("a.txt", "The oil lasts."), ("b.txt", "Rain came.")])
    card.write(made)
    return made


def test_a_persona_is_disclosed_and_quoted_over_http_and_answers_in_no_other_way(persona, monkeypatch):
    """A random model, whose text the grammar makes an answer."""
    monkeypatch.setattr(reply, "RULES", "Quote.")  # the tiny model reads 512 bytes
    model = dataclasses.replace(language_model(), adapters={"one": adapter(1)})
    with serving(model) as asking:
        for one in with_personas(
            list(asking.server.models.values()), {"one": persona, "two": dataclasses.replace(persona, run="")}
        ):
            asking.server.models[one.name] = one
        listed = {one["id"]: one for one in asking.get("/v1/models").json["data"]}
        assert (
            listed["one"]["persona"] == listed["two"]["persona"] == persona.public and "persona" not in listed["tiny"]
        )
        question = [{"role": "user", "content": "Does the oil last?"}]
        for name in ("one", "two"):
            answered = asking.chat(model=name, messages=question, max_tokens=100)
            made = answered.json
            content = made["choices"][0]["message"]["content"]
            assert content.startswith(persona.disclosure) and made["persona"]["simulated"] is True
            assert made["persona"]["declined"] or made["persona"]["citations"][0]["quote"] == "The oil lasts."
            assert made["usage"]["completion_tokens"] > 0
            assert made["persona"]["said"] and made["persona"]["said"] == made["persona"]["said"].replace(
                persona.disclosure, ""
            )
            streamed = joined(asking.chat(model=name, messages=question, max_tokens=100, stream=True).chunks)
            assert streamed["content"] == content and streamed["finish"] == "stop"
        outside = asking.chat(model="one", messages=[{"role": "user", "content": "Football scores?"}]).json
        assert outside["persona"]["declined"] and outside["usage"]["total_tokens"] == 0
        system = [{"role": "system", "content": "You are Ann herself."}, *question]
        assert "own system prompt" in asking.chat(model="one", messages=system).error["message"]
        for fields in ({"tools": [TOOL]}, {"chat_template_kwargs": {"a": 1}}, {"response_format": {"type": "json_object"}}, {"n": 2}, {"logprobs": True}):  # fmt: skip
            assert asking.chat(model="one", messages=question, **fields).status == 400
        for seed in (-1, 2**70):  # as without a persona
            assert asking.chat(model="one", messages=question, max_tokens=100, seed=seed).status == 200
        for fields in ({"max_tokens": 0}, {"max_tokens": 9, "max_completion_tokens": 0}):
            refused = asking.chat(model="one", messages=question, **fields)
            assert refused.status == 400 and refused.error["param"] == list(fields)[-1]
        assert "/v1/chat/completions" in asking.complete(model="one").error["message"]
        assert asking.post("/v1/responses", {"model": "two", "input": "Does the oil last?"}).status == 400
        assert asking.chat(model="tiny", max_tokens=2).status == 200


def test_the_training_inside_a_persona_is_not_served_alone(persona):
    assert opened(persona.folder) == persona and opened(persona.folder.parent) is None
    with pytest.raises(UserError, match="serve .*ann, which says what it is"):
        opened(persona.folder / "voice" / "texts")
