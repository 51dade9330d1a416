"""T5's span corruption (Raffel et al. 2020): sentinels replace spans of text, and the model writes the spans."""

import functools
from dataclasses import dataclass

import numpy as np
from ml_collections import ConfigDict

from llmjax.config.objective_checks import SENTINELS
from llmjax.objectives.rows import Row, documents, empty, languages_of
from llmjax.objectives.special import Special


@dataclass(frozen=True)
class Sizes:
    """The lengths of one row's parts, in tokens."""

    raw: int  # tokens of text read
    source: int  # of the encoder; without one, of everything
    target: int  # of the decoder; 0 without an encoder


def counts(tokens: int, c: ConfigDict) -> tuple[int, int]:
    """How many tokens are hidden, and in how many spans, of so many that may be."""
    return _counts(tokens, c.objective.mask_rate, c.objective.span_length)


def _counts(tokens: int, rate: float, mean: float) -> tuple[int, int]:
    hidden = min(max(round(tokens * rate), 1), tokens - 1)
    if hidden < 1:
        return 0, 0
    return hidden, min(max(round(hidden / mean), 1), tokens - hidden)


def row_sizes(c: ConfigDict) -> Sizes:
    """The most text for which one document's source (and without an encoder, its targets too) fill a row."""
    return _sizes(c.objective.mask_rate, c.objective.span_length, c.train.sequence_length, c.model.encoder_layers > 0)


@functools.lru_cache
def _sizes(rate: float, mean: float, length: int, encoder: bool) -> Sizes:
    def need(raw: int) -> int:
        hidden, spans = _counts(raw, rate, mean)
        return raw - hidden + spans if encoder else raw + 2 * spans + 1

    raw = length // 2
    while need(raw + 1) <= length:
        raw += 1
    hidden, spans = _counts(raw, rate, mean)
    # Twice the spans: some are cut in two at the end of a document, and each document has an end of its own.
    return Sizes(raw, length, -(-(hidden + 2 * spans) // 8) * 8 if encoder else 0)


def span(row: Row, rng: np.random.Generator, c: ConfigDict, special: Special) -> Row:
    """A row of `row_sizes(c).raw` tokens of text, with spans of the mean length `span_length` hidden.

    In the source each span is one sentinel. The targets of a document are its sentinels with their spans, then <eos>. A
    share `mask_rate` of the tokens of text is hidden; spans end where documents end, and each document counts its
    sentinels from the first. With an encoder the row has source_tokens, source_positions, source_segments, and the
    decoder's tokens, which begin with <bos> (T5's with <pad>). Without one, each document's targets follow its source: by
    `orders` the source sees itself whole and the targets see what came before them (a prefix language model), and only
    targets have weight.
    """
    room, encoder = row_sizes(c), c.model.encoder_layers > 0
    tokens, segments, hidden = _fit(row, rng, c, special, room)
    plain, predicted = ("tokens", "positions", "segments"), ("targets", "weights")
    source = _Writer(room.source, *plain, *(() if encoder else (*predicted, "orders")))
    target = _Writer(room.target, *plain, *predicted)
    for number, places in enumerate(documents(segments), start=1):
        left, right = replace(tokens[places], hidden[places], special)
        if encoder:
            source.add(left, number)
            if len(right):
                shifted = np.concatenate([[special.decoder_start], right[:-1]])
                target.add(shifted, number, targets=right, weights=np.ones(len(right)))
            continue
        both = np.concatenate([left, right])
        steps = np.arange(len(both))
        source.add(
            both,
            number,
            targets=np.append(both[1:], 0),
            weights=(steps >= len(left) - 1) & (steps < len(both) - 1),
            orders=np.maximum(steps - len(left) + 1, 0),
        )
    writers = {"source_": source, "": target} if encoder else {"": source}
    done: Row = {}
    for prefix, writer in writers.items():
        done |= {f"{prefix}{name}": values for name, values in writer.row.items()}
        if "languages" in row:
            done[f"{prefix}languages"] = languages_of(row, writer.row["segments"])
    return done


def replace(tokens: np.ndarray, hidden: np.ndarray, special: Special) -> tuple[np.ndarray, np.ndarray]:
    """(source, targets) of one document; no targets where nothing is hidden."""
    begins = hidden & ~np.append(False, hidden[:-1])
    number = np.clip(np.cumsum(begins) - 1, 0, SENTINELS - 1)  # objective_checks.py ensures that there are enough
    sentinels = special.sentinels[number]
    source = np.where(begins, sentinels, tokens)[~hidden | begins]
    pairs = np.stack([sentinels, tokens], axis=1)
    targets = pairs[np.stack([begins, hidden], axis=1)]
    return source, np.append(targets, special.end) if len(targets) else targets


def random_spans(tokens: int, c: ConfigDict, rng: np.random.Generator) -> np.ndarray:
    """bool (tokens,): `counts` says how many are hidden and in how many spans; all such choices are equally likely.

    The first token stays, the last is hidden, and no two spans touch.
    """
    number, spans = counts(tokens, c)
    if not spans:
        return np.zeros(tokens, bool)

    def lengths(total: int) -> np.ndarray:
        cuts = np.sort(rng.choice(total - 1, spans - 1, replace=False)) + 1
        return np.diff(np.concatenate([[0], cuts, [total]]))

    runs = np.stack([lengths(tokens - number), lengths(number)], axis=1).ravel()
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs)


def _fit(
    row: Row, rng: np.random.Generator, c: ConfigDict, special: Special, room: Sizes
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, their segments, and which to hide: the longest beginning of the row that is certain to fit."""
    tokens, segments, rate, mean = row["tokens"], row["segments"], c.objective.mask_rate, c.objective.span_length
    text = special.is_text[tokens]
    texts = np.cumsum(text)
    # Special tokens may cut a span in two, once for each time that text begins again.
    breaks = np.maximum(np.cumsum(text & ~np.append(False, text[:-1])) - 1, 0)
    keep = int((segments > 0).sum())
    while keep:
        hidden, spans = _counts(int(texts[keep - 1]), rate, mean)
        spans += int(breaks[keep - 1])
        source, target = keep - hidden + spans, hidden + spans + int(segments[keep - 1])
        fits = source <= room.source and target <= room.target if room.target else source + target <= room.source
        if fits:
            break
        keep -= 1
    mask = np.zeros(keep, bool)
    mask[text[:keep]] = random_spans(int(text[:keep].sum()), c, rng)
    return tokens[:keep], segments[:keep], mask


class _Writer:
    """A row that documents are written into, one after another."""

    def __init__(self, length: int, *names: str) -> None:
        self.row = empty(length, *names)
        self._used = 0

    def add(self, tokens: np.ndarray, segment: int, **more: np.ndarray) -> None:
        """Append one document."""
        here = slice(self._used, self._used + len(tokens))
        self._used += len(tokens)
        for name, values in {"tokens": tokens, "positions": np.arange(len(tokens)), **more}.items():
            self.row[name][here] = values
        self.row["segments"][here] = segment
