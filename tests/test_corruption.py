"""What each objective makes of a row of text has the properties that its paper states."""

import dataclasses

import numpy as np
import pytest

from llmjax.config import base
from llmjax.data.batches import pack
from llmjax.data.tokenizer import byte_tokenizer
from llmjax.objectives import OBJECTIVES, corruption, special_ids
from llmjax.objectives.masking import UNILM_TYPES, words
from llmjax.objectives.span import counts, random_spans

TOKENIZER = byte_tokenizer()
PIECES = TOKENIZER.piece_bytes
LENGTH = 128


def make_config(name, length=LENGTH, **changes):
    c = base()
    c.objective.name, c.train.sequence_length = name, length
    for key, value in changes.items():
        section, _, rest = key.partition("__")
        (c[section] if rest else c.objective)[rest or key] = value
    return c


def text_row(seed, length=LENGTH, documents=3):
    """A row of documents of random words, cut like a window of a stream: it begins and ends inside a document."""
    rng = np.random.default_rng(seed)
    ids = []
    while len(ids) < length + 40:
        size = rng.integers(length // documents // 2, length // documents + 9)
        text = " ".join("".join(map(chr, rng.integers(97, 123, rng.integers(1, 9)))) for _ in range(size // 5))
        ids += [1, *TOKENIZER.encode(text), 2]
    return np.array(ids[20 : 20 + length + 1])


def apply(c, seed, row=None):
    """(row as packed, the same after the objective, special ids)."""
    change = corruption(c, TOKENIZER)
    row = text_row(seed, change.tokens) if row is None else row
    packed = {name: values[0] for name, values in pack([row[: change.tokens + 1]], length=change.tokens).items()}
    if c.model.languages:
        packed["languages"] = np.where(packed["segments"] > 0, (packed["segments"] + 1) % 2, 0).astype(np.int32)
    before = {name: values.copy() for name, values in packed.items()}
    after = change.transform(packed, np.random.default_rng((7, seed)))
    for name in packed:
        np.testing.assert_array_equal(packed[name], before[name], err_msg="the row that was given is not changed")
    return before, after, special_ids(c.objective, TOKENIZER)


CONFIGS = {
    "masked": {},
    "masked whole words": {"whole_words": True},
    "translation": {"model__languages": 2},
    "unilm": {},
    "permutation": {},
    "permutation in parts": {"recurrence": 2},
    "prefix": {},
    "infill": {"infill_rate": 1.0},
    "span": {"model__encoder_layers": 1},
    "span without encoder": {},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_rows_have_one_shape_and_one_generator_gives_one_row(case):
    c = make_config(case.split()[0], **CONFIGS[case])
    empty = np.zeros(0, np.int32)
    made = [apply(c, seed)[1] for seed in range(4)] + [apply(c, 0, row)[1] for row in (empty, np.array([1, 9]))]
    for row in made[1:]:
        assert {k: (v.shape, v.dtype) for k, v in row.items()} == {k: (v.shape, v.dtype) for k, v in made[0].items()}
    again = apply(c, 2)[1]
    for name, values in made[2].items():
        np.testing.assert_array_equal(values, again[name], err_msg=name)
    assert any((made[1][name] != made[2][name]).any() for name in made[1])
    assert made[-2]["weights"].sum() == 0, "padding asks for nothing"
    for name, values in made[0].items():
        assert values.dtype == (np.float32 if name == "weights" else np.int32)


@pytest.mark.parametrize("case", CONFIGS)
def test_ids_fit_in_what_the_objective_says_it_needs_and_padding_is_never_asked_for(case):
    c = make_config(case.split()[0], **CONFIGS[case])
    for seed in range(5):
        _, row, special = apply(c, seed)
        assert max(row["tokens"].max(), row["targets"].max()) < special.size
        segments = row["query_segments"] if "query_segments" in row else row["segments"]
        assert (segments[row["weights"] > 0] > 0).all()


# ------------------------------------------------------------------ masked


def test_masked_hides_exactly_its_share_in_the_published_split_and_nothing_special():
    c = make_config("masked")
    counted = np.zeros(3)
    for seed in range(300):
        before, after, special = apply(c, seed)
        text = special.is_text[before["tokens"]]
        chosen = after["weights"] > 0
        assert chosen.sum() == round(0.15 * text.sum())
        assert text[chosen].all()
        np.testing.assert_array_equal(after["targets"], before["tokens"])
        np.testing.assert_array_equal(after["tokens"][~chosen], before["tokens"][~chosen])
        for name in ("positions", "segments"):
            np.testing.assert_array_equal(after[name], before[name])
        now, then = after["tokens"][chosen], before["tokens"][chosen]
        counted += [(now == special.mask).sum(), ((now != special.mask) & (now != then)).sum(), (now == then).sum()]
        assert special.is_text[now[now != special.mask]].all()
    total = counted.sum()
    tolerance = 4 * np.sqrt(0.25 / total)
    np.testing.assert_allclose(counted / total, [0.8, 0.1, 0.1], atol=tolerance)


def test_whole_words_are_hidden_whole_and_end_at_documents():
    c = make_config("masked", whole_words=True, mask_rate=0.3)
    for seed in range(20):
        before, after, special = apply(c, seed)
        found = words(before["tokens"], before["segments"], special)
        units = [found.places[found.numbers == number] for number in range(found.numbers.max() + 1)]
        assert sorted(np.concatenate(units)) == np.flatnonzero(special.is_text[before["tokens"]]).tolist()
        for unit in units:
            assert len(set(after["weights"][unit])) == 1
            assert len(set(before["segments"][unit])) == 1
            assert not special.starts_word[before["tokens"][unit[1:]]].any()
        text = b"".join(PIECES[i] for i in before["tokens"][units[1]])
        assert text.count(b" ") <= 1 and not text.rstrip(b" ").count(b" ", 1)
        assert 0 < after["weights"].sum() <= round(0.3 * special.is_text[before["tokens"]].sum())


def test_translation_joins_each_pair_and_hides_in_both_languages():
    c = make_config("translation", model__languages=2, mask_rate=0.5)
    pair = [1, *TOKENIZER.encode("the earth"), 2, 1, *TOKENIZER.encode("la terre"), 2]
    before, after, _ = apply(c, 3, np.array(pair * 3))
    first, second = len(b"the earth") + 2, len(b"la terre") + 2
    for number in range(3):
        here = slice(number * len(pair), (number + 1) * len(pair))
        assert set(after["segments"][here]) == {number + 1}
        assert after["positions"][here].tolist() == [*range(first), *range(second)]
        assert after["languages"][here].tolist() == [0] * first + [1] * second
        weights = after["weights"][here]
        assert weights[:first].any() and weights[first:].any()
    assert before["segments"].max() == 6


def test_translation_of_a_row_in_one_language_is_masked():
    c = make_config("translation")
    change = corruption(c, TOKENIZER).transform
    plain = {name: values[0] for name, values in pack([text_row(1)], length=LENGTH).items()}
    row = {**plain, "languages": np.ones(LENGTH, np.int32)}
    made = change(row, np.random.default_rng(4))
    other = corruption(make_config("masked"), TOKENIZER).transform(row, np.random.default_rng(4))
    for name, values in other.items():
        np.testing.assert_array_equal(made[name], values)


# ------------------------------------------------------------------ unilm


def sees(row):
    """(L, L) bool: who sees whom, by segments and orders."""
    same = (row["segments"][:, None] == row["segments"][None]) & (row["segments"] > 0)[None]
    return same & (row["orders"][None] <= row["orders"][:, None])


def test_unilm_rows_see_what_their_mode_says_and_carry_its_types():
    found = {}
    for seed in range(60):
        _, row, special = apply(make_config("unilm"), seed)
        mode = next(name for name, pair in UNILM_TYPES.items() if row["types"][0] == pair[0])
        found[mode] = found.get(mode, 0) + 1
        same = (row["segments"][:, None] == row["segments"][None]) & (row["segments"] > 0)[None]
        lower = np.tril(np.ones_like(same))
        seps = row["targets"] == special.sep
        first = row["types"] == UNILM_TYPES[mode][0]
        expected = {
            "bidirectional": same,
            "left": same & lower,
            "right": same & lower.T,
            "sequence": same & np.where(first[:, None], first[None], first[None] | lower),
        }[mode]
        real = row["segments"] > 0
        np.testing.assert_array_equal(sees(row)[real], expected[real])
        assert seps.any() == (mode in ("bidirectional", "sequence"))
        if seps.any():  # <sep> closes the first part of every document
            for segment in np.unique(row["segments"][real]):
                here = row["segments"] == segment
                assert np.flatnonzero(first[here])[-1] == np.flatnonzero(seps[here])[0]
                assert seps[here].sum() == 1
        chosen = row["weights"] > 0
        assert special.is_text[row["targets"][chosen]].all()
        assert chosen.sum() <= round(0.15 * special.is_text[row["targets"]].sum())
        assert (row["positions"][real] == [sum(row["segments"][:i] == s) for i, s in enumerate(row["segments"])][: real.sum()]).all()  # fmt: skip
    assert set(found) == set(UNILM_TYPES)


def test_unilm_draws_its_modes_by_their_weights():
    c = make_config("unilm", modes=(0.0, 0.0, 1.0, 0.0))
    assert {apply(c, seed)[1]["types"][0] for seed in range(9)} == {3}


# ------------------------------------------------------------------ permutation


@pytest.mark.parametrize("parts", [1, 4])
def test_permutation_predicts_the_last_of_the_order_each_seeing_context_and_earlier_ranks(parts):
    c = make_config("permutation", recurrence=parts)
    size = LENGTH // parts
    for seed in range(20):
        before, row, special = apply(c, seed)
        asked = row["weights"] > 0
        assert len(asked) == parts * max(1, round(size * 0.1667))
        places = row["query_places"] + np.repeat(np.arange(parts) * size, len(asked) // parts)
        np.testing.assert_array_equal(row["tokens"], before["tokens"])
        np.testing.assert_array_equal(row["targets"][asked], before["tokens"][places][asked])
        assert special.is_text[row["targets"][asked]].all()
        for part in range(parts):
            here = slice(part * size, (part + 1) * size)
            mine = asked & (np.arange(len(asked)) // (len(asked) // parts) == part)
            orders = row["orders"][here]
            number = mine.sum()
            assert sorted(orders) == [0] * (size - number) + list(range(1, number + 1))
            np.testing.assert_array_equal(orders[row["query_places"][mine]], row["query_orders"][mine])
            np.testing.assert_array_equal(before["segments"][here][row["query_places"][mine]], row["query_segments"][mine])  # fmt: skip
            # every document has context, so no prediction is made from nothing
            assert set(row["query_segments"][mine]) <= set(before["segments"][here][orders == 0])


def test_a_document_without_special_tokens_keeps_one_token_as_context():
    c = make_config("permutation", length=16, predict_share=0.9)
    for seed in range(10):
        _, row, _ = apply(c, seed, np.array(TOKENIZER.encode("abcdefghijklmnopq")))
        assert row["weights"].sum() == 14 and row["orders"][-1] == 0


# ------------------------------------------------------------------ prefix, infill


def test_prefixes_see_themselves_and_only_what_follows_is_predicted():
    c = make_config("prefix")
    shares = []
    for seed in range(200):
        before, row, _ = apply(c, seed)
        for segment in range(1, before["segments"].max() + 1):
            places = np.flatnonzero(before["segments"] == segment)
            orders = row["orders"][places]
            length = (orders == 0).sum()
            assert orders.tolist() == [0] * length + list(range(1, len(places) - length + 1))
            expected = before["weights"][places] * (np.arange(len(places)) >= length - 1)
            np.testing.assert_array_equal(row["weights"][places], expected)
            if len(places) > 20:
                shares.append(length / len(places))
    assert abs(np.mean(shares) - 0.5) < 0.06 and min(shares) < 0.1 and max(shares) > 0.9


def restore(part, special):
    """A rearranged document as it was."""
    body = [int(i) for i in part if i not in (1, 2)]
    if special.prefix not in body:
        return bytes(b"".join(PIECES[i] for i in body))
    marks = {i: body.index(i) for i in (special.prefix, special.suffix, special.middle)}
    end = {m: min([p for p in [*marks.values(), len(body)] if p > marks[m]]) for m in marks}
    texts = {m: body[marks[m] + 1 : end[m]] for m in marks}
    if marks[special.suffix] == marks[special.prefix] + 1:  # <prefix> <suffix> SUFFIX <middle> PREFIX MIDDLE
        order = [texts[special.middle], texts[special.suffix]]
    else:
        order = [texts[special.prefix], texts[special.middle], texts[special.suffix]]
    return b"".join(PIECES[i] for ids in order for i in ids)


def test_infill_pieces_put_together_are_the_text_and_markers_are_never_predicted():
    c = make_config("infill", infill_rate=0.5)
    rearranged = first = total = 0
    for seed in range(200):
        before, row, special = apply(c, seed)
        texts = [
            b"".join(PIECES[i] for i in before["tokens"][before["segments"] == segment])
            for segment in range(1, before["segments"].max() + 1)
        ]
        whole = [*range(1, row["segments"].max() + 1)]
        for segment in whole:
            part = row["tokens"][row["segments"] == segment]
            total += 1
            found = restore(part, special)
            assert texts[segment - 1].startswith(found)
            if segment < len(whole):  # only the last is cut to make room
                assert found == texts[segment - 1]
            if special.prefix in part:
                rearranged += 1
                first += list(part).index(special.suffix) == list(part).index(special.prefix) + 1
        real = row["segments"] > 0
        asked = row["weights"] > 0
        np.testing.assert_array_equal(row["targets"][:-1][real[1:]], row["tokens"][1:][real[1:]])
        markers = np.isin(row["targets"], (special.prefix, special.suffix, special.middle, 1))
        assert not (asked & markers).any()
        assert asked[real & ~markers][:-1].all()
    assert abs(rearranged / total - 0.5) < 4 * np.sqrt(0.25 / total)
    assert abs(first / rearranged - 0.5) < 4 * np.sqrt(0.25 / rearranged)


def test_infill_cuts_between_characters_and_encodes_the_pieces_anew():
    joined = dataclasses.replace(TOKENIZER, vocab_size=261, piece_bytes=(*PIECES, b"abc"))

    def encode_batch(self, texts, threads=-1):
        return [[260 if part == "abc" else 4 + ord(part) for part in chunk(text)] for text in texts]

    def chunk(text):
        while text:
            size = 3 if text.startswith("abc") else 1
            yield text[:size]
            text = text[size:]

    class Joined(type(joined)):
        pass

    Joined.encode_batch = encode_batch
    tokenizer = Joined(**{f.name: getattr(joined, f.name) for f in dataclasses.fields(joined)})
    c = make_config("infill", length=64, infill_rate=1.0)
    change = corruption(c, tokenizer)
    row = {name: values[0] for name, values in pack([np.array([1] + [260] * 12 + [2])], length=65).items()}
    broken = 0
    for seed in range(50):
        tokens = change.transform(row, np.random.default_rng(seed))["tokens"]
        broken += bool(((tokens >= 4) & (tokens < 260)).any())
        body = [int(i) for i in tokens if 4 <= i < 261]
        assert sum(len(tokenizer.piece_bytes[i]) for i in body) == 36
    assert broken > 25, "cuts fall inside pieces too"


# ------------------------------------------------------------------ span


@pytest.mark.parametrize(("rate", "mean"), [(0.15, 3.0), (0.5, 3.0), (0.5, 32.0), (0.15, 1.0)])
def test_spans_have_exactly_the_rate_and_the_mean_length(rate, mean):
    c = make_config("span", mask_rate=rate, span_length=mean)
    for seed, size in enumerate((512, 300, 61)):
        hidden = random_spans(size, c, np.random.default_rng(seed))
        number, spans = counts(size, c)
        assert hidden.sum() == number == round(size * rate)
        assert (np.diff(np.append(0, hidden.astype(int))) == 1).sum() == spans == max(1, round(number / mean))


@pytest.mark.parametrize("encoder", [0, 2])
def test_sentinels_and_targets_restore_the_text_of_every_document(encoder):
    c = make_config("span", model__encoder_layers=encoder)
    lost, full = [], []
    for seed in range(60):
        before, row, special = apply(c, seed)
        sentinels = special.sentinels.tolist()
        kept = 0
        for segment in range(1, before["segments"].max() + 1):
            original = before["tokens"][before["segments"] == segment].tolist()
            if encoder:
                source = row["source_tokens"][row["source_segments"] == segment].tolist()
                target = row["targets"][row["segments"] == segment].tolist()
                inputs = row["tokens"][row["segments"] == segment].tolist()
                assert inputs == [1, *target[:-1]][: len(inputs)]
                assert row["weights"][row["segments"] == segment].all()
            else:
                here = row["segments"] == segment
                whole, orders = row["tokens"][here].tolist(), row["orders"][here]
                source, target = np.array(whole)[orders == 0].tolist(), np.array(whole)[orders > 0].tolist()
                asked = row["targets"][here][row["weights"][here] > 0].tolist()
                assert asked == target, "the targets, all of them and nothing else, are predicted"
                assert orders[orders > 0].tolist() == list(range(1, len(target) + 1))
            if not target:
                assert not set(source) & set(sentinels)
            else:
                assert target[-1] == 2
            spans: dict[int, list[int]] = {}
            for token in target[:-1]:
                if token in sentinels:
                    spans[token] = []
                    last = token
                else:
                    spans[last].append(token)
            assert list(spans) == sentinels[: len(spans)], "sentinels are counted from the first"
            restored = [t for token in source for t in (spans.get(token, [token]))]
            assert restored == original[: len(restored)]
            kept += len(restored)
            assert not any({1, 2} & set(tokens) for tokens in spans.values()), "special tokens are never hidden"
        lost.append(len(before["tokens"]) - kept)
        full.append(((row["source_segments"] if encoder else row["segments"]) > 0).sum())
    assert np.mean(lost) < 10 and np.mean(full) > LENGTH - 10  # of four short documents in so short a row


def test_a_row_of_one_document_fills_source_and_targets_as_in_the_paper():
    c = make_config("span", length=512, model__encoder_layers=1)
    assert corruption(c, TOKENIZER).tokens == 569  # T5 reads 568 tokens of text and an <eos> for 512 of source
    _, row, _ = apply(c, 0, np.full(570, 70))
    assert (row["source_segments"] > 0).all()
    assert row["weights"].sum() == 85 + 28 + 1  # hidden tokens, sentinels, <eos>


# ------------------------------------------------------------------ ids


def test_special_ids_come_after_the_tokenizers_or_from_it_and_keep_their_places():
    sizes = {name: special_ids(make_config(name).objective, TOKENIZER).size for name in OBJECTIVES}
    assert sizes["causal"] == sizes["prefix"] == sizes["permutation"] == sizes["multi_token"] == 260
    assert sizes["masked"] == sizes["translation"] == 261
    assert (sizes["unilm"], sizes["infill"], sizes["span"]) == (262, 265, 365)
    ids = [special_ids(make_config(name).objective, TOKENIZER) for name in ("masked", "span")]
    assert ids[0].mask == ids[1].mask == 260
    own = dataclasses.replace(
        TOKENIZER,
        mask_id=3,
        special_ids={**TOKENIZER.special_ids, **{f"<extra_id_{i}>": 159 - i for i in range(100)}},
    )
    assert special_ids(make_config("masked").objective, own).size == 260
    special = special_ids(make_config("span").objective, own)
    assert (special.mask, special.sentinels[0], special.sentinels[99], special.size) == (3, 159, 60, 260)
