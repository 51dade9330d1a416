"""Benchmark questions in training text: runs of words in common, how much they cover, and the longest common text.

Brown et al. (2020), "Language Models are Few-Shot Learners", appendix C, call 13 words in a row a collision. That misses
short questions and most edited ones, and a proverb is a collision too. This module looks up runs of 8 words. It reports
an item if a run has 13 words or if runs cover half of the item, with how much matched and the longest common text.
`leaked` is a rule over these reports.

Words are those of `kernels.words`: case-folded, without punctuation, digits kept.
"""

import collections
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from llmjax import storage
from llmjax.errors import UserError
from llmjax.prepare.kernels import windows
from llmjax.prepare.kernels.words import UNSPACED, find_words, rolling, room, tables, utf8

SHORT = 8  # words of a run that is looked up; a match of fewer words may be chance
HALF = 0.5  # an item is reported if runs of SHORT words cover this share of it
SHARED = 3  # a run in more items of a benchmark than this is an instruction, not a question
NEARLY_ALL = 0.83  # a text with this share of a question has the question, edited
GOES_ON = 2  # with this many equal words beyond its runs a text has the question, edited
IDEOGRAPH_LETTERS = 2  # a character of Chinese or Japanese counts as this many letters
EAST_ASIAN = 0x2E80  # the first of them
ANSWER = 2  # an answer without its question, often a plain fact, must be so many times as long
# Interrogatives. A text that only quotes what a question quotes ("We hold these truths ... Who wrote this?") lacks them.
_ASKING = (
    "who whom whose what which when where why how wer wen wem was wann wo warum wie welche welcher welches qui que "
    "quoi quel quelle quels quelles quand où pourquoi comment combien quién qué cuál cuándo dónde cómo cuánto cosa "
    "quale quando perché quanto quem qual onde кто что какой какая какие когда где почему как сколько 谁 誰 什 哪 何 几 幾 吗 "
    "嗎"
)
ASKING = frozenset(_ASKING.split())
QUESTION_KEYS = (
    "question", "query", "ctx", "prompt", "problem", "instruction", "input", "sentence", "passage", "context", "text",
)  # fmt: skip
ANSWER_KEYS = ("canonical_solution", "solution", "answer", "target", "output", "completion", "response")
ID_KEYS = ("id", "task_id", "ind", "idx", "qid", "question_id")
SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("benchmark", pa.string()),
        ("item", pa.string()),
        ("field", pa.string()),  # question, answer, or both in a row
        ("words", pa.int64()),  # of the field, in common runs of at least SHORT words
        ("run", pa.int64()),  # of the longest of these runs
        ("share", pa.float64()),  # of the field's words
        ("own", pa.int64()),  # characters of all words in common, at the same place or in runs
        ("same", pa.float64()),  # share of these words
        ("marked", pa.bool_()),  # whether the field has a question mark
        ("states", pa.bool_()),  # whether it has no interrogative
        ("asks", pa.bool_()),  # whether the common words include one, or the text is an edit of a field with one
        ("characters", pa.int64()),  # of the longest common text, case and punctuation aside
        ("text", pa.string()),  # the words of the document that are in it
    ]
)


class Item(NamedTuple):
    """A question of a benchmark: its name within it and the texts to look for, by what they are."""

    id: str
    fields: Mapping[str, str]


@dataclass(frozen=True)
class Entry:
    """One text of one item, as words; `asking` are those that ask, by their places, if it has a question mark."""

    benchmark: str
    item: str
    field: str
    words: tuple[str, ...]
    is_marked: bool
    asking: frozenset[int]


@dataclass(frozen=True)
class Index:
    """What `overlaps` looks for.

    Attributes:
        grams: hashes of runs of SHORT words, sorted, uint64 (places,), one for each place where the run occurs.
        entry, position: which entry has the run, and from which of its words on, int64 (places,).
        filter: bitmap of the hashes, of `windows.make_filter`.
        words: a run of this many words is reported, whatever its share of the item.
        left_out: by benchmark, the number of items with too few words.
    """

    entries: Sequence[Entry]
    grams: np.ndarray
    entry: np.ndarray
    position: np.ndarray
    filter: np.ndarray
    words: int
    left_out: Mapping[str, int]


def read_benchmark(path: str | Path) -> list[Item]:
    """The items of a JSON-lines file (.gz too) in the format of a Hugging Face data set or the evaluation harness.

    It knows a question, context or prompt with its answer, and choices with the number, letter or labels of the right one
    (ARC, HellaSwag, MMLU, TruthfulQA, GSM8K, HumanEval). In other rows the longest string is the question.

    Raises:
        UserError: if a line is not a JSON object, or has no text in it.
    """
    path = Path(path)
    items = []
    for number, line in enumerate(storage.read_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            advice = "write the benchmark as JSON lines, one object a line (datasets: `to_json`)"
            raise UserError(f"{path}, line {number}, is not JSON ({error}): {advice}") from error
        if not isinstance(row, dict) or not any(isinstance(value, str) and value for value in row.values()):
            raise UserError(f"{path}, line {number}: a row must be an object with the question as a string field")
        items.append(_item(row, number))
    if not items:
        raise UserError(f"{path} has no rows")
    return items


def _item(row: Mapping[str, Any], number: int) -> Item:
    name = next((str(row[key]) for key in ID_KEYS if row.get(key) not in (None, "")), str(number))
    question = next((row[key] for key in QUESTION_KEYS if isinstance(row.get(key), str) and row[key].strip()), None)
    if question is None:
        question = max((value for value in row.values() if isinstance(value, str)), key=len)
    fields = {"question": question}
    answer = _right_choice(row)
    if answer is None:
        answer = next((row[key] for key in ANSWER_KEYS if isinstance(row.get(key), str)), None)
    if answer:
        fields["answer"] = answer
        if len(question.split()) < 2 * SHORT:  # too short alone, but perhaps not with its answer
            fields["question and answer"] = f"{question} {answer}"
    if isinstance(row.get("test"), str):
        fields["test"] = row["test"]
    return Item(name, fields)


def _right_choice(row: Mapping[str, Any]) -> str | None:
    """The text of the right one of several choices, however the benchmark marks it."""
    targets = row.get("mc1_targets")
    if isinstance(targets, dict) and 1 in targets.get("labels", ()):
        return str(targets["choices"][targets["labels"].index(1)])
    choices = row.get("choices", row.get("endings", row.get("options")))
    letters: Sequence[Any] = list("ABCDEFGHIJ")
    if isinstance(choices, dict):
        letters, choices = choices.get("label", letters), choices.get("text")
    answer = next((row[key] for key in ("answerKey", "answer", "label", "gold", "answer_index") if key in row), None)
    if not isinstance(choices, list) or answer is None:
        return None
    if answer in letters:
        place = list(letters).index(answer)
    elif str(answer).lstrip("-").isdigit():
        place = int(answer)
    else:
        return str(answer) if answer in choices else None
    return str(choices[place]) if 0 <= place < len(choices) else None


def _words(text: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Hashes of the words of a text, their bytes (words, 2), and the words in lower case."""
    raw = text.encode()
    data = np.frombuffer(raw or b" ", np.uint8)
    hashes, spans = np.empty(len(raw) + 1, np.uint64), np.empty((len(raw) + 1, 2), np.int64)
    count = find_words(data, 0, len(raw), tables(), False, hashes, spans)
    return hashes[:count], spans[:count], tuple(raw[a:b].decode().casefold() for a, b in spans[:count])


def index(benchmarks: Mapping[str, Iterable[Item]], *, words: int = 13) -> Index:
    """The runs of SHORT words of all items, by benchmark.

    Leaves out runs in more than SHARED items of a benchmark, which are its instructions, and texts of fewer than SHORT words.

    Args:
        words: a run of this many words counts, whatever its share of the item.

    Raises:
        UserError: for fewer than SHORT words, which match by chance.
    """
    if words < SHORT:
        raise UserError(f"decontaminate_words must be at least {SHORT}, not {words}: shorter runs match by chance")
    entries: list[Entry] = []
    grams: list[np.ndarray] = []  # of each entry
    left_out: dict[str, int] = {}
    shared: set[int] = set()
    for benchmark, items in benchmarks.items():
        seen: collections.Counter[int] = collections.Counter()
        left_out[benchmark] = 0
        for item in items:
            runs: set[int] = set()
            for name, text in item.fields.items():
                hashes, _, plain = _words(text)
                if len(hashes) >= SHORT:
                    is_marked = "?" in text or "\uff1f" in text
                    asking = frozenset(i for i, word in enumerate(plain) if is_marked and word in ASKING)
                    entries.append(Entry(benchmark, item.id, name, plain, is_marked, asking))
                    grams.append(np.empty(len(hashes), np.uint64))
                    grams[-1] = grams[-1][: rolling(hashes, len(hashes), SHORT, grams[-1])]
                    runs.update(grams[-1].tolist())
            left_out[benchmark] += not runs
            seen.update(runs)
        shared.update(run for run, count in seen.items() if count > SHARED)
    places = [
        (run, number, position)
        for number, runs_of in enumerate(grams)
        for position, run in enumerate(runs_of.tolist())
        if run not in shared
    ]
    places.sort()
    sorted_grams = np.array([run for run, _, _ in places], np.uint64)
    return Index(
        entries=entries,
        grams=sorted_grams,
        entry=np.array([entry for _, entry, _ in places], np.int64),
        position=np.array([position for _, _, position in places], np.int64),
        filter=windows.make_filter(sorted_grams),
        words=words,
        left_out=left_out,
    )


def overlaps(texts: pa.LargeStringArray, index: Index) -> pa.Table:
    """The items that a text has in common runs of words with: a table of SCHEMA, sorted by row, benchmark and item.

    Reports items with a run of `index.words` words or more, and items half covered by runs of SHORT words. One field of an
    item is reported: a half-covered question first (a wholly covered one before all), else the field with the longest
    common text.
    """
    data, offsets = utf8(texts)
    hashes = np.empty(room(offsets), np.uint64)
    size = 4096
    while True:
        rows, starts, places = np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.int64)
        arguments = ((data, offsets), tables(), index.grams, SHORT, index.filter, hashes, rows, starts, places)
        count = windows.matches(*arguments)
        if count <= size:
            break
        size = count
    by_row: dict[int, list[tuple[int, int]]] = {}
    for row, start, place in zip(rows[:count].tolist(), starts[:count].tolist(), places[:count].tolist(), strict=True):
        by_row.setdefault(row, []).append((start, place))
    result: list[dict[str, Any]] = []
    for row, hits in by_row.items():
        best: dict[tuple[str, str], dict[str, Any]] = {}
        for found in _in_text(texts[row].as_py(), hits, index):
            key = (found["benchmark"], found["item"])
            if key not in best or _weight(found) > _weight(best[key]):
                best[key] = {"row": row, **found}
        result.extend(best[key] for key in sorted(best))
    return pa.Table.from_pylist(result, SCHEMA)


def _weight(found: Mapping[str, Any]) -> tuple[bool, bool, int, float]:
    is_question = found["field"].startswith("question") and found["share"] >= HALF
    return is_question, found["share"] == 1, found["characters"], found["share"]


def _in_text(text: str, hits: Sequence[tuple[int, int]], index: Index) -> Iterator[dict[str, Any]]:
    """What the entries of these hits have in common with a text."""
    # entry -> (word of the text - word of the entry) -> words of the entry
    aligned: dict[int, dict[int, set[int]]] = {}
    for start, place in hits:
        last = int(np.searchsorted(index.grams, index.grams[place], side="right"))
        for i in range(place, last):
            position = int(index.position[i])
            words = aligned.setdefault(int(index.entry[i]), {}).setdefault(start - position, set())
            words.update(range(position, position + SHORT))
    _, spans, plain = _words(text)
    raw = text.encode()
    for number, by_shift in aligned.items():
        entry = index.entries[number]
        covered: set[int] = set().union(*by_shift.values())
        found = [_longest(entry.words, plain, shift, sorted(words)) for shift, words in sorted(by_shift.items())]
        length, first, last = max(found)
        share = len(covered) / len(entry.words)
        run = max(_most_in_a_row(sorted(words)) for words in by_shift.values())
        if share < HALF and run < index.words:
            continue
        # Equal words at the same place outside the runs, too few in a row to be looked up: signs of an edited question.
        same = covered.union(*(_same(entry.words, plain, shift) for shift in by_shift))
        yield {
            "benchmark": entry.benchmark,
            "item": entry.item,
            "field": entry.field,
            "words": len(covered),
            "run": run,
            "share": share,
            "own": sum(_letters(entry.words[i]) for i in same) - 1,
            "same": len(same) / len(entry.words),
            "marked": entry.is_marked,
            "states": not entry.asking,
            "asks": bool(entry.asking & same) or (bool(entry.asking) and len(same - covered) >= GOES_ON),
            "characters": length,
            "text": raw[spans[first, 0] : spans[last, 1]].decode(),
        }


def _longest(entry: Sequence[str], text: Sequence[str], shift: int, words: Sequence[int]) -> tuple[int, int, int]:
    """Characters of the longest common text through runs of these words, and its first and last whole word in the text."""
    best = (0, 0, 0)
    at = 0
    while at < len(words):
        end = at
        while end + 1 < len(words) and words[end + 1] == words[end] + 1:
            end += 1
        first, last = words[at], words[end]
        length = sum(map(_letters, entry[first : last + 1])) - 1
        if first > 0 and first + shift > 0:
            length += _common_end(entry[first - 1], text[first + shift - 1])
        if last + 1 < len(entry) and last + shift + 1 < len(text):
            length += _common_end(entry[last + 1][::-1], text[last + shift + 1][::-1])
        best = max(best, (length, first + shift, last + shift))
        at = end + 1
    return best


def _most_in_a_row(numbers: Sequence[int]) -> int:
    """The length of the longest stretch of consecutive numbers in a sorted sequence."""
    best = length = 0
    previous = -2
    for number in numbers:
        length = length + 1 if number == previous + 1 else 1
        best, previous = max(best, length), number
    return best


def _letters(word: str) -> int:
    """Characters of a word and the blank behind it. Words of unspaced scripts are single letters without a blank."""
    if not _is_unspaced(word):
        return len(word) + 1
    return IDEOGRAPH_LETTERS if ord(word[0]) >= EAST_ASIAN else 1


def _is_unspaced(word: str) -> bool:
    """Whether a word is a letter of a script without spaces, with its marks."""
    return any(first <= ord(word[0]) <= last for first, last in UNSPACED)


def _common_end(a: str, b: str) -> int:
    """How many last characters two different words have in common, with the blank behind them."""
    if _is_unspaced(a) or _is_unspaced(b):
        return 0
    count = 0
    while count < min(len(a), len(b)) and a[-1 - count] == b[-1 - count]:
        count += 1
    return count + 1


def _same(entry: Sequence[str], text: Sequence[str], shift: int) -> set[int]:
    """Words of the entry that the text has at the place that the shift says."""
    places = range(max(0, -shift), min(len(entry), len(text) - shift))
    return {i for i in places if entry[i] == text[i + shift]}


def leaked(table: pa.Table, *, characters: int = 50, share: float = 0.3, words: int = 26) -> np.ndarray:
    """Rows of texts to reject for `overlaps`, int64, sorted, each once.

    A leak is a common text of `characters` characters (as in GPT-4's report, Achiam et al. 2023, appendix C) that is
    `share` of the item or has `words` words. Half of a question is one too if its common words have `characters` characters,
    so that lightly edited questions are found. Of a question that is asked as a whole, half of `characters` is enough.

    A text may have what an item quotes, or a fact that it is about: a law, a proverb, a famous sentence. So the
    interrogative of a question must be among the common words, or nearly all of the item. The rest of a long passage
    (`words`) identifies it too, if the item asks nothing. An answer alone must be `ANSWER` times as long.
    """
    covered, same, own = (table[name].to_numpy() for name in ("share", "same", "own"))
    marked, states, asks = (table[name].to_numpy() for name in ("marked", "states", "asks"))
    fields = table["field"].to_pylist()
    questions = np.array([name.startswith("question") for name in fields], bool)
    least = np.where(np.array(fields, object) == "answer", ANSWER * characters, characters)
    is_long, nearly_all = table["words"].to_numpy() >= words, same >= NEARLY_ALL
    much = (table["characters"].to_numpy() >= least) & ((covered >= share) | is_long)
    half = questions & (covered >= HALF) & (own >= characters)
    whole = questions & (2 * own >= characters) & ((asks & nearly_all) | (marked & (covered == 1)))
    quotes = questions & ~asks & ~nearly_all & ~(states & is_long)
    return np.unique(table["row"].to_numpy()[((much | half) & ~quotes) | whole])
