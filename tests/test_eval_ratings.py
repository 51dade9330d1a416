"""People and judges compare answers: blind, in random order, saved at once; strengths are recovered, failures are missing."""

import dataclasses
import http.client
import json
import math
import threading
import types
import urllib.parse

import numpy as np
import pytest
from helpers import tiny_config

from llmjax.data import conversations
from llmjax.data.tokenizer import byte_tokenizer
from llmjax.eval import judge, rate, ratings
from llmjax.eval.ratings import Pair

PAIRS = [
    Pair(f"question {i} <b>", (f"short {i}", f"a longer <i>answer</i> {i}"), ("model-x", "model-y")) for i in range(12)
]


def rated(number: int, choice, *, rater="r", systems=("a", "b"), order=(0, 1)):
    return ratings.rate(Pair(f"q{number}", ("one", "two"), systems), rater=rater, choice=choice, order=order, now=1.0)


def test_strengths_are_those_that_made_the_comparisons():
    rng, truth = np.random.default_rng(0), {"a": 1200.0, "b": 1000.0, "c": 800.0}
    names, made = list(truth), []
    for i in range(3000):
        x, y = rng.choice(names, 2, replace=False)
        chance = 1 / (1 + 10 ** ((truth[y] - truth[x]) / 400))
        made.append(rated(i, int(rng.random() > chance), systems=(str(x), str(y))))
    found = ratings.bradley_terry(made, draws=50)
    assert list(found) == ["a", "b", "c"]
    for name, elo in truth.items():
        assert found[name].elo == pytest.approx(elo, abs=25)
        assert found[name].low < found[name].elo < found[name].high
        assert found[name].high - found[name].low < 100
    assert sum(s.count for s in found.values()) == 2 * len(made)


def test_ties_are_half_a_win_and_missing_judgements_are_nothing():
    tied = ratings.bradley_terry([rated(i, "tie") for i in range(20)], draws=0)
    assert tied["a"].elo == pytest.approx(tied["b"].elo)
    some = [rated(i, 0) for i in range(6)] + [rated(i, 1) for i in range(6, 8)]
    with_missing = [*some, *[rated(i, None) for i in range(50)]]
    assert ratings.bradley_terry(with_missing, draws=0) == ratings.bradley_terry(some, draws=0)
    assert "8 ratings by 1 raters, 50 missing" in ratings.summary(with_missing)
    always = ratings.bradley_terry([rated(i, 0) for i in range(30)], draws=10)
    assert math.isfinite(always["a"].elo) and always["a"].elo > always["b"].elo + 300
    assert ratings.bradley_terry([rated(0, None)]) == {}


def test_kappa_is_that_of_the_textbooks():
    a, b = [0] * 25 + [1] * 25, [0] * 20 + [1] * 5 + [0] * 10 + [1] * 15
    assert ratings.cohen_kappa(a, b) == pytest.approx(0.4)
    theirs = pytest.importorskip("sklearn.metrics").cohen_kappa_score(a, b)
    assert ratings.cohen_kappa(a, b) == pytest.approx(theirs)
    fleiss = np.array([[0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
                       [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]])  # fmt: skip
    assert ratings.fleiss_kappa(fleiss) == pytest.approx(0.210, abs=5e-4)
    with pytest.raises(ValueError, match="as many raters"):
        ratings.fleiss_kappa(np.array([[1, 1], [1, 2]]))


def test_raters_agree_about_answers_whatever_their_order_in_the_file():
    one = [rated(i, i % 2) for i in range(10)]
    other = [
        ratings.rate(Pair(r.prompt, r.answers[::-1], r.systems[::-1]), rater="s", choice=1 - r.choice, order=(0, 1))
        for r in one
    ]
    assert ratings.agreement([*one, *other]) == {"r ~ s": pytest.approx(1.0)}
    third = [rated(i, "tie", rater="t") for i in range(10)]
    assert set(ratings.agreement([*one, *other, *third])) == {"r ~ s", "r ~ t", "s ~ t", "all"}


def test_ratings_are_read_back_and_damage_is_said(tmp_path):
    path = tmp_path / "r.jsonl"
    made = [rated(0, 1), rated(1, "tie"), rated(2, None)]
    for rating in made:
        ratings.append(path, rating)
    assert ratings.read(path) == made
    assert set(json.loads(path.read_text().splitlines()[0])) == {
        "rater",
        "time",
        "choice",
        "prompt",
        "answers",
        "order",
        "systems",
    }
    assert ratings.read(tmp_path / "none.jsonl") == []
    path.write_text(path.read_text().replace('"choice": 1', '"choice": 5'))
    with pytest.raises(ValueError, match="choice is 5"):
        ratings.read(path)


def test_two_files_of_texts_are_paired_by_prompt(tmp_path):
    for name, prompts in (("a", "xyz"), ("b", "yzw")):
        rows = [{"prompt": p, "text": f"{name} says {p}"} for p in prompts]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = ratings.read_pairs([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    assert found == [Pair(p, (f"a says {p}", f"b says {p}"), ("a", "b")) for p in "yz"]
    rows = [{"prompt": p.prompt, "answers": p.answers, "systems": p.systems} for p in found]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert ratings.read_pairs([tmp_path / "pairs.jsonl"]) == found
    with pytest.raises(ValueError, match="give two files"):
        ratings.read_pairs([tmp_path / "a.jsonl"])


def test_the_order_is_random_but_stays_and_does_not_depend_on_the_file():
    orders = [ratings.shown_order(pair, rater="r", seed=0) for pair in PAIRS * 1]
    assert {(0, 1), (1, 0)} == set(orders)
    assert orders == [ratings.shown_order(pair, rater="r", seed=0) for pair in PAIRS]
    swapped = [Pair(p.prompt, p.answers[::-1], p.systems[::-1]) for p in PAIRS]
    again = [ratings.shown_order(pair, rater="r", seed=0) for pair in swapped]
    assert [(1 - a, 1 - b) for a, b in again] == orders


@pytest.fixture
def server(tmp_path):
    session = rate.Session(PAIRS, tmp_path / "ratings.jsonl")
    with rate.make_server(session) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield session, server.server_port
        server.shutdown()
        thread.join()


def ask(port: int, fields: dict[str, str] | None = None, path: str = "/", **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    body = None if fields is None else urllib.parse.urlencode(fields)
    connection.request("GET" if body is None else "POST", path, body, headers)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


def test_the_page_is_blind_and_saves_each_rating_at_once(server):
    session, port = server
    assert "Your name" in ask(port)[1]
    for done in range(len(PAIRS)):
        status, text = ask(port, path="/?rater=ann")
        assert status == 200 and "model-" not in text and "<i>" not in text  # no names, and answers are text
        _, pair = session.next_of("ann")
        shown = [pair.answers[i] for i in session.order(pair, "ann")]
        assert text.index(f"{shown[0]}".replace("<", "&lt;").replace(">", "&gt;")) < text.index(
            shown[1].replace("<", "&lt;").replace(">", "&gt;")
        )
        longer = shown.index(pair.answers[1])
        fields = {"rater": "ann", "pair": ratings.pair_key(pair), "shown": str(longer)}
        assert ask(port, fields)[0] == 200
        assert ask(port, fields)[0] == 200  # a second click is no second rating
        saved = ratings.read(session.path)
        assert len(saved) == done + 1 and saved[-1].choice == 1  # always the same answer, wherever it was shown
    assert "has rated all 12" in ask(port, path="/?rater=ann")[1]
    assert "1 of 12" in ask(port, path="/?rater=bob")[1]
    again = rate.Session(PAIRS, session.path)
    assert again.next_of("ann") is None and again.next_of("bob")[0] == 0


def test_other_sites_and_made_up_forms_are_refused(server):
    session, port = server
    key = ratings.pair_key(PAIRS[0])
    good = {"rater": "eve", "pair": key, "shown": "0"}
    assert ask(port, good, Origin="http://evil.example")[0] == 400
    assert ask(port, good, Host="evil.example")[0] == 400
    assert ask(port, path="/?rater=eve", Host="evil.example")[0] == 404
    assert ask(port, {**good, "shown": "2"})[0] == 400
    assert ask(port, {**good, "pair": "x"})[0] == 400
    assert ask(port, {**good, "rater": " "})[0] == 400
    assert ask(port, path="/../ratings.jsonl")[0] == 404
    assert ratings.read(session.path) == []


def test_the_terminal_rates_too(tmp_path):
    session = rate.Session(PAIRS[:3], tmp_path / "r.jsonl")
    said, answers = [], iter(["1", "what", "3", "q"])
    rate.in_terminal(session, rater="t", ask=lambda _: next(answers), say=said.append)
    saved = ratings.read(session.path)
    assert len(saved) == 2 and saved[1].choice == "tie" and saved[0].choice == saved[0].order[0]
    assert not any("model-" in text for text in said[:-1])


TRIPLES = [Pair(f"question {i}", tuple(f"answer {i} of {x}" for x in "xyz"), ("x", "y", "z")) for i in range(6)]


def test_a_ranking_says_what_its_pairs_say_and_is_read_back(tmp_path):
    path = tmp_path / "r.jsonl"
    scores = {"fluency": (5, None, 1), "harm": (1, 1, 3)}
    made = ratings.rank(TRIPLES[0], rater="r", ranks=(2, 1, 2), scores=scores, order=(2, 0, 1), now=1.0)
    ratings.append(path, made)
    assert ratings.read(path) == [made]
    assert [(p.systems, p.choice, p.order) for p in made.pairs()] == [
        (("x", "y"), 1, (0, 1)), (("x", "z"), "tie", (1, 0)), (("y", "z"), 0, (1, 0)),
    ]  # fmt: skip
    said = ratings.summary([made, rated(0, 0, systems=("x", "y"))])
    assert "4 ratings by 1 raters" in said and "x, fluency: 5.00 of 5" in said and "z, harm: 3.00 of 5" in said
    for wrong in (
        {"ranks": (1, 2)},
        {"ranks": (1, 2, 4)},
        {"scores": {"fluency": (6, 1, 1)}},
        {"scores": {"charm": (1, 1, 1)}},
    ):
        with pytest.raises(ValueError, match=r"ranks=|scores of"):
            ratings.rank(TRIPLES[0], rater="r", order=(0, 1, 2), **{"ranks": (1, 2, 3), "scores": {}, **wrong})


def test_answers_are_ranked_and_scored_blind_on_the_page(tmp_path):
    session = rate.Session(TRIPLES, tmp_path / "r.jsonl", scales=("fluency",))
    with rate.make_server(session) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        port = server.server_port
        for _ in range(len(TRIPLES)):
            text = ask(port, path="/?rater=ann")[1]
            _, pair = session.next_of("ann")
            order = session.order(pair, "ann")
            assert 'name="rank-2"' in text and 'name="fluency-0"' in text
            fields = {"rater": "ann", "pair": ratings.pair_key(pair)}
            fields |= {f"rank-{place}": str(answer + 1) for place, answer in enumerate(order)}  # x, y, z
            assert ask(port, {**fields, "rank-1": "9"})[0] == 400 and ask(port, {**fields, "rank-1": ""})[0] == 400
            assert ask(port, {**fields, "fluency-0": "4"})[0] == 200
        server.shutdown()
        thread.join()
    saved = ratings.read(session.path)
    assert [one.ranks for one in saved] == [(1, 2, 3)] * len(TRIPLES)
    assert all(one.scores["fluency"][one.order[0]] == 4 and one.scores["fluency"].count(None) == 2 for one in saved)
    assert len({one.order for one in saved}) > 1
    assert list(ratings.bradley_terry(ratings.pairwise(saved), draws=2)) == ["x", "y", "z"]


def test_answers_are_ranked_in_the_terminal(tmp_path):
    session = rate.Session(TRIPLES[:2], tmp_path / "r.jsonl", scales=("honesty",))
    said, answers = [], iter(["1 2", "5 5 5", "3 1 2", "- 5 1", "q"])
    rate.in_terminal(session, rater="t", ask=lambda _: next(answers), say=said.append)
    [saved] = ratings.read(session.path)
    assert [saved.ranks[i] for i in saved.order] == [3, 1, 2]
    assert [saved.scores["honesty"][i] for i in saved.order] == [None, 5, 1]
    assert any("again" in text for text in said)


def test_ratings_and_rankings_are_rows_to_learn_from(tmp_path):
    path = tmp_path / "r.jsonl"
    for row in (rated(0, 1), rated(1, "tie"), rated(2, None)):
        ratings.append(path, row)
    ratings.append(path, ratings.rank(TRIPLES[0], rater="r", ranks=(2, 1, 2), scores={}, order=(0, 1, 2)))
    ratings.append(path, ratings.rank(TRIPLES[1], rater="r", ranks=(1, 1, 1), scores={}, order=(0, 1, 2)))
    first, tie, failed, ranked, level = conversations.read(path)
    assert (first.prompt, first.answers, first.ranks) == ("q0", ("one", "two"), (1.0, 0.0))
    assert (tie.reason, failed.reason) == ("the answers tie", "the judgement failed")
    assert ranked.ranks == (2.0, 1.0, 2.0) and "all answers tie" in level.reason


def test_a_judge_that_loves_a_place_says_ties_and_one_that_fails_says_nothing():
    def longer(prompts):
        found = []
        for prompt in prompts:
            first, second = prompt.split("[Answer A]\n")[1].split("\n\n[Answer B]\n")
            found.append("[[A]]" if len(first) > len(second.split("\n\nWhich")[0]) else "so [[B]]")
        return found

    assert [r.choice for r in judge.judge(PAIRS, longer, rater="j")] == [1] * len(PAIRS)
    assert {r.choice for r in judge.judge(PAIRS, lambda p: ["[[A]]"] * len(p), rater="j")} == {"tie"}
    assert {r.choice for r in judge.judge(PAIRS, lambda p: ["[[C]]"] * len(p), rater="j")} == {"tie"}
    for failure in ("I cannot say", "[[A]] or [[B]]", None, ""):
        made = list(judge.judge(PAIRS, lambda p, said=failure: [said] + ["[[A]]"] * (len(p) - 1), rater="j"))
        assert made[0].choice is None and made[1].choice == "tie"
    with pytest.raises(ValueError, match="gave 0 answers"):
        list(judge.judge(PAIRS, lambda p: [], rater="j"))


def test_what_a_judge_has_said_is_not_lost_with_what_it_has_not(monkeypatch):
    monkeypatch.setattr(judge, "TOGETHER", 5)
    asked = []

    def fails_later(prompts):
        asked.append(len(prompts))
        if len(asked) == 3:
            raise OSError("no more memory")
        return ["[[C]]"] * len(prompts)

    made = []

    def collect():
        for one in judge.judge(PAIRS, fails_later, rater="j"):
            made.append(one.prompt)

    with pytest.raises(OSError, match="no more memory"):
        collect()
    assert asked == [10, 10, 4]
    assert made == [pair.prompt for pair in PAIRS[:10]]


def test_a_model_that_judges_is_not_asked_more_than_it_reads():
    class Model:
        tokenizer = dataclasses.replace(byte_tokenizer(), chat_template="{{ messages[0].content }}")
        config = tiny_config(model__max_length=300)

        def generate(self, prompts, **_):
            assert all(len(ids) <= 200 for ids in prompts)
            return [types.SimpleNamespace(text=f"[[A]] {len(ids)}") for ids in prompts]

    said = judge.ask_model(Model(), max_new_tokens=100)(["x" * 200, "y" * 201, "z" * 3])
    assert said == ["[[A]] 200", None, "[[A]] 3"]
