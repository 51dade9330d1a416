"""Promises of what scores documents: n-gram model, trained classifier, calibration, word lists, bias report, steps."""

import json
import math
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest
from ml_collections import ConfigDict

pytest.importorskip("pyarrow")
pytest.importorskip("sklearn")
from llmjax.prepare import bias
from llmjax.prepare.documents import make_batch, reject
from llmjax.prepare.learn import classifier, lexicons, ngram
from llmjax.prepare.steps import scores

LESSON = "A prime number has exactly two divisors. For example, the number seven is prime because only one divides it."
CHAT = "lol omg u guys r sooo funny!!! brb gotta go, ttyl xoxo :-)"


def settings(**changes):
    return ConfigDict(
        {
            "perplexity_model": "",
            "perplexity_max": 0.0,
            "quality_model": "",
            "quality_min": 0.5,
            "toxicity_model": "",
            "toxicity_max": 0.5,
            "toxic_words_max": 0.02,
            **changes,
        }
    )


def two_kinds(count=60, *, noise=0.0):
    """Documents of two kinds that share most of their words, and their labels."""
    random = np.random.default_rng(0)
    shared = [f"word{k}" for k in range(40)]
    kinds = (["omg", "lol", "brb", "dude"], ["theorem", "proof", "lemma", "therefore"])
    texts, labels = [], []
    for k in range(2 * count):
        label = k % 2
        own = kinds[label if random.random() >= noise else 1 - label]
        words = [*random.choice(shared, 20), *random.choice(own, 3)]
        random.shuffle(words)
        texts.append(" ".join(words) + f" number {k}.")
        labels.append(label)
    return texts, labels


@pytest.fixture(scope="module")
def small_classifier():
    return classifier.train(*two_kinds())


@pytest.fixture(scope="module")
def small_ngram():
    wanted = [text for text, label in zip(*two_kinds(), strict=True) if label]
    return ngram.train(
        [LESSON * 3, "The sum of two even numbers is even. The proof is short.\n" * 4, *wanted], min_count=1
    )


# The n-gram model.


def kneser_ney_oracle(texts, order):
    """Interpolated modified Kneser-Ney by the book, over dictionaries: p(byte, context)."""
    top = Counter()
    for text in texts:
        data = bytes(order - 1) + text.encode()
        for end in range(order, len(data) + 1):
            top[data[end - order : end]] += 1
    raw, count = {order: top}, {order: top}
    for n in range(order - 1, 0, -1):
        raw[n], distinct = Counter(), Counter()
        for gram, times in raw[n + 1].items():
            raw[n][gram[1:]] += times
            distinct[gram[1:]] += 1
        count[n] = {gram: raw[n][gram] if gram[0] == 0 else distinct[gram] for gram in distinct}
    followers = {n: defaultdict(list) for n in count}
    for n, grams in count.items():
        for gram, times in grams.items():
            followers[n][gram[:-1]].append(times)
    discounts = {n: (0, *ngram.estimate_discounts(np.array(list(grams.values())))) for n, grams in count.items()}

    def probability(byte, context):
        n = len(context) + 1
        lower = probability(byte, context[1:]) if n > 1 else 1 / 256
        times = followers[n].get(context)
        if times is None:
            return lower
        own = count[n].get(context + byte, 0)
        kept = own - discounts[n][min(own, 3)]
        return (kept + sum(discounts[n][min(t, 3)] for t in times) * lower) / sum(times)

    return probability


@pytest.mark.parametrize("order", [2, 3, 6])
def test_ngram_costs_are_those_of_kneser_ney_by_the_book(order):
    texts = [LESSON, "A prime example of two numbers is here.", "even, odd, even, odd: prime"]
    model = ngram.train(texts, order=order, min_count=1)
    probability = kneser_ney_oracle(texts, order)
    data = bytes(order - 1) + "A number is prime; ödd".encode()
    expected = [-math.log2(probability(data[k : k + 1], data[k - order + 1 : k])) for k in range(order - 1, len(data))]
    found = ngram.byte_costs(model, np.frombuffer(data, np.uint8)) / ngram.UNITS_PER_BIT
    # A cost is made of at most order - 1 numbers, each rounded up to 1/2048 bit.
    assert np.all(found >= np.array(expected) - 1e-6)
    np.testing.assert_allclose(found, expected, atol=(order - 1) / ngram.UNITS_PER_BIT)


@pytest.mark.parametrize("min_count", [1, 2])
def test_probabilities_of_all_next_bytes_sum_to_at_most_one(min_count):
    model = ngram.train([LESSON, LESSON[10:], CHAT], min_count=min_count)
    for context in (b"\0\0\0\0\0", b"prime", b" two ", b"zzzzz", b"\0\0A p", "dé d".encode()[-5:]):
        data = np.array([[*context, byte] for byte in range(256)], np.uint8)
        total = sum(2.0 ** -(ngram.byte_costs(model, row)[0] / ngram.UNITS_PER_BIT) for row in data)
        assert 0.995 < total <= 1 + 1e-9


def test_the_entropy_of_a_known_source_is_recovered():
    random = np.random.default_rng(1)
    text = "".join(random.choice(list("abcd"), p=[0.5, 0.25, 0.125, 0.125], size=150_000))
    model = ngram.train([text[:100_000]], order=3)
    assert abs(ngram.score(model, [text[100_000:]])[0] - 1.75) < 0.01


def test_text_like_the_training_text_costs_less_than_other_text(small_ngram):
    like, chat, noise = ngram.score(
        small_ngram, ["The number two is prime. The proof is short.", CHAT, "\u0436\u044b\u0449"]
    )
    assert like < 2 < 4 < chat < noise


def test_a_saved_ngram_model_scores_the_same_and_the_file_is_the_same_each_time(small_ngram, tmp_path):
    ngram.save(small_ngram, tmp_path / "a.npz")
    again = ngram.load(tmp_path / "a.npz")
    texts = [LESSON, CHAT, "", "\u0436" * 10]
    assert ngram.score(again, texts).tobytes() == ngram.score(small_ngram, texts).tobytes()
    assert again.settings == small_ngram.settings
    ngram.save(again, tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]


def test_ngram_scores_do_not_depend_on_batching_and_long_documents_are_whole(small_ngram, monkeypatch):
    texts = [LESSON, "", CHAT * 40, "x", LESSON * 30]
    together = ngram.score(small_ngram, texts)
    alone = np.concatenate([ngram.score(small_ngram, [text]) for text in texts])
    monkeypatch.setattr(ngram, "BLOCK", 97)
    cut = ngram.score(small_ngram, texts)
    assert together.tobytes() == alone.tobytes() == cut.tobytes()
    data = np.frombuffer(bytes(5) + texts[2].encode(), np.uint8)
    assert together[2] == ngram.byte_costs(small_ngram, data).sum() / ngram.UNITS_PER_BIT / len(texts[2])


def test_the_order_of_training_documents_and_blocks_does_not_change_the_model(monkeypatch):
    texts = [LESSON, CHAT, LESSON[20:], "", "short"]
    model = ngram.train(texts, min_count=1)
    monkeypatch.setattr(ngram, "TRAIN_BLOCK", 120)
    again = ngram.train(texts[::-1], min_count=1)
    assert model.bigrams.tobytes() == again.bigrams.tobytes()
    for one, two in zip(model.levels, again.levels, strict=True):
        assert all(getattr(one, name).tobytes() == getattr(two, name).tobytes() for name in vars(one))


def test_rare_ngrams_can_be_left_out():
    full, pruned = (ngram.train([LESSON, LESSON[30:], CHAT], min_count=k) for k in (1, 2))
    assert [len(a.keys) < len(b.keys) for a, b in zip(pruned.levels, full.levels, strict=True)] == [
        False,
        True,
        True,
        True,
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": [""]}, "no text"),
        ({"texts": ["a"], "order": 7}, "from 2 to 6"),
        ({"texts": ["a"], "min_count": 0}, "at least 1"),
    ],
)
def test_an_ngram_model_that_cannot_be_trained_says_why(arguments, message):
    with pytest.raises(ValueError, match=message):
        ngram.train(**arguments)


@pytest.mark.parametrize("module", [ngram, classifier])
def test_a_damaged_model_file_is_a_clear_error(module, small_ngram, small_classifier, tmp_path):
    path = tmp_path / "model.npz"
    module.save(small_ngram if module is ngram else small_classifier, path)
    whole = path.read_bytes()
    for damaged in (
        b"",
        b"not a model",
        whole[: len(whole) // 2],
        whole[:-30],
        whole[:200] + b"\xff" * 60 + whole[260:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.npz: .*train it again"):
            module.load(path)
    with pytest.raises(ValueError, match="no such model file"):
        module.load(tmp_path / "none.npz")


def test_a_model_of_another_kind_or_of_a_later_version_is_refused(small_ngram, tmp_path):
    ngram.save(small_ngram, tmp_path / "model.npz")
    with pytest.raises(ValueError, match="kind 'ngram', not 'classifier'"):
        classifier.load(tmp_path / "model.npz")
    ngram.write_arrays(tmp_path / "later.npz", "ngram", ngram.FORMAT + 1, {}, {})
    with pytest.raises(ValueError, match="update llmjax"):
        ngram.load(tmp_path / "later.npz")


def test_a_model_file_with_a_pickle_in_it_is_refused(tmp_path):
    np.savez(tmp_path / "pickle.npz", header=np.array([{"kind": "ngram"}], dtype=object))
    with pytest.raises(ValueError, match="not a saved model"):
        ngram.load(tmp_path / "pickle.npz")


# The classifier.


def test_learning_separates_what_can_be_separated(small_classifier):
    assert small_classifier.metrics["auroc"] > 0.99
    wanted, other = classifier.score(small_classifier, ["word1 theorem proof word2", "word1 omg lol word2"])
    assert other < 0.3 < 0.7 < wanted


def test_labels_without_meaning_give_a_classifier_without_skill():
    texts, _ = two_kinds(150)
    labels = np.random.default_rng(3).integers(0, 2, len(texts)).tolist()
    assert abs(classifier.train(texts, labels).metrics["auroc"] - 0.5) < 0.25


def test_flipped_labels_flip_the_scores(small_classifier):
    texts, labels = two_kinds()
    flipped = classifier.train(texts, [1 - label for label in labels])
    np.testing.assert_allclose(
        classifier.score(flipped, texts), 1 - classifier.score(small_classifier, texts), atol=1e-3
    )


def test_a_saved_classifier_scores_the_same(small_classifier, tmp_path):
    classifier.save(small_classifier, tmp_path / "model.npz")
    texts = [*two_kinds()[0], "", "\u6570\u5b66 \u5b9a\u7406", "x" * 5000]
    again = classifier.load(tmp_path / "model.npz")
    assert classifier.score(again, texts).tobytes() == classifier.score(small_classifier, texts).tobytes()
    assert again.metrics == json.loads(json.dumps(small_classifier.metrics))


def test_training_twice_gives_the_same_model(small_classifier):
    again = classifier.train(*two_kinds())
    assert again.weights.tobytes() == small_classifier.weights.tobytes()
    assert again.metrics == small_classifier.metrics


def test_classifier_scores_do_not_depend_on_batching(small_classifier, monkeypatch):
    texts = [*two_kinds()[0][:20], "", LESSON, CHAT * 30, "\u201cquoted\u201d\u2014\u4f60\u597d"]
    together = classifier.score(small_classifier, texts)
    alone = np.concatenate([classifier.score(small_classifier, [text]) for text in texts])
    monkeypatch.setattr(classifier, "DOCUMENTS", 3)
    assert together.tobytes() == alone.tobytes() == classifier.score(small_classifier, texts).tobytes()


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        ("The proof", "the PROOF", True),
        ("in 1987", "in 2024", True),
        ("wait\u2014what", "wait what", True),  # a dash parts words
        ("\u00abmot\u00bb", "mot", True),
        ("dog bites man", "man bites dog", False),  # pairs know the order
        ("\u4f60\u597d", "\u597d\u4f60", False),
        ("caf\u00e9", "cafe", False),
    ],
)
def test_hashed_words_see_what_they_should(one, two, same):
    a, b = (classifier.features([text]).toarray() for text in (one, two))
    assert np.array_equal(a, b) == same


def test_hashed_words_of_a_document_have_length_one_and_repeated_words_count_by_their_logarithm():
    found = classifier.features(["Ab 12. cd!\nEf", "", "aa"]).toarray()
    np.testing.assert_allclose(np.square(found).sum(axis=1), [1, 0, 1])
    once, often = (classifier.features([text]).toarray() for text in ("aa bb", "aa aa aa bb"))
    word = np.flatnonzero(found[2])
    ratio = (often[0, word] / once[0, word])[0]
    left = np.count_nonzero(often) - 1  # bb and the pairs, once or twice each
    assert left == 3 and ratio == pytest.approx((1 + math.log(3)) / np.linalg.norm([1 + math.log(3), 1, 1 + math.log(2), 1])
                                                * math.sqrt(3))  # fmt: skip


def test_equal_documents_and_groups_are_on_one_side_of_the_split():
    texts = [f"text {k % 50}" for k in range(200)]
    labels = np.array([k % 50 % 2 for k in range(200)])
    part = classifier._split(texts, labels, None, 0)
    assert all(len({part[j] for j in range(200) if texts[j] == text}) == 1 for text in texts)
    groups = [str(k // 4) for k in range(200)]
    part = classifier._split([str(k) for k in range(200)], labels, groups, 0)
    assert all(len(set(part[4 * k : 4 * k + 4].tolist())) == 1 for k in range(50))
    assert {0, 1, 2} == set(part.tolist())


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        (["a"] * 30, [1] * 30, "negative documents: 0, at least 20"),
        (["a"] * 40, [1] * 10 + [0] * 30, "positive documents: 10, at least 20"),
        (["a"] * 40, [1] * 20 + [0] * 19, "40 documents and 39 labels"),
        (["a"] * 40, [1] * 20 + [0] * 20, "documents of more groups"),
        ([str(k) for k in range(60)], [1] * 20 + [0] * 20 + [2] * 20, "labels must be 0 or 1"),
    ],
)
def test_a_classifier_that_cannot_be_trained_says_how_to_mend_it(texts, labels, message):
    with pytest.raises(ValueError, match=message):
        classifier.train(texts, labels)


def test_a_classifier_without_scikit_learn_says_what_to_install(small_classifier, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    classifier._vectorizer.cache_clear()
    for use in (lambda: classifier.train(*two_kinds()), lambda: classifier.score(small_classifier, ["text"])):
        with pytest.raises(ValueError, match=r"pip install 'llmjax\[data\]'"):
            use()


def test_a_classifier_of_an_earlier_version_is_refused_with_advice(tmp_path):
    ngram.write_arrays(tmp_path / "old.npz", "classifier", 1, {"weights": np.zeros(4)}, {})
    with pytest.raises(ValueError, match="train it again with llmjax classify"):
        classifier.load(tmp_path / "old.npz")


def test_training_from_files_saves_what_it_measured(tmp_path):
    texts, labels = two_kinds()
    for label, name in ((1, "good.jsonl"), (0, "bad.jsonl")):
        rows = [json.dumps({"text": text}) for text, own in zip(texts, labels, strict=True) if own == label]
        (tmp_path / name).write_text("\n".join(rows) + "\n", encoding="utf-8")
    (tmp_path / "more.txt").write_text("\n\n".join([LESSON + " theorem"] * 60), encoding="utf-8")
    metrics = classifier.train_from_files(
        [tmp_path / "good.jsonl", tmp_path / "more.txt"], [tmp_path / "bad.jsonl"], tmp_path / "out" / "model.npz"
    )
    assert metrics["held_out"] == "documents" and metrics["auroc"] > 0.9
    assert classifier.load(tmp_path / "out" / "model.npz").metrics == json.loads(json.dumps(metrics))
    assert len(classifier.read_documents([tmp_path / "more.txt"])[0]) == 4  # about 2,000 characters each


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"tex', "bad.jsonl:2: .*field 'text'"),
        (b'{"body": 1}', "bad.jsonl:1"),
        (b"\xff\xfe\x80", "UTF-8"),
    ],
)
def test_a_training_file_that_cannot_be_read_is_named(content, message, tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(content)
    (tmp_path / "good.txt").write_text("text")
    with pytest.raises(ValueError, match=message):
        classifier.train_from_files([tmp_path / "good.txt"], [tmp_path / "bad.jsonl"], tmp_path / "model.npz")


def test_training_from_files_needs_two_different_classes(tmp_path):
    (tmp_path / "good.txt").write_text("text")
    with pytest.raises(ValueError, match="no negative files"):
        classifier.train_from_files([tmp_path / "good.txt"], [], tmp_path / "model.npz")
    with pytest.raises(ValueError, match="both positive and negative"):
        classifier.train_from_files([tmp_path / "good.txt"], [tmp_path / "good.txt"], tmp_path / "model.npz")
    with pytest.raises(ValueError, match=r"none\.txt: cannot be read"):
        classifier.train_from_files([tmp_path / "good.txt"], [tmp_path / "none.txt"], tmp_path / "model.npz")


# Calibration and measures.


def sigmoid(logits):
    return 1 / (1 + np.exp(-logits))


@pytest.mark.parametrize("stretch", [6.0, 0.1])
def test_calibration_lowers_the_error_of_scores_that_are_too_sure_or_too_timid(stretch):
    true = np.random.default_rng(0).normal(0, 1.5, (2, 4000))
    labels = (np.random.default_rng(1).random(true.shape) < sigmoid(true)).astype(int)
    slope, offset = classifier.platt(stretch * true[0], labels[0])
    before = classifier.calibration_error(sigmoid(stretch * true[1]), labels[1])
    after = classifier.calibration_error(sigmoid(slope * stretch * true[1] + offset), labels[1])
    assert before > 0.1 and after < 0.04


def test_platt_recovers_slope_and_offset():
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, 20_000)
    slope, offset = classifier.platt(logits, (random.random(20_000) < sigmoid(0.5 * logits - 1)).astype(int))
    assert abs(slope - 0.5) < 0.03 and abs(offset + 1) < 0.06


def test_platt_stays_finite_on_separable_scores():
    slope, offset = classifier.platt(np.array([-3.0, -2, 2, 3]), np.array([0, 0, 1, 1]))
    low, high = sigmoid(slope * np.array([-3.0, 3.0]) + offset)
    assert 0.1 < low < 0.3 and 0.7 < high < 0.9


def test_measures_by_hand():
    scores, labels = np.array([0.9, 0.8, 0.4, 0.3, 0.3]), np.array([1, 0, 1, 0, 1])
    found = classifier.measures(scores, labels)
    assert found["auroc"] == pytest.approx((2 + 1 + 0.5) / 6)
    assert found["accuracy"] == 0.4 and found["precision"] == 0.5 and found["recall"] == pytest.approx(1 / 3)
    assert found["f1"] == pytest.approx(0.4)
    # Bins of 1/15: 0.9 | 0.8 | 0.4 | two of 0.3, of which one is positive.
    assert found["calibration_error"] == pytest.approx((0.1 + 0.8 + 0.6 + 2 * 0.2) / 5)
    with pytest.raises(ValueError, match="both classes"):
        classifier.measures(np.zeros(3), np.ones(3))


def test_the_kept_report_by_hand():
    rows = classifier.kept_report(np.array([0.8, 0.6, 0.2]), np.array([100, 300, 600]), np.array([1, 0, 1]))
    assert [row for row in rows if row["threshold"] == 0.5] == [
        {
            "threshold": 0.5,
            "documents_kept": pytest.approx(2 / 3),
            "words_kept": pytest.approx(0.4),
            "precision": 0.5,
            "recall": 0.5,
        }
    ]
    assert rows[-1]["documents_kept"] == rows[-1]["words_kept"] == rows[-1]["recall"] == 0.0


# Word lists.


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("en", "Scunthorpe, Penistone and Lightwater; the assassin classified a cockpit in Phuket, Pakistan."),
        (
            "en",
            "The breast and the penis were examined; rectal, anal and vaginal swabs for sexual health; sperm count.",
        ),
        ("en", "Gay, lesbian, queer and transgender people met; a black woman spoke about disability and autism."),
        (
            "en",
            "He rode an ass, the cock crowed, a great tit sang, the bitumen dried; Moby Dick; cum laude; ABO groups.",
        ),
        (
            "en",
            "Slutsky's equation, Wigger's law, the Bellenden Ker family, Alan Cumming, Federico Faggin, Niger, Nigeria.",
        ),
        (
            "en",
            "Retarded potentials; spastic diplegia; the transmission (tranny) slips; a chink in the armour; kaffir lime.",
        ),
        ("en", "2 * 3 * 4 = 24, a5 b6 0x455 h3ll0 $100 @home a * b ** c"),
        ("en", "A. B. C. D. and u s a, i e, e g"),
        (
            "de",
            "Das ist dick und mit Schwanz; die Dampfmaschine; der Neigerspalt; Johnny Depp; ins Gas treten; Fächer.",
        ),
        ("fr", "Un con de pommes au four; le canard; la bite d'amarrage; la queue; il constate; égorger un mouton."),
        ("es", "Un Pajero con negro y huevos; el pinche de cocina computa; disputas; reputación; la verga del barco."),
        ("it", "Il forno, le analisi, l'uccello; Ferruccio Busoni; il finocchio; palazzo, razzo."),
        ("pt", "O cuscuz, o pau, a rapariga, a bicha para o pão; computador; disputa; porreiro."),
        ("nl", "Een patient met kanker; de pot; het varken; de schoft van het paard; kuit; salade."),
        ("sv", "Slut på programmet; bra fart; en fan av musik; hund; ficus; horisont; satt; as."),
    ],
)
def test_innocent_words_are_not_counted(language, text):
    assert scores.toxic_words(lexicons.load(language), text) == ({}, 0.0)


@pytest.mark.parametrize("text", ["motherf*cker", "f u c k", "F.U.C.K.", "@sshole", "a$$hole", "b1tch", "\u0441unt"])
def test_words_in_other_disguises_are_found(text):
    assert scores.toxic_words(lexicons.load("en"), text)[0] == {"profanity": 1}


@pytest.mark.parametrize(
    "text",
    ["what sh1t", "what SHIT!", "sh!t", "$hit", "fuuuuuck", "f*ck", "f**k", "f*cking", "SH*T"],
)
def test_disguised_words_are_found(text):
    hits, share = scores.toxic_words(lexicons.load("en"), text)
    assert hits == {"profanity": 1} and share > 0


@pytest.mark.parametrize("language", lexicons.LANGUAGES)
def test_every_list_finds_its_own_words_and_says_its_licence(language):
    lexicon = lexicons.load(language)
    for words in (lexicon.words, lexicon.stems):
        for word, section in words.items():
            assert lexicons.find(lexicon, f"x, {word.upper()}; x")[0].get(section), word
    for phrase, section in lexicon.phrases.items():
        assert lexicons.find(lexicon, f"so {' '.join(phrase)} now")[0].get(section), phrase
    path = lexicons.FOLDER / f"{language}.txt"
    assert "SPDX-License-Identifier: Apache-2.0" in path.read_text(encoding="utf-8").splitlines()[0]


def test_a_megabyte_without_a_space_is_one_word_and_soon_done():
    lexicon = lexicons.load("en")
    assert lexicons.find(lexicon, "fuck" * 250_000) == ({}, 1)
    assert lexicons.find(lexicon, "a " * 250_000) == ({}, 250_000)


def test_an_ambiguous_word_counts_only_beside_another():
    lexicon = lexicons.load("en")
    assert scores.toxic_words(lexicon, "the stupid ass stood")[0] == {}
    assert scores.toxic_words(lexicon, "the stupid ass stood in shit")[0] == {"ambiguous": 2, "profanity": 1}


def test_names_that_groups_use_for_themselves_never_count():
    text = "fuck: gay, lesbian, queer, trans, black, Jewish, Muslim, Roma, disabled and autistic people"
    assert scores.toxic_words(lexicons.load("en"), text)[0] == {"profanity": 1}
    assert scores.toxic_words(lexicons.load("sv"), "fuck: b\u00f6gar, flator, judar, romer")[0] == {"profanity": 1}


def test_an_unknown_list_and_a_broken_list_are_errors(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"no word list 'xx': there are british, de, en"):
        lexicons.load("xx")
    monkeypatch.setattr(lexicons, "FOLDER", tmp_path)
    for name, content, message in (
        ("aa", "word\n", "in no"),
        ("bb", "[a]\nword\n[b]\nWord\n", "bb.txt:4: 'word'.*twice"),
    ):
        (tmp_path / f"{name}.txt").write_text(content)
        with pytest.raises(ValueError, match=message):
            lexicons.load(name)


# The bias report.


def test_bias_counts_by_hand():
    text = "The women were brilliant. A terrible storm came. Old people are kind, the elderly are lonely!"
    table = bias.counts(make_batch([{"text": text, "language": "en"}]))
    rows = {row["term"]: [row[name] for name in bias.COUNTS] for row in table.to_pylist() if row["documents"]}
    assert rows["women"] == [1, 1, 1, 0]
    assert rows["old people"] == [1, 1, 1, 1]
    assert rows["elderly"] == [1, 1, 1, 1]
    # All 16 words; a word of feeling is not near itself. Positive: 3 of the first sentence's others, 7 of the last's.
    assert rows["all words"] == [1, 16, 10, 10]


def test_words_far_away_or_in_another_sentence_are_not_near():
    far = "women " + "word " * 10 + "brilliant"
    near = "women " + "word " * 9 + "brilliant"
    count = {
        text: bias.count_texts([text])[:, 2] for text in (far, near, "women here. brilliant", "women here\nbrilliant")
    }
    row = [term for _, term in bias.rows()].index("women")
    assert [int(found[row]) for found in count.values()] == [0, 1, 0, 0]


def test_bias_counts_leave_out_rejected_and_foreign_documents_and_add_up():
    rows = [{"text": f"The women were {word}.", "language": "en"} for word in ("good", "evil", "kind", "tall")]
    batch = make_batch(rows)
    whole = bias.counts(batch)
    assert bias.add([bias.counts(batch.slice(0, 1)), bias.counts(batch.slice(1))]).equals(whole)
    assert bias.counts(reject(batch, {0: "x", 1: "x", 2: "x", 3: "x"})).equals(bias.add([]))
    assert bias.counts(make_batch([{"text": "Die women good", "language": "de"}])).equals(bias.add([]))
    with pytest.raises(ValueError, match="count all shards again"):
        bias.add([whole.slice(1)])


def test_a_planted_bias_is_reported_and_its_removal_shows():
    neutral = [
        {"text": f"The {who} walked to the market on day {k}."} for k in range(30) for who in ("immigrant", "boy")
    ]
    praise = [{"text": f"A wonderful tree number {k} stood here."} for k in range(30)]
    planted = [{"text": f"The immigrant is a vicious criminal, they say, number {k}."} for k in range(40)]
    batch = make_batch([*neutral, *praise, *planted])
    kept = reject(batch, dict.fromkeys(range(len(neutral) + len(praise), batch.num_rows), "toxicity: 0.9"))
    found = bias.report(bias.counts(batch), bias.counts(kept))
    terms = {entry["term"]: entry for entry in found["terms"]}
    assert set(terms) == {"immigrant", "boy"}
    before, after = terms["immigrant"]["before"], terms["immigrant"]["after"]
    assert before["negative_flag"] == "above" and before["negative_rate"] == pytest.approx(40 / 70)
    low, high = before["negative_interval"]
    assert low < 40 / 70 < high and before["negative_pmi"] > 0
    assert (
        after["negative_rate"] == 0
        and after["negative_pmi"] is None
        and terms["immigrant"]["lost"] == pytest.approx(40 / 70)
    )
    assert terms["boy"]["before"]["negative_flag"] == "below" and terms["boy"]["lost"] == 0
    json.dumps(found)
    assert bias.to_html(found).count("<tr>") == 4
    assert "<td>immigrant</td><td>70</td><td>42.9%</td>" in bias.to_html(found)


def test_wilsons_interval_by_hand():
    assert bias.interval(0, 0) == (0.0, 1.0)
    low, high = bias.interval(8, 10)  # 0.4902 to 0.9433, as in the literature's tables
    assert (round(low, 3), round(high, 3)) == (0.49, 0.943)


# The steps.


@pytest.fixture(scope="module")
def steps(small_ngram, small_classifier, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    ngram.save(small_ngram, folder / "ngram.npz")
    classifier.save(small_classifier, folder / "classifier.npz")
    own = settings(
        perplexity_model=str(folder / "ngram.npz"),
        perplexity_max=4.0,
        quality_model=str(folder / "classifier.npz"),
        toxicity_model=str(folder / "classifier.npz"),
    )
    return {name: getattr(scores, name)(own) for name in ("perplexity", "quality", "toxicity")}


ROWS = [
    {"text": "word3 theorem word7 proof word9 word12 lemma number 7.", "language": "en"},
    {"text": "omg lol brb dude, this is shit, fuck it", "language": ""},
    {"text": "omg lol shit fuck", "language": "en", "reason": "language: xx", "facts": '{"a": 1}'},
    {"text": None, "data": b"raw", "format": "html"},
    {"text": "", "language": "en"},
    {"text": "Slut p\u00e5 det, omg lol.", "language": "sv"},
    {"text": "Putain de merde, omg", "language": "fr"},
    {"text": "shit shit shit lemma proof theorem", "language": "zh"},
]


@pytest.mark.parametrize("name", ["perplexity", "quality", "toxicity"])
def test_a_step_leaves_rejected_rows_and_all_other_columns_alone(steps, name):
    batch = make_batch(ROWS)
    out = steps[name](batch)
    assert out.schema == batch.schema and out.num_rows == batch.num_rows
    for row in (2, 3):
        assert out.slice(row, 1).equals(batch.slice(row, 1))
    untouched = [column for column in batch.schema.names if column not in ("reason", "facts")]
    assert out.select(untouched).equals(batch.select(untouched))


@pytest.mark.parametrize("name", ["perplexity", "quality", "toxicity"])
def test_a_step_does_not_depend_on_batching(steps, name):
    batch = make_batch(ROWS * 3)
    out = steps[name](batch)
    for size in (1, 5):
        pieces = [steps[name](batch.slice(start, size)) for start in range(0, batch.num_rows, size)]
        assert [row for piece in pieces for row in piece.to_pylist()] == out.to_pylist()
    assert steps[name](batch.slice(0, 0)).num_rows == 0


def outcome(step, rows):
    out = step(make_batch(rows))
    return out["reason"].to_pylist(), [json.loads(facts) if facts else {} for facts in out["facts"].to_pylist()]


def test_perplexity_rejects_above_its_limit(steps, small_ngram):
    reasons, facts = outcome(steps["perplexity"], ROWS)
    expected = float(ngram.score(small_ngram, [ROWS[1]["text"]])[0])
    assert reasons[0] == "" and reasons[1] == f"perplexity: {expected:.2f} bits a byte" and expected > 4
    assert facts[1] == {"perplexity.bits_per_byte": round(expected, 4)} and facts[2] == {"a": 1}


def test_perplexity_without_a_limit_only_scores(small_ngram, tmp_path):
    ngram.save(small_ngram, tmp_path / "ngram.npz")
    reasons, facts = outcome(scores.perplexity(settings(perplexity_model=str(tmp_path / "ngram.npz"))), ROWS[:2])
    assert reasons == ["", ""] and all("perplexity.bits_per_byte" in found for found in facts)


def test_quality_rejects_below_its_limit(steps, small_classifier):
    reasons, facts = outcome(steps["quality"], ROWS)
    expected = float(classifier.score(small_classifier, [ROWS[1]["text"]])[0])
    assert reasons[0] == "" and reasons[1] == f"quality: {expected:.2f}" and expected < 0.5
    assert facts[1] == {"quality": round(expected, 4)}


def test_toxicity_reports_words_of_the_documents_language_and_the_classifier(steps):
    reasons, facts = outcome(steps["toxicity"], ROWS)
    assert facts[1]["toxic_words"] == pytest.approx(2 / 9, abs=1e-6) and facts[1]["toxic_words.profanity"] == 2
    assert reasons[1] == "toxic_words: 0.222 of words"
    assert facts[5]["toxic_words"] == 0 and reasons[5] == ""  # "slut" is Swedish for "end"
    assert reasons[6].startswith("toxic_words")
    assert "toxic_words" not in facts[7]  # no list of that language: the classifier alone
    assert reasons[0].startswith("toxicity: ") and 0.5 < facts[0]["toxicity"] < 1


def test_toxicity_by_words_alone_spares_one_swear_word_but_not_a_slur_or_threat():
    step = scores.toxicity(settings())
    reasons, facts = outcome(
        step,
        [
            {"text": "That was a bloody shit day for us."},
            {"text": "Go kill yourself now please, all of you."},
            {"text": "They are faggots."},
            {"text": "A long and calm text. " * 100 + "shit, fuck", "language": "en_GB"},
        ],
    )
    assert [reason.split(":")[0] for reason in reasons] == ["", "toxic_words", "toxic_words", ""]
    assert facts[3]["toxic_words.profanity"] == 2 and "toxicity" not in facts[3]


@pytest.mark.parametrize("name", ["perplexity", "quality"])
def test_a_step_without_its_model_says_which_setting_is_missing(name):
    with pytest.raises(ValueError, match=f"set.* prepare.{name}_model"):
        getattr(scores, name)(settings())


@pytest.mark.parametrize("name", ["perplexity", "quality", "toxicity"])
def test_a_step_whose_model_file_is_missing_names_it(name):
    with pytest.raises(ValueError, match=r"none\.npz: there is no such model file"):
        getattr(scores, name)(settings(**{f"{name}_model": "none.npz"}))


@pytest.mark.slow
def test_the_benchmark_measures_what_is_there_and_names_what_is_not(tmp_path):
    import classifiers

    (tmp_path / "text").mkdir()
    chat = [f"Guy {k}: lol dude number {k} omg{' shit' if k % 3 else ''} brb\n" * 10 for k in range(400)]
    (tmp_path / "text" / "webtext-overheard.txt").write_text("".join(chat), encoding="utf-8")
    results = classifiers.run(tmp_path, scale=0.2, folder=tmp_path)
    assert {"speeches", "science", "forum", "encyclopedia"} <= set(results["missing"])
    assert results["quality"]["auroc"] > 0.9
    bits = results["ngram"]["min_count 2"]["bits_per_byte"]
    assert bits["topics"] < bits["chat"]
    assert results["toxicity"]["documents above 2% of words on the lists"]["chat"] > 0.9
    assert "left_out" in results["toxicity"]["rude chat against forum, encyclopedia"]
    assert 0 <= results["toxicity"]["around words of the lists, in chat"]["auroc"] <= 1
    assert json.loads(json.dumps(results)) == results
