"""Baseline: an interpolated modified Kneser-Ney n-gram model over the token shards of a run.

    python benchmarks/kneser_ney.py --run runs/quickstart --order 5 --out results/kneser_ney.json

The model is fitted to the run's training tokens (every source once; mixture weights do not enter). It scores what the
run's own evaluation scores: every token of each held-out document and its <eos>, given the tokens before it in the
same document, divided by the UTF-8 bytes of the text. The history starts at <bos>, which is itself not scored.

The model is Chen and Goodman (1998), "An Empirical Study of Smoothing Techniques for Language Modeling", with three
discounts per order estimated from counts of counts; n-grams at the start of a document keep their raw counts, since
nothing ever stands before <bos>. An n-gram is stored as (id of its context) x vocabulary + token in a sorted array.
Orders are made from low to high and held-out text is scored with each as it is made, so that only two are in memory.
"""

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from common import make_parser, peak_bytes, write

from llmjax.data import tokens as token_shards

BOS_ID = 1
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)  # KenLM's --discount_fallback, for orders with too few n-grams to estimate from


@dataclass(frozen=True)
class Level:
    """All n-grams of one order seen in training, with what interpolation needs to know of them.

    Attributes:
        keys: int64 [n-grams], sorted: context id x vocab_size + token. A context's id is its index in the level below.
        discounted: float64 [n-grams], the count less its discount; counts are of occurrences at the highest order
            and after <bos>, elsewhere of the distinct tokens that precede the n-gram.
        totals: float64 [contexts], sum of the counts of the n-grams with this context; 0 where it has none.
        masses: float64 [contexts], sum of their discounts, handed to the order below.
        discounts: for counts of 1, 2, and 3 or more.
        estimated: whether the discounts come from counts of counts, and not from the fallback.
    """

    keys: np.ndarray
    discounted: np.ndarray
    totals: np.ndarray
    masses: np.ndarray
    discounts: tuple[float, float, float]
    estimated: bool


def estimate_discounts(counts: np.ndarray) -> tuple[float, float, float] | None:
    """Chen and Goodman's D1, D2 and D3+ for one order, or None where its counts of counts cannot give them."""
    n1, n2, n3, n4 = (int(np.count_nonzero(counts == k)) for k in (1, 2, 3, 4))
    if min(n1, n2, n3, n4) == 0:
        return None
    y = n1 / (n1 + 2 * n2)
    discounts = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    if not all(0 < discount <= k for k, discount in enumerate(discounts, start=1)):
        return None
    return discounts


def _positions(tokens: np.ndarray) -> np.ndarray:
    """Position of every token in its document, 0 at <bos>."""
    index = np.arange(len(tokens))
    return index - np.maximum.accumulate(np.where(tokens == BOS_ID, index, 0))


def _level(keys: np.ndarray, counts: np.ndarray, *, contexts: int, vocab_size: int) -> Level:
    estimate = estimate_discounts(counts)
    discounts = FALLBACK_DISCOUNTS if estimate is None else estimate
    discount = np.array((0.0, *discounts))[np.minimum(counts, 3)]
    context = keys // vocab_size
    return Level(
        keys=keys,
        discounted=counts - discount,
        totals=np.bincount(context, weights=counts, minlength=contexts),
        masses=np.bincount(context, weights=discount, minlength=contexts),
        discounts=discounts,
        estimated=estimate is not None,
    )


def fit(tokens: np.ndarray, *, order: int, vocab_size: int) -> Iterator[Level]:
    """Count a token stream and give the levels of the model one by one, unigrams first.

    Args:
        tokens: integers [T], documents one after another, each `<bos> tokens <eos>`.
        order: the longest n-gram, at least 1.
        vocab_size: number of token ids; the unigrams are interpolated with the uniform distribution over all of them.

    Raises:
        ValueError: for an order below 1, or a stream that is empty, does not start with <bos> or has ids out of range.
    """
    if order < 1:
        raise ValueError(f"order must be at least 1, not {order}")
    _check_stream(tokens, vocab_size)
    return _levels(tokens, order=order, vocab_size=vocab_size)


def _check_stream(tokens: np.ndarray, vocab_size: int) -> None:
    if len(tokens) == 0 or tokens[0] != BOS_ID:
        raise ValueError(
            "a token stream must start with <bos> (id 1): make the token shards again with `llmjax tokenizer`"
        )
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ValueError(
            f"token ids reach {tokens.max()}, but the vocabulary has {vocab_size}: the shards and their index disagree"
        )


def _levels(tokens: np.ndarray, *, order: int, vocab_size: int) -> Iterator[Level]:
    tokens = tokens.astype(np.int64)
    positions = _positions(tokens)
    ids = np.zeros(len(tokens), np.int32)  # of the n-gram that ends at each position, n being 0 at first
    contexts, keys, counts, after_bos = 1, None, None, None
    for n in range(1, order + 1):
        at = np.flatnonzero(positions >= n - 1)
        next_keys, inverse, occurrences = np.unique(
            ids[at - 1] * np.int64(vocab_size) + tokens[at], return_inverse=True, return_counts=True
        )
        if keys is not None:
            suffixes = np.empty(len(next_keys), np.int32)
            suffixes[inverse] = ids[at]
            preceding = np.bincount(suffixes, minlength=len(keys))
            yield _level(keys, np.where(after_bos, counts, preceding), contexts=contexts, vocab_size=vocab_size)
            contexts = len(keys)
        keys, counts = next_keys, occurrences
        after_bos = np.zeros(len(keys), bool)
        after_bos[inverse[positions[at] == n - 1]] = True
        if n == 1:
            counts = np.where(keys == BOS_ID, 0, counts)  # <bos> is only ever a context, never predicted
        ids = np.full(len(tokens), -1, np.int32)
        ids[at] = inverse
    del ids, inverse, at
    yield _level(keys, counts, contexts=contexts, vocab_size=vocab_size)


def score(levels: Iterable[Level], tokens: np.ndarray, *, vocab_size: int) -> np.ndarray:
    """Natural log probability of every token of a stream given those before it in its document.

    Args:
        levels: from `fit`, or a list of it; each is used once, in order.
        tokens: integers [T], documents one after another, each beginning with <bos>.
        vocab_size: as given to `fit`.

    Returns:
        float64 [T], nats; 0 at each <bos>, which is not predicted.

    Raises:
        ValueError: for a stream that is empty, does not start with <bos> or has ids out of range.
    """
    _check_stream(tokens, vocab_size)
    tokens = tokens.astype(np.int64)
    positions = _positions(tokens)
    probabilities = np.full(len(tokens), 1.0 / vocab_size)
    ids = np.zeros(len(tokens), np.int64)  # as in training; -1: not seen there, or it would cross a document's start
    for n, level in enumerate(levels, start=1):
        contexts = np.roll(ids, 1) if n > 1 else ids
        at = np.flatnonzero((positions >= n - 1) & (contexts >= 0))
        contexts = contexts[at]
        keys = contexts * vocab_size + tokens[at]
        found = np.minimum(np.searchsorted(level.keys, keys), len(level.keys) - 1)
        seen = level.keys[found] == keys
        ids = np.full(len(tokens), -1, np.int64)
        ids[at] = np.where(seen, found, -1)
        known = level.totals[contexts] > 0
        at, contexts = at[known], contexts[known]
        discounted = np.where(seen, level.discounted[found], 0.0)[known]
        probabilities[at] = (discounted + level.masses[contexts] * probabilities[at]) / level.totals[contexts]
    return np.where(tokens == BOS_ID, 0.0, np.log(probabilities))


def run(run_folder: Path, *, order: int) -> dict[str, float | int | str]:
    """Fit to a run's training tokens, score its held-out ones, print a table and return the figures by name."""
    began = time.perf_counter()
    folder = run_folder / "tokenizer" / "tokens"
    if not (folder / "index.json").exists():
        raise ValueError(f"no token shards in {folder}: make them with `llmjax tokenizer --workdir {run_folder}`")
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    vocab_size = index["vocab_size"]
    train = np.concatenate([token_shards.read_stream(folder, "train", source) for source in index["splits"]["train"]])
    heldout = index["splits"]["heldout"]
    streams = [token_shards.read_stream(folder, "heldout", source) for source in heldout]
    tokens = np.concatenate(streams)

    results: dict[str, float | int | str] = {"run": run_folder.name, "order": order, "vocab_size": vocab_size}
    results["train_tokens"] = int(np.count_nonzero(train != BOS_ID))

    def noted() -> Iterator[Level]:
        for n, level in enumerate(fit(train, order=order, vocab_size=vocab_size), start=1):
            results[f"ngrams/{n}"] = len(level.keys)
            for name, discount in zip(("1", "2", "3+"), level.discounts, strict=True):
                results[f"discount/{n}/{name}"] = discount
            results[f"discounts_from/{n}"] = "counts of counts" if level.estimated else "fallback"
            yield level

    nats = -score(noted(), tokens, vocab_size=vocab_size)
    ends = np.cumsum([len(stream) for stream in streams])
    rows = []
    for source, end, stream in zip(heldout, ends, streams, strict=True):
        part = slice(end - len(stream), end)
        scored = int(np.count_nonzero(tokens[part] != BOS_ID))
        rows.append((source, float(nats[part].sum()), scored, int(heldout[source]["text_bytes"])))
    total = ("total", *(sum(row[k] for row in rows) for k in (1, 2, 3)))
    for name, loss, scored, text_bytes in [total, *rows]:
        suffix = "" if name == "total" else f"/{name}"
        results[f"bits_per_byte{suffix}"] = loss / math.log(2) / text_bytes
        results[f"bits_per_token{suffix}"] = loss / math.log(2) / scored
        results[f"perplexity{suffix}"] = math.exp(loss / scored)
        results[f"tokens{suffix}"] = scored
        results[f"bytes{suffix}"] = text_bytes
    results["seconds"] = time.perf_counter() - began
    results["peak_memory_bytes"] = peak_bytes()
    _print_table(results, sources=list(heldout))
    return results


def _print_table(results: dict[str, float | int | str], *, sources: Sequence[str]) -> None:
    print(
        f"{'held-out source':24} {'bytes':>12} {'tokens':>10} {'bits/byte':>10} {'bits/token':>10} {'perplexity':>10}"
    )
    for name in [*sources, "total"]:
        suffix = "" if name == "total" else f"/{name}"
        bytes_, scored, per_byte, per_token, perplexity = (
            results[f"{key}{suffix}"] for key in ("bytes", "tokens", "bits_per_byte", "bits_per_token", "perplexity")
        )
        print(f"{name:24} {bytes_:12,} {scored:10,} {per_byte:10.4f} {per_token:10.4f} {perplexity:10.2f}")
    ngrams = ", ".join(f"{n}: {results[f'ngrams/{n}']:,}" for n in range(1, results["order"] + 1))
    fallback = [str(n) for n in range(1, results["order"] + 1) if results[f"discounts_from/{n}"] == "fallback"]
    print(f"train tokens {results['train_tokens']:,}; vocabulary {results['vocab_size']:,}; n-grams by order: {ngrams}")
    if fallback:
        print(f"orders with fallback discounts {FALLBACK_DISCOUNTS}: {', '.join(fallback)}")
    print(f"{results['seconds']:.1f} s, peak memory {results['peak_memory_bytes'] / 2**30:.2f} GiB")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a run's folder, with its tokenizer stage done")
    parser.add_argument("--order", type=int, default=5, help="the longest n-gram (default 5)")
    options = parser.parse_args(arguments)
    try:
        results = run(options.run, order=options.order)
    except ValueError as error:
        sys.exit(f"kneser_ney: {error}")
    write(results, options.out)


if __name__ == "__main__":
    main()
