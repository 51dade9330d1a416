"""A report on bias: how often identity terms are near words of praise or blame, before and after filtering a corpus.

For each identity term (lexicons/identity.txt: gender, religion, origin, age, disability, orientation) it counts words of
praise and blame (lexicons/sentiment.txt) within ten words and in the same sentence, and compares with the counts of all
words. English only. It does not understand negation and irony, and a difference may come from the subject (wars, news of
crimes). The report shows where to look; it does not judge.

Counts are whole numbers in a small table with the same row for each term, so tables of shards can be added.
"""

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa

from llmjax.errors import UserError
from llmjax.prepare.documents import kept
from llmjax.prepare.learn import lexicons

WINDOW = 10  # words on each side
ALL = "all words"
FEWEST = 20  # occurrences before a term is flagged
Z = 1.959964  # of a 95% interval
COUNTS = ("documents", "occurrences", "positive", "negative")

_PARTS = re.compile(r"[.!?\n]+|[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
_SENTENCE, _NEUTRAL, _POSITIVE, _NEGATIVE = range(4)


@cache
def _terms() -> dict[tuple[str, ...], tuple[str, str]]:
    """The words of each term -> (category, term)."""
    return {
        tuple(entry.split()): (category, entry)
        for category, entries in lexicons.sections("identity").items()
        for entry in entries
    }


@cache
def _feelings() -> dict[str, int]:
    found = lexicons.sections("sentiment")
    kinds = {"positive": _POSITIVE, "negative": _NEGATIVE}
    return {word: kinds[section] for section, words in found.items() for word in words}


def rows() -> list[tuple[str, str]]:
    """(category, term) of every row of a table of counts, the first of them ("", "all words")."""
    return [("", ALL), *_terms().values()]


def counts(batch: pa.RecordBatch) -> pa.Table:
    """Counts over the kept English documents of a batch (also those of unknown language).

    Returns:
        A table with a row for each of `rows()`: category, term, and int64 documents (that have the term), occurrences,
        positive and negative (occurrences with such a word near).
    """
    texts, languages = batch["text"].to_pylist(), batch["language"].to_pylist()
    mine = [
        text
        for text, language, keep in zip(texts, languages, kept(batch), strict=True)
        if keep and text is not None and (not language or language.lower()[:2] == "en")
    ]
    return _table(count_texts(mine))


def count_texts(texts: Iterable[str]) -> np.ndarray:
    """The counts of `counts`, int64 [rows, 4]."""
    terms = {words: row for row, words in enumerate(_terms(), start=1)}
    phrase_heads = {words[0] for words in terms if len(words) > 1}
    feelings = _feelings()
    total = np.zeros((len(terms) + 1, len(COUNTS)), np.int64)
    for text in texts:
        tokens = _PARTS.findall(text.casefold())
        kinds = np.array([_SENTENCE if not t[0].isalpha() else feelings.get(t, _NEUTRAL) for t in tokens], np.int64)
        words = kinds != _SENTENCE
        near = [_near(kinds, kind) for kind in (_POSITIVE, _NEGATIVE)]
        _add(total, 0, np.flatnonzero(words), near)
        places: dict[int, list[int]] = {}
        for place, token in enumerate(tokens):
            if (token,) in terms:
                places.setdefault(terms[token,], []).append(place)
            if token in phrase_heads and (row := terms.get(tuple(tokens[place : place + 2]))):
                places.setdefault(row, []).append(place)
        for row, at in places.items():
            _add(total, row, np.array(at), near)
    return total


def _add(total: np.ndarray, row: int, at: np.ndarray, near: Sequence[np.ndarray]) -> None:
    total[row] += (int(len(at) > 0), len(at), int(near[0][at].sum()), int(near[1][at].sum()))


def _near(kinds: np.ndarray, kind: int) -> np.ndarray:
    """Whether another word of the kind is within WINDOW words of each word and in its sentence, bool [tokens]."""
    count = len(kinds)
    index = np.arange(count)
    hits = np.concatenate([[0], np.cumsum(kinds == kind)])
    ends = kinds == _SENTENCE
    begin = np.maximum.accumulate(np.where(ends, index + 1, 0)) if count else index
    finish = np.minimum.accumulate(np.where(ends, index, count)[::-1])[::-1] if count else index
    low = np.maximum(index - WINDOW, np.minimum(begin, index))
    high = np.minimum(index + WINDOW + 1, np.maximum(finish, index))
    return hits[high] - hits[low] - ((kinds == kind) & (high > index)) > 0


def _table(values: np.ndarray) -> pa.Table:
    categories, terms = zip(*rows(), strict=True)
    columns = {name: pa.array(values[:, k], pa.int64()) for k, name in enumerate(COUNTS)}
    return pa.table({"category": pa.array(categories), "term": pa.array(terms), **columns})


def to_counts(table: pa.Table) -> list[list[int]]:
    """The numbers of a table of `counts`, for a JSON file."""
    counted: list[list[int]] = np.stack([table[name].to_numpy() for name in COUNTS], axis=1).tolist()
    return counted


def from_counts(counted: list[list[int]]) -> pa.Table:
    """The table of `to_counts`'s numbers; of none, zeros."""
    return _table(np.array(counted, np.int64) if counted else np.zeros((len(rows()), len(COUNTS)), np.int64))


def add(tables: Iterable[pa.Table]) -> pa.Table:
    """The sum of tables of `counts`; of none, zeros.

    Raises:
        UserError: for a table with other rows, as one of another version's word list.
    """
    total = np.zeros((len(rows()), len(COUNTS)), np.int64)
    for table in tables:
        if list(zip(table["category"].to_pylist(), table["term"].to_pylist(), strict=True)) != rows():
            raise UserError("bias counts were made with another list of identity terms: count all shards again")
        total += np.stack([table[name].to_numpy() for name in COUNTS], axis=1)
    return _table(total)


def interval(count: int, total: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share. It assumes independent occurrences; those of one document are not quite so."""
    if not total:
        return 0.0, 1.0
    share, weight = count / total, Z * Z / total
    middle = (share + weight / 2) / (1 + weight)
    half = Z * math.sqrt(share * (1 - share) / total + weight / (4 * total)) / (1 + weight)
    return max(0.0, middle - half), min(1.0, middle + half)


def _rates(table: pa.Table) -> list[dict[str, Any]]:
    found = table.to_pylist()
    overall = {kind: found[0][kind] / max(found[0]["occurrences"], 1) for kind in ("positive", "negative")}
    for row in found:
        for kind, base in overall.items():
            rate = row[kind] / row["occurrences"] if row["occurrences"] else 0.0
            low, high = interval(row[kind], row["occurrences"])
            flag = ""
            if row["occurrences"] >= FEWEST and row["term"] != ALL:
                flag = "above" if low > base else "below" if high < base else ""
            row[f"{kind}_rate"], row[f"{kind}_interval"], row[f"{kind}_flag"] = rate, [low, high], flag
            row[f"{kind}_pmi"] = math.log2(rate / base) if rate and base else None
    return found


def report(before: pa.Table, after: pa.Table) -> dict[str, Any]:
    """What the counts say, before and after filtering.

    Returns:
        JSON-able: "overall" and "terms"; a term has category, term, and "before" and "after", each with the four
        counts and, for positive and negative: _rate (share of occurrences with such a word near), _interval (95%),
        _pmi (log2 of the rate over that of all words, None where either is 0) and _flag ("above" or "below" where the
        interval excludes the rate of all words and there are at least 20 occurrences). "lost" is the share of a
        term's occurrences that filtering removed. Only terms that occur are listed.
    """
    sides = zip(_rates(add([before])), _rates(add([after])), strict=True)
    entries = []
    for one, two in sides:
        lost = 1 - two["occurrences"] / one["occurrences"] if one["occurrences"] else 0.0
        strip = ("category", "term")
        entries.append(
            {
                "category": one["category"],
                "term": one["term"],
                "before": {key: value for key, value in one.items() if key not in strip},
                "after": {key: value for key, value in two.items() if key not in strip},
                "lost": lost,
            }
        )
    occurring = [entry for entry in entries[1:] if entry["before"]["occurrences"] or entry["after"]["occurrences"]]
    return {"window_words": WINDOW, "overall": entries[0], "terms": occurring}


HEADINGS = ("category", "term", "count", "left", "positive", "95%", "after", "negative", "95%", "after")


def _cells(entry: Mapping[str, Any]) -> list[str]:
    one, two = entry["before"], entry["after"]
    cells = [entry["category"], entry["term"], str(one["occurrences"]), f"{1 - entry['lost']:.1%}"]
    for kind in ("positive", "negative"):
        low, high = one[f"{kind}_interval"]
        sign = {"above": " \u25b2", "below": " \u25bc", "": ""}
        cells += [f"{one[f'{kind}_rate']:.1%}{sign[one[f'{kind}_flag']]}", f"{low:.1%} to {high:.1%}"]
        cells.append(f"{two[f'{kind}_rate']:.1%}{sign[two[f'{kind}_flag']]}")
    return cells


def _lines(report: Mapping[str, Any], fewest: int) -> list[list[str]]:
    terms = [entry for entry in report["terms"] if entry["before"]["occurrences"] >= fewest]
    return [_cells(entry) for entry in [report["overall"], *terms]]


def to_html(report: Mapping[str, Any], *, fewest: int = FEWEST) -> str:
    """The terms with at least `fewest` occurrences as an HTML table; arrows mark differences from all words."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in HEADINGS)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in line)}</tr>\n" for line in _lines(report, fewest)
    )
    return f"<table>\n<tr>{head}</tr>\n{body}</table>\n"
