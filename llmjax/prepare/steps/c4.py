"""C4's rules: lines that are not sentences, or about cookies and scripts, are cut; what is left must be sentences."""

import functools
import re

import pyarrow as pa
from ml_collections import ConfigDict

from llmjax.prepare import records, rules
from llmjax.prepare.records import Step

CITATION = re.compile(r"\[(?:\d*|edit|citation needed)\]")
# A sentence ends in marks, with or without closing quotes, before white space; what follows the last is one more.
SENTENCE = re.compile(
    rf"[^{re.escape(rules.TERMINAL_MARKS)}]*[{re.escape(rules.TERMINAL_MARKS)}]+[\"'”\u2019)\]]*(?=\s|$)"
)


def make(settings: ConfigDict) -> Step:
    """The step; kept texts lose lines, and a text with too few sentences left is rejected as it was."""
    return functools.partial(apply, rule=rules.C4())


def apply(batch: pa.RecordBatch, rule: rules.C4) -> pa.RecordBatch:
    """The batch after the rule; facts count the lines that were cut from kept texts."""
    texts = batch["text"].to_pylist()
    reasons: dict[int, str] = {}
    facts: dict[int, dict[str, float]] = {}
    changed = False
    for row, (text, is_kept) in enumerate(zip(texts, records.kept(batch).tolist(), strict=True)):
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
        batch = records.replace(batch, text=texts)
    return records.reject(records.add_facts(batch, facts), reasons)


def clean(text: str, rule: rules.C4) -> tuple[str, str, int]:
    """The lines that stay, or the reason why none do, and how many were cut."""
    kept_lines, sentences, cut = [], 0, 0
    for raw in text.splitlines():
        line = raw.strip()
        words = line.split()
        if any(len(word) > rule.word_characters for word in words):
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
        sentences += count_sentences(line)
        kept_lines.append(line)
    if sentences < rule.sentences:
        return text, f"sentences {sentences}", 0
    return "\n".join(kept_lines).strip(), "", cut


def count_sentences(line: str) -> int:
    """How many sentences a line has, by the marks that end them."""
    count, end = 0, 0
    for match in SENTENCE.finditer(line):
        count, end = count + 1, match.end()
    return count + bool(line[end:].strip())
