"""Multiple-choice tasks: our prompts are the harness's, and our scores are its to the last digit."""

import dataclasses
import json
import math
import random
import socket

import numpy as np
import pytest
from networks import settings
from test_eval_likelihood import model_of

from llmjax.eval import encoding, harness, leaderboard, local_data, native, prompts, statistics
from llmjax.eval.likelihood import ScoringRequest

pytest.importorskip("lm_eval", reason="needs the extra llmjax[eval]")

WORDS = ["sun", "sea", "ink", "fox", "ant", "oak", "tin", "map", "cup", "hat"]


def some(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(count))


def write(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small made-up files of all our tasks, with what the real ones have: odd labels, brackets, unequal choices."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)

    def arc(n, labels):
        choices = [f"{some(rng, rng.randint(1, 4))} {i}" for i in range(len(labels))]
        return {
            "id": str(n),
            "question": f"{some(rng, 2)} {n}?",
            "choices": {"text": choices, "label": list(labels)},
            "answerKey": rng.choice(labels),
        }

    for name in ("arc_challenge", "arc_easy"):
        for split, count in (("train", 27), ("test", 5)):
            write(folder / f"{name}_{split}.jsonl", [arc(n, "ABCD" if n % 3 else "1234") for n in range(count)])
    write(folder / "hellaswag_val.jsonl", [
        {"ind": n, "activity_label": "Cooking [header]", "ctx_a": f"{some(rng, 7)} {n} [title] x.", "ctx_b": f"{some(rng, 2)}", "ctx": "",
         "endings": [f"{some(rng, rng.randint(2, 6))}  {i}. [step] b" for i in range(4)], "label": str(rng.randrange(4))}
        for n in range(14)])  # fmt: skip
    rows = [
        {"question": f" {some(rng, 5)} {n}? ", "subject": subject, "choices": [f"{some(rng, 2)} {i}" for i in range(4)], "answer": rng.randrange(4)}
        for subject in ("abstract_algebra", "high_school_us_history") for n in range(8)]  # fmt: skip
    write(folder / "mmlu_test.jsonl", rows)
    write(folder / "truthfulqa_mc.jsonl", [
        {"question": f"{some(rng, 5)} {n}?", **{
            key: {"choices": [f"{some(rng, rng.randint(1, 9))} {i}é." for i in range(k)], "labels": [1] * true + [0] * (k - true)}
            for key, k, true in (("mc1_targets", 4, 1), ("mc2_targets", 6, 3))}}
        for n in range(6)])  # fmt: skip
    for split, count in (("train", 7), ("validation", 5)):
        write(folder / f"winogrande_{split}.jsonl", [
            {"sentence": f"The {some(rng, 2)} _ the {some(rng, 3)} {n}.", "option1": some(rng, 1), "option2": some(rng, 2), "answer": rng.choice("12")}
            for n in range(count)])  # fmt: skip
    write(
        folder / "gsm8k_test.jsonl",
        [{"question": f"{some(rng, 4)} {n}?", "answer": f"{some(rng, 3)}\n#### {n}"} for n in range(8)],
    )
    return folder


@pytest.fixture(scope="module")
def model():
    """Large enough for 25 short examples in bytes, and small enough to be quick."""
    return model_of(settings(vocab_size=260, max_length=4096, layers=1, heads=2, attention="auto"))


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments):
        raise AssertionError(f"the network was asked for {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


TASKS = ("arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc1", "truthfulqa_mc2", "winogrande")


@pytest.mark.slow  # twenty seconds, most of them in the harness
def test_native_scores_equal_the_harness_to_the_last_digit(folder, model, no_network, monkeypatch):
    asked = []
    score_requests = harness.score_requests
    monkeypatch.setattr(harness, "score_requests", lambda m, r, **more: asked.append(r) or score_requests(m, r, **more))
    theirs = harness.evaluate(harness.make_model(model), TASKS, [folder])
    native_requests = []
    monkeypatch.setattr(
        native, "score_requests", lambda m, r, **more: native_requests.append(r) or score_requests(m, r, **more)
    )
    ours = native.evaluate(model, TASKS, [folder])
    assert asked[0] == native_requests[0]  # prompts, examples, choices and their order, token by token
    assert len(asked[0]) > 100 and max(len(r.context) for r in asked[0]) > 1000
    for task in TASKS:
        assert ours[task].main == theirs[task].main and ours[task].shots == theirs[task].shots, task
        for name, estimate in ours[task].metrics.items():
            other = theirs[task].metrics[name]
            assert (estimate.value, estimate.count) == (other.value, other.count), (task, name)
            assert estimate.error == pytest.approx(other.error, rel=1e-12), (task, name)
        for a, b in zip(ours[task].items, theirs[task].items, strict=True):
            assert a["log_likelihoods"] == b["log_likelihoods"] and a["acc"] == b["acc"]
    assert ours["mmlu"].metrics["acc"].count == 16
    assert "no dev split" in ours["mmlu"].notes[0] and "no train split" in ours["hellaswag"].notes[0]
    assert not ours["arc_challenge"].notes
    total = leaderboard.aggregates(ours)["openllm_v1_4"]
    parts = [ours[t].score for t in leaderboard.V1_4]
    assert total.value == sum(p.value for p in parts) / 4
    assert total.error == pytest.approx(math.sqrt(sum(p.error**2 for p in parts)) / 4)


@pytest.mark.slow
def test_a_task_that_generates_runs_in_the_harness(folder, model, no_network):
    score = harness.evaluate(harness.make_model(model, max_length=640), ["gsm8k"], [folder], limit=2)["gsm8k"]
    assert score.main == "exact_match,strict-match" and score.shots == 5
    assert len(score.items) == 2 and all(isinstance(x["texts"][0], str) for x in score.items)
    assert score.notes[0].startswith("gsm8k: the data has no train split")


def test_mmlu_is_averaged_both_ways():
    def subject(name, values):
        return leaderboard.TaskScore(
            name, 5, "acc", {"acc": statistics.mean(values)}, [{"id": i, "acc": v} for i, v in enumerate(values)]
        )

    both = leaderboard.mmlu([subject("mmlu_a", [1.0] * 3 + [0.0]), subject("mmlu_b", [0.0, 1.0] * 6)])
    assert both.score.value == (0.75 + 0.5) / 2
    assert both.metrics["acc_by_question"].value == 9 / 16
    assert len(both.items) == 16


def test_missing_data_and_tasks_are_said(folder, tmp_path, model):
    with pytest.raises(ValueError, match=r"none of .* has boolq_test.jsonl"):
        harness.evaluate(harness.make_model(model), ["boolq"], [folder])
    with pytest.raises(ValueError, match="is not a task of the native runner"):
        native.evaluate(model, ["boolq"], [folder])
    with pytest.raises(ValueError, match="give --data DIR"):
        native.evaluate(model, ["hellaswag"], [])
    (tmp_path / "hellaswag_val.jsonl").write_text('{"ind": 1}\n{"ind')
    with pytest.raises(ValueError, match="line 2 is no JSON"):
        native.evaluate(model, ["hellaswag"], [tmp_path])
    write(tmp_path / "arc_easy_train.jsonl", [{}] * 3)
    write(tmp_path / "arc_easy_test.jsonl", [{}] * 3)
    with pytest.raises(ValueError, match="takes 25 examples from its train split, which has 3"):
        native.evaluate(model, ["arc_easy"], [tmp_path])


@pytest.mark.slow  # the harness takes ten seconds to start
def test_another_task_of_the_harness_runs_when_its_data_is_there(tmp_path, model, no_network):
    rows = [{"question": f"is it {w}", "passage": f"it is {w}", "idx": i, "label": i % 2} for i, w in enumerate(WORDS)]
    write(tmp_path / "boolq_validation.jsonl", rows)
    score = harness.evaluate(harness.make_model(model), ["boolq"], [tmp_path])["boolq"]
    assert score.score.count == len(WORDS) and 0 <= score.score.value <= 1


def test_spaces_and_beginnings_are_those_of_the_harness(model):
    tokenizer = model.tokenizer  # a byte is 4 more than its value, <bos> is 1
    assert encoding.encode_pairs(tokenizer, [("Answer: ", "yes")]) == encoding.encode_pairs(
        tokenizer, [("Answer:", " yes")]
    )
    [request] = encoding.encode_pairs(tokenizer, [("", "ab")])
    assert request == ScoringRequest([1], [ord("a") + 4, ord("b") + 4])
    [request] = encoding.encode_pairs(tokenizer, [("<bos>x", "y")])
    assert request.context[0] == 1 and len(request.context) == 2
    with pytest.raises(ValueError, match="empty"):
        encoding.encode_pairs(tokenizer, [("a", "")])
    adapter = harness.make_model(model)
    for pair in [("Answer: ", "yes"), ("a\n", "b"), ("x", " y z"), ("<bos>x", "y")]:
        context, continuation = adapter._encode_pair(*pair)
        assert encoding.encode_pairs(tokenizer, [pair]) == [ScoringRequest(context, continuation)]


@pytest.mark.parametrize(("count", "length"), [(0, 4), (1, 4), (4, 4), (5, 4), (10, 4), (33, 8)])
def test_rolling_windows_are_those_of_the_harness(count, length):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    ids = list(range(1, count + 1))
    theirs = [make_disjoint_window(w) for w in get_rolling_token_windows(ids, 0, length, 1)]
    ours = list(encoding.rolling_windows(ids, prefix=0, length=length))
    assert [(r.context, r.continuation) for r in ours] == theirs
    assert [i for r in ours for i in r.continuation] == ids


def test_rolling_likelihood_of_a_short_text_is_its_loss(model):
    from lm_eval.api.instance import Instance

    text = "the moon and the river"
    [total] = harness.make_model(model).loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    ids = np.array([[1, 1, *model.tokenizer.encode(text)]])  # the prefix token, and the <bos> that the tokenizer puts
    logits = np.asarray(model.logits(ids[:, :-1]), np.float64)[0]
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert total == pytest.approx(logps[np.arange(ids.shape[1] - 1), ids[0, 1:]].sum(), abs=1e-3)


def test_generation_settings_are_read_as_the_harness_means_them():
    greedy, count = harness.generation_settings(
        {"until": ["\n", ""], "do_sample": False, "temperature": 0.7}, limit=512
    )
    assert (greedy["temperature"], greedy["stop"], count) == (0.0, ["\n"], 256)
    drawn, count = harness.generation_settings(
        {"until": "x", "do_sample": True, "top_p": 0.9, "max_gen_toks": 9}, limit=10
    )
    assert (drawn["temperature"], drawn["top_p"], drawn["stop"], count) == (1.0, 0.9, ["x"], 9)
    with pytest.raises(ValueError, match="generates 256 tokens"):
        harness.generation_settings({}, limit=256)


def test_leaving_one_out_never_shows_the_question_itself(folder):
    data = local_data.find("hellaswag", [folder])
    assert data.leave_one_out and data.asked == "validation"
    for question, pairs in prompts.prompts("hellaswag", data, leaderboard.SETTINGS["hellaswag"]):
        assert pairs[0][0].count(question.context) == 1


CHAT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no systems') }}{% endif %}"
    "<bos>{{ m.role }}: {{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}<bos>assistant: {% endif %}"
)


def test_questions_go_through_the_chat_template(folder, model):
    chat = dataclasses.replace(model, tokenizer=dataclasses.replace(model.tokenizer, chat_template=CHAT))
    adapter = harness.make_model(chat)
    messages = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
    assert adapter.apply_chat_template(messages[:1]) == "<bos>user: a?<eos><bos>assistant: "
    assert adapter.apply_chat_template(messages, add_generation_prompt=False) == "<bos>user: a?<eos><bos>assistant: b"
    mention = adapter.apply_chat_template([{"role": "user", "content": "<eos>"}])  # text, in the middle of a prompt too
    assert (
        adapter.tok_encode(mention).count(2)
        == encoding.encode_pairs(chat.tokenizer, [(mention, " x")])[0].context.count(2)
        == 1
    )
    assert (
        adapter.apply_chat_template([{"role": "user", "content": None}], add_generation_prompt=False) == "<bos>user: "
    )
    system = [{"role": "system", "content": "be brief"}, *messages[:1]]
    assert adapter.apply_chat_template(system) == adapter.apply_chat_template(messages[:1])
    assert adapter.tok_encode("<bos>x")[:2] == [1, ord("x") + 4]  # <bos> once, and as a special token
    score = harness.evaluate(adapter, ["truthfulqa_mc1"], [folder], limit=2, chat=True)["truthfulqa_mc1"]
    plain = harness.evaluate(adapter, ["truthfulqa_mc1"], [folder], limit=2)["truthfulqa_mc1"]
    assert score.items[0]["log_likelihoods"] != plain.items[0]["log_likelihoods"]
    with pytest.raises(ValueError, match="no chat template"):
        harness.evaluate(harness.make_model(model), ["truthfulqa_mc1"], [folder], limit=1, chat=True)


def test_what_was_scored_is_offered_to_the_cache_of_the_harness(model):
    from lm_eval.api.instance import Instance

    adapter, kept = harness.make_model(model), []
    adapter.cache_hook.add_partial = lambda name, arguments, result: kept.append((name, arguments, result))
    asked = [Instance("loglikelihood", {}, ("a", " b"), 0), Instance("loglikelihood", {}, ("", "c"), 1)]
    found = adapter.loglikelihood(asked)
    assert kept == [("loglikelihood", a.args, r) for a, r in zip(asked, found, strict=True)]
    assert found[0][0] < 0 and isinstance(found[0][1], bool)
