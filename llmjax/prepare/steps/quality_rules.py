"""Steps gopher_quality, gopher_repetition, fineweb and c4: the published quality rules of `rules.py`, applied.

The first three share counts of every text (`kernels.statistics`, with the words of settings.words) and reject a text that
breaks a threshold. c4 cuts lines, and rejects a text if too few sentences are left.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from llmjax.prepare import documents, rules
from llmjax.prepare.documents import Step
from llmjax.prepare.kernels.statistics import shared_statistics

CITATION = re.compile(r"\[(?:\d*|edit|citation needed)\]")
# A sentence ends in marks, with or without closing quotes, before white space. Text after the last mark is one more.
SENTENCE_END = re.compile(rf"[{re.escape(rules.TERMINAL_MARKS)}]+[\"'”\u2019)\]]*(?=\s|$)")
ASCII_SENTENCE_END = re.compile(r"[.!?]+[\"')\]]*(?=\s|$)")  # the same in ASCII, whose sets are searched faster


@dataclass(frozen=True)
class Check:
    """One rule applied to a batch: its name, its value for every text, and for which texts it is broken."""

    name: str
    value: np.ndarray
    broken: np.ndarray


Checks = Callable[[dict[str, np.ndarray]], Sequence[Check]]


def gopher_quality(settings: Any, rule: rules.GopherQuality = rules.GopherQuality()) -> Step:  # noqa: B008 - frozen
    """Too short or long, odd words, symbols, bullets, ellipses, no letters, no stop words."""

    def checks(found: dict[str, np.ndarray]) -> list[Check]:
        words, plain = found["words"], found["plain_words"]
        length, (shortest, longest) = _share(found["plain_characters"], plain), rule.mean_word_length
        hashes, ellipses = _share(found["hashes"], words), _share(found["ellipses"], words)
        bullets, ends = _share(found["bullet_lines"], found["lines"]), _share(found["ellipsis_lines"], found["lines"])
        alphabetic = _share(found["alphabetic_words"], words)
        return [
            Check("words", plain, (plain < rule.words[0]) | (plain > rule.words[1])),
            Check("mean word length", length, (length < shortest) | (length > longest)),
            Check("hash signs a word", hashes, hashes > rule.hashes),
            Check("ellipses a word", ellipses, ellipses > rule.ellipses),
            Check("lines with a bullet", bullets, bullets > rule.bullet_lines),
            Check("lines ending in an ellipsis", ends, ends > rule.ellipsis_lines),
            Check("words with a letter", alphabetic, alphabetic < rule.alphabetic_words),
            Check("different stop words", found["stop_words"], found["stop_words"] < rule.stop_words),
        ]

    return _rejecting("gopher_quality", checks, settings)


def gopher_repetition(settings: Any, rule: rules.GopherRepetition = rules.GopherRepetition()) -> Step:  # noqa: B008
    """Repeated paragraphs and lines, one frequent run of words, repeated runs of words."""

    def checks(found: dict[str, np.ndarray]) -> list[Check]:
        characters = found["characters"]
        values = [
            ("repeated paragraphs", "repeated_paragraphs", found["paragraphs"], rule.paragraphs),
            (
                "characters in repeated paragraphs",
                "repeated_paragraph_characters",
                characters,
                rule.paragraph_characters,
            ),
            ("repeated lines", "repeated_pieces", found["pieces"], rule.lines),
            ("characters in repeated lines", "repeated_piece_characters", characters, rule.line_characters),
            *((f"characters in the top {n}-gram", f"top_{n}", characters, most) for n, most in rule.top.items()),
            *((f"characters in repeated {n}-grams", f"repeated_{n}", characters, m) for n, m in rule.repeated.items()),
        ]
        shares = [(name, _share(found[part], whole), most) for name, part, whole, most in values]
        return [
            Check("characters", characters, characters == 0),
            *(Check(name, value, value > most) for name, value, most in shares),
        ]

    return _rejecting("gopher_repetition", checks, settings)


def fineweb(settings: Any, rule: rules.FineWeb = rules.FineWeb()) -> Step:  # noqa: B008
    """Too few lines that end a sentence, short lines, repeated lines, lists."""

    def checks(found: dict[str, np.ndarray]) -> list[Check]:
        lines = found["full_lines"]
        terminal, short = _share(found["terminal_lines"], lines), _share(found["short_lines"], lines)
        repeated = _share(found["repeated_full_characters"], found["characters"] - found["line_feeds"])
        ends = _share(found["line_feeds"], found["words"])
        return [
            Check("lines", lines, lines == 0),
            Check("lines ending a sentence", terminal, terminal < rule.terminal_lines),
            Check("short lines", short, short > rule.short_lines),
            Check("characters in repeated lines", repeated, repeated > rule.repeated_characters),
            Check("line ends a word", ends, ends > rule.line_ends),
        ]

    return _rejecting("fineweb", checks, settings, short_line=rule.short_line)


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole; 0 / 0 is 0, and other shares of nothing are infinite."""
    result = np.where(part > 0, np.inf, 0.0)
    return np.divide(part, whole, out=result, where=whole > 0)


def _rejecting(kind: str, checks: Checks, settings: Any, *, short_line: int = 30) -> Step:
    """A step that rejects the kept texts that break a rule.

    The first broken rule is the reason ("gopher_quality: mean word length 2.1"), its value also a fact.
    """

    def step(batch: pa.RecordBatch) -> pa.RecordBatch:
        texts = batch["text"]
        rows = np.flatnonzero(documents.kept(batch) & np.asarray(texts.is_valid()))
        if not len(rows):
            return batch
        found = shared_statistics(texts, rows, words=settings.words, short_line=short_line)
        reasons: dict[int, str] = {}
        facts: dict[int, dict[str, float]] = {}
        for check in checks(found):
            for at in np.flatnonzero(check.broken).tolist():
                row, value = int(rows[at]), float(check.value[at])
                if row not in reasons:
                    reasons[row] = f"{kind}: {check.name} {value:.4g}"
                    facts[row] = {f"{kind}.{check.name}": value if np.isfinite(value) else -1.0}
        return documents.reject(documents.add_facts(batch, facts), reasons)

    return step


def c4(settings: Any) -> Step:
    """C4's rules: lines that are not sentences, or about cookies and scripts, are cut; the rest must be sentences.

    Kept texts lose lines, which the fact "c4.lines" counts; a text with too few sentences left is rejected as it was.
    """
    rule = rules.C4(end_marks=settings.c4_end_marks)

    def step(batch: pa.RecordBatch) -> pa.RecordBatch:
        texts = batch["text"].to_pylist()
        reasons: dict[int, str] = {}
        facts: dict[int, dict[str, float]] = {}
        changed = False
        for row, (text, is_kept) in enumerate(zip(texts, documents.kept(batch).tolist(), strict=True)):
            if text is None or not is_kept:
                continue
            result, reason, lines = clean(text, rule)
            if reason:
                reasons[row] = f"c4: {reason}"
                continue
            if lines:
                facts[row] = {"c4.lines": lines}
            if result != text:
                texts[row], changed = result, True
        if changed:
            batch = documents.replace(batch, text=texts)
        return documents.reject(documents.add_facts(batch, facts), reasons)

    return step


def clean(text: str, rule: rules.C4) -> tuple[str, str, int]:
    """The lines that stay, or the reason why none do, and how many were cut."""
    kept_lines, sentences, cut = [], 0, 0
    for raw in text.splitlines():
        line = raw.strip()
        words = line.split()
        if len(line) > rule.word_characters and any(len(word) > rule.word_characters for word in words):
            cut += 1
            continue
        if rule.citations and "[" in line:
            line = CITATION.sub("", line)
        ends = line.endswith(rules.LINE_ENDS_C4) and not line.endswith("...")
        if (rule.end_marks and not ends) or len(words) < rule.line_words:
            cut += bool(words)
            continue
        lower = line.lower()
        if rule.placeholder and "lorem ipsum" in lower:
            return text, "lorem ipsum", 0
        if rule.javascript and "javascript" in lower:
            cut += 1
            continue
        if rule.bracket and "{" in line:
            return text, "curly bracket", 0
        if rule.policy and any(phrase in lower for phrase in rules.POLICY_PHRASES):
            cut += 1
            continue
        if sentences < rule.sentences:  # more need not be counted
            sentences += count_sentences(line)
        kept_lines.append(line)
    if sentences < rule.sentences:
        return text, f"sentences {sentences}", 0
    return "\n".join(kept_lines).strip(), "", cut


def count_sentences(line: str) -> int:
    """How many sentences a line has, by the marks that end them."""
    count, end = 0, 0
    for match in (ASCII_SENTENCE_END if line.isascii() else SENTENCE_END).finditer(line):
        count, end = count + 1, match.end()
    return count + bool(line[end:].strip())
