"""Masked language models: BERT's, XLM's over pairs of translations, and UniLM's under four kinds of visibility.

Each transform takes a row of a batch (arrays of length L, see data/batches.py) and returns the row that the model sees:
some tokens are hidden, `targets` are the original tokens, and `weights` are 1 where a token was hidden.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from llmjax.errors import UserError
from llmjax.objectives.rows import Row, documents, empty, languages_of
from llmjax.objectives.special import Special

# UniLM's types tell the modes apart, as in its authors' model: both parts of bidirectional rows, left-to-right rows,
# right-to-left rows, and both parts of sequence-to-sequence rows.
UNILM_TYPES = {"bidirectional": (0, 1), "left": (2, 2), "right": (3, 3), "sequence": (4, 5)}
NGRAMS = (0.8, 0.1, 0.1)  # UniLM hides single tokens, pairs and triples


class Units(NamedTuple):
    """Units that are hidden as a whole: the places of all tokens of text, in order, and each one's unit, from 0."""

    places: np.ndarray
    numbers: np.ndarray


def masked(row: Row, rng: np.random.Generator, c: ConfigDict, special: Special) -> Row:
    """BERT's corruption (Devlin et al. 2019): a share of the tokens of text, exactly, is to be predicted.

    With `whole_words` the tokens of a word are chosen together, and as many words as fit in the share.
    """
    tokens_L = row["tokens"]
    units = words(tokens_L, row["segments"], special) if c.objective.whole_words else each(tokens_L, special)
    return hide(row, choose(units, share=c.objective.mask_rate, rng=rng), rng, c, special)


def translation(row: Row, rng: np.random.Generator, c: ConfigDict, special: Special) -> Row:
    """XLM's translation language model (Conneau and Lample 2019): `masked`, over both texts of a pair.

    A row of text and translation in turn (two documents a pair, each with positions from 0 and its own language) gets
    one segment for each pair, so that either text helps with the hidden tokens of the other. A row in one language
    is left as it is: then this is `masked`.
    """
    languages_L, segments_L = row["languages"], row["segments"]
    real = segments_L > 0
    if real.any() and languages_L[real].min() < languages_L[real].max():
        row = {**row, "segments": np.where(real, (segments_L + 1) // 2, 0).astype(np.int32)}
    # <bos>, with which a pair's second text begins, still separates words.
    return masked(row, rng, c, special)


def needs_pairs(c: ConfigDict, languages: Sequence[Sequence[str]]) -> None:
    """Raise UserError where no source has pairs of translations; `languages` are those of each source."""
    if all(len(names) == 1 for names in languages):
        raise UserError(
            f"objective.name={c.objective.name} needs parallel text, and data.sources has none: give two files with as many "
            "lines, such as data.sources='[\"fr|en=french.txt|english.txt\"]', or set objective.name=masked"
        )


def unilm(row: Row, rng: np.random.Generator, c: ConfigDict, special: Special) -> Row:
    """UniLM's cloze tasks (Dong et al. 2019): hidden tokens are predicted under the row's kind of visibility.

    The kind is drawn with the weights `modes`. In bidirectional and sequence-to-sequence rows every document is cut
    in two at a random place, with <sep> between. In a sequence-to-sequence pair the first part sees itself, and a token of
    the second part sees the first part and the second up to itself. `orders` say who sees whom, `types` the kind and the
    part. The paper's task of telling whether the second part follows the first is left out.
    """
    mode = list(UNILM_TYPES)[rng.choice(len(UNILM_TYPES), p=np.array(c.objective.modes) / np.sum(c.objective.modes))]
    length, paired = len(row["tokens"]), mode in ("bidirectional", "sequence")
    new = empty(length, "tokens", "positions", "segments", "types", "orders")
    start = 0
    for number, places in enumerate(documents(row["segments"]), start=1):
        if length - start < 1 + paired:
            break
        part, cut = row["tokens"][places][: length - start - paired], 0
        if paired:
            cut = int(rng.integers(1, max(len(part), 2)))
            part = np.concatenate([part[:cut], [special.sep], part[cut:]])
            cut += 1  # <sep> closes the first part
        steps = np.arange(len(part))
        here = slice(start, start + len(part))
        start += len(part)
        new["tokens"][here], new["positions"][here], new["segments"][here] = part, steps, number
        first, second = UNILM_TYPES[mode]
        new["types"][here] = np.where(steps < cut, first, second)
        if mode != "bidirectional":
            new["orders"][here] = length - steps if mode == "right" else np.maximum(steps + 1 - cut, 0)
    if "languages" in row:
        new["languages"] = languages_of(row, new["segments"])
    return hide(new, choose(ngrams(new["tokens"], special, rng), share=c.objective.mask_rate, rng=rng), rng, c, special)


def each(tokens_L: np.ndarray, special: Special) -> Units:
    """Every token of text by itself."""
    places = np.flatnonzero(special.is_text[tokens_L])
    return Units(places, np.arange(len(places)))


def words(tokens_L: np.ndarray, segments_L: np.ndarray, special: Special) -> Units:
    """The words of a text: runs in which no token but the first begins a word."""
    places = np.flatnonzero(special.is_text[tokens_L])
    begins = special.starts_word[tokens_L[places]]
    begins[1:] |= (np.diff(places) > 1) | (np.diff(segments_L[places]) != 0)
    return Units(places, np.cumsum(begins) - begins[:1].sum())


def ngrams(tokens_L: np.ndarray, special: Special, rng: np.random.Generator) -> Units:
    """The text cut at random into single tokens, pairs and triples, in the shares `NGRAMS`."""
    places = np.flatnonzero(special.is_text[tokens_L])
    ends = np.cumsum(rng.choice(len(NGRAMS), size=len(places), p=NGRAMS) + 1)
    numbers = np.searchsorted(ends, np.arange(len(places)), side="right")
    begins = np.append(True, (np.diff(numbers) != 0) | (np.diff(places) > 1))[: len(places)]
    return Units(places, np.cumsum(begins) - 1)


def choose(units: Units, *, share: float, rng: np.random.Generator) -> np.ndarray:
    """The places of randomly chosen units: this share of all places, rounded, or a little less to keep units whole.

    At least one unit is chosen, if there is one.
    """
    if not len(units.places):
        return units.places
    sizes = np.bincount(units.numbers)
    budget = max(1, round(share * len(units.places)))
    order = rng.permutation(len(sizes))
    chosen = np.zeros(len(sizes), bool)
    for unit, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        if size <= budget:
            chosen[unit] = True
            budget -= size
        if budget == 0:
            break
    if not chosen.any():  # every unit is longer than the share: take the shortest
        chosen[np.argmin(sizes)] = True
    return units.places[chosen[units.numbers]]


def hide(row: Row, chosen: np.ndarray, rng: np.random.Generator, c: ConfigDict, special: Special) -> Row:
    """The row with the chosen places to be predicted: replaced by <mask> or another token of text, or kept, by `mask_split`."""
    tokens_L = row["tokens"].copy()
    lot = rng.random(len(chosen))
    replaced = lot < c.objective.mask_split[0]
    random = (lot >= c.objective.mask_split[0]) & (lot < c.objective.mask_split[0] + c.objective.mask_split[1])
    tokens_L[chosen[replaced]] = special.mask
    tokens_L[chosen[random]] = rng.choice(special.ordinary, size=random.sum())
    weights_L = np.zeros(len(tokens_L), np.float32)
    weights_L[chosen] = 1.0
    return {**row, "tokens": tokens_L, "targets": row["tokens"], "weights": weights_L}
