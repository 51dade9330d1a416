"""The rows stage: conversations, preferences or prompts from files become ids on disk, split and without twins.

WORKDIR/rows has train.npz and heldout.npz (see `Store`), index.json with what was read, cut and left out, and
rejected.jsonl with every row that was left out and why. WORKDIR/tokenizer is the tokenizer of the model that is trained
further, with the chat template that was used.
"""

import dataclasses
import hashlib
import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from llmjax import progress, storage
from llmjax.data import conversations, records, tokenizer_stage
from llmjax.data.conversations import Rejected, Row, RowError
from llmjax.data.examples import Example, answer_example, as_messages, examples_of, prompt_ids, whole_ids
from llmjax.data.packing import size_of, text_of, tree_size
from llmjax.data.tokenizer import Tokenizer
from llmjax.data.tokenizer_files import load_tokenizer, with_template
from llmjax.errors import UserError
from llmjax.post import classes, rewards, tools

SPLITS = ("train", "heldout")
WORDS = re.compile(r"\w+")
SHINGLE = 5  # words that follow each other
TWIN = 0.8  # Jaccard similarity of two rows' shingles from which they are one
SHOWN = 3  # rejected rows that are shown on the screen


class Group(NamedTuple):
    """What may not be torn apart: the examples of a conversation's turn, a pair, a ranking, or a prompt."""

    examples: list[Example]
    ranks: list[float]  # one an example, the smaller the better
    margin: float
    columns: dict[str, Any]  # of the row, for rewards
    label: float = 0.0  # what the group is: 1 good or 0 bad, the number of its class, or the number to be predicted


@dataclass(frozen=True)
class Store:
    """Groups of examples as arrays. Group g has the examples first[g] to first[g + 1], and example e the tokens
    start[e] to start[e + 1] of ids (int32) and weights (uint8).
    """

    ids: np.ndarray
    weights: np.ndarray
    start: np.ndarray
    first: np.ndarray
    ranks: np.ndarray  # float32, one an example
    margins: np.ndarray  # float32, one a group
    labels: np.ndarray  # float32, one a group
    columns: list[dict[str, Any]]  # one a group; empty where the objective has no use for them

    def __len__(self) -> int:
        return len(self.first) - 1

    def examples(self, group: int) -> list[Example]:
        return [self.example(e) for e in range(self.first[group], self.first[group + 1])]

    def example(self, number: int) -> Example:
        place = slice(self.start[number], self.start[number + 1])
        return Example(self.ids[place], self.weights[place].astype(np.float32))

    @property
    def sizes(self) -> np.ndarray:
        """The tokens of each example."""
        return np.diff(self.start)


def check(c: ConfigDict, workdir: Path | None, *, fresh: bool) -> None:
    """Raise UserError for what is wrong whatever the rows and the model are."""
    if not c.train.init_from:
        raise UserError("conversations train a model further: give --config.train.init_from=RUN")
    if c.objective.name == "policy":
        rewards.parse(c.rollout.rewards)
        tools.parse(c.rollout.tools)
    _template(c)


def run(c: ConfigDict, workdir: Path) -> dict[str, float | int | str]:
    """Make WORKDIR/rows and WORKDIR/tokenizer afresh from `data.sources`.

    Returns counts: rows, rejected, twins (rows of training that nearly are held-out ones), too_long, and for each split
    groups, tokens and learnt tokens.

    Raises:
        UserError: for files that cannot be read, when more than `data.rejected_percent` of the rows are left out, and
            when nothing is left to train on.
    """
    began = time.perf_counter()
    tokenizer = tokenizer_of(c)
    if c.objective.name == "policy" and c.rollout.tools:
        tools.check(tokenizer, tools.parse(c.rollout.tools))
    rejected: list[Rejected] = []
    rows = list(read(c, rejected))
    _check_template(tokenizer, [row for _, row in rows])
    c = classes.with_labels(c, [row for _, row in rows])
    heldout = {i for i, (_, row) in enumerate(rows) if _is_held_out(row, c.data.holdout_percent)}
    twins = _twins([row for _, row in rows], heldout)
    groups: dict[str, list[Group]] = {split: [] for split in SPLITS}
    counts: Counter[str] = Counter(rows=len(rows) + len(rejected), twins=len(twins))
    show = progress.counter("encoding", " rows") or (lambda done, total: None)
    for i, (file, row) in enumerate(rows):
        show(i + 1, len(rows))
        if i in twins:
            continue
        try:
            made = groups_of(tokenizer, row, c)
        except (RowError, UserError) as error:  # a template may refuse a conversation, which costs that one alone
            rejected.append(Rejected(file, row.number, str(error)))
            continue
        groups["heldout" if i in heldout else "train"] += _fitting(made, c, counts)
    if c.objective.name == "unpaired":
        groups = {split: _fitting(_with_mismatches(made), c, counts) for split, made in groups.items()}
    _check_rejected(c, rejected, counts)
    if not groups["train"]:
        raise UserError(
            f"nothing is left to train on: of {counts['rows']} rows {len(rejected)} were left out and {counts['too_long']} "
            f"texts are longer than train.sequence_length={c.train.sequence_length}"
        )
    folder = workdir / "rows"
    storage.remove(folder)
    storage.remove(workdir / "tokenizer")
    tokenizer.save(workdir / "tokenizer")
    for split in SPLITS:
        save(folder, split, groups[split])
        examples = [example for group in groups[split] for example in group.examples]
        counts[f"{split}_groups"] = len(groups[split])
        counts[f"{split}_tokens"] = sum(len(example.ids) for example in examples)
        counts[f"{split}_learnt_tokens"] = int(sum(example.weights.sum() for example in examples))
    lines = [json.dumps({"file": str(r.file), "row": r.number, "reason": r.reason}) for r in rejected]
    storage.write_text(folder / "rejected.jsonl", "".join(f"{line}\n" for line in lines))
    counts["rejected"] = len(rejected)
    reasons, labels = Counter(r.reason for r in rejected), list(c.objective.classify.labels)
    storage.write_json(folder / "index.json", {"counts": counts, "reasons": reasons, "labels": labels})
    _say(counts, rejected, folder)
    return {**counts, "seconds": round(time.perf_counter() - began, 3)}


def tokenizer_of(c: ConfigDict) -> Tokenizer:
    """The tokenizer of the model that is trained further, with `data.chat_template` in place of its own where that is set.

    Raises UserError when there is none.
    """
    path = tokenizer_stage.chosen(c)
    if not path:
        raise UserError("conversations need a model that is trained further: give --config.train.init_from=RUN")
    tokenizer, template = load_tokenizer(path), _template(c)
    return with_template(tokenizer, template) if template else tokenizer


def groups_of(tokenizer: Tokenizer, row: Row, c: ConfigDict) -> list[Group]:
    """What a row gives to the objective. Raises RowError when it gives nothing."""
    name, ranks = c.objective.name, list(row.ranks)
    if name == "policy":
        if c.rollout.tools:
            if isinstance(row.prompt, str):
                raise RowError("the prompt is a text, and rollout.tools need messages")
            row = dataclasses.replace(row, tools=[tool.schema for tool in tools.parse(c.rollout.tools).values()])
        ids = np.array(prompt_ids(tokenizer, row), np.int32)
        if not len(ids):
            raise RowError("the prompt is empty, and the tokenizer has nothing that begins a text")
        columns = {**row.columns, "prompt": row.prompt}
        return [Group([Example(ids, np.zeros(len(ids), np.float32))], [0.0], 0.0, columns)]
    if name in ("preference", "reward"):
        if len(row.answers) < 2:
            raise RowError(
                "there is one answer, and comparing needs two: give chosen and rejected, or completions with ranks"
            )
        made = [answer_example(tokenizer, row.prompt, a, tools=row.tools, **row.variables) for a in row.answers]
        if name == "reward":
            return [Group([_read_to_its_end(example) for example in made], ranks, row.margin, {})]
        better = [(a, b) for a in range(len(made)) for b in range(len(made)) if ranks[a] < ranks[b]]
        return [Group([made[a], made[b]], [0.0, 1.0], row.margin, {}) for a, b in better]
    if name == "unpaired":
        return _judged(tokenizer, row)
    if name == "classify":
        label = classes.number_of(row, c)
        whole, texts = whole_ids(tokenizer, str(row.prompt), row.second)
        # One id more, and the texts' numbers a place later: as inputs, rows then have every id with its text's number.
        read = Example(np.array([*whole, whole[-1]], np.int32), np.array([0, *texts], np.float32))
        return [Group([read], [0.0], 0.0, {}, label)]
    if not row.answers:
        raise RowError("there is no answer to learn")
    if row.good is False:
        raise RowError("the completion is labelled as bad, and would be learnt as an answer")
    best = row.answers[int(np.argmin(ranks))] if ranks else row.answers[0]
    alone = dataclasses.replace(row, answers=(best,))
    return [Group([e], [0.0], 0.0, {}) for e in examples_of(tokenizer, alone, turns=c.data.turns)]


def _judged(tokenizer: Tokenizer, row: Row) -> list[Group]:
    """A row's answers, each good or bad; of several the best ones are good."""
    if row.good is None and len(row.answers) < 2:
        raise RowError(
            "nothing says whether the answer is good: give label, true or false, beside prompt and completion"
        )
    good = [row.good] if row.good is not None else [rank == min(row.ranks) for rank in row.ranks]
    made = [answer_example(tokenizer, row.prompt, a, tools=row.tools, **row.variables) for a in row.answers]
    return [Group([e], [0.0], 0.0, {}, float(label)) for e, label in zip(made, good, strict=True)]


def _with_mismatches(groups: Sequence[Group]) -> list[Group]:
    """Each answer with a second one: its prompt with the answer of another group, half of all groups further on.

    Never its own, and not a neighbour's, because files keep the answers to one prompt together. One group alone has no
    partner and is left out.
    """
    found = []
    for i, group in enumerate(groups if len(groups) > 1 else ()):
        [own], [other] = group.examples, groups[(i + len(groups) // 2) % len(groups)].examples
        here, there = own.prompt_tokens, other.prompt_tokens
        parts = zip((own.ids, own.weights), (other.ids, other.weights), strict=True)
        mismatched = Example(*(np.concatenate([mine[:here], theirs[there:]]) for mine, theirs in parts))
        found.append(group._replace(examples=[own, mismatched], ranks=[0.0, 0.0]))
    return found


def _fitting(groups: Sequence[Group], c: ConfigDict, counts: Counter[str]) -> list[Group]:
    """The groups that fit into a row; the others are counted."""
    found = [group for group in groups if places(group, shared=c.data.share_prompts) <= c.train.sequence_length]
    counts["too_long"] += len(groups) - len(found)
    return found


def _read_to_its_end(example: Example) -> Example:
    """The example with one id more, so that its last token is an input too: an answer is scored there."""
    return Example(np.append(example.ids, example.ids[-1:]), np.append(example.weights, np.float32(0)))


def places(group: Group, *, shared: bool = False) -> int:
    """The places that a group takes in a row; with `shared` that holds the common part of its prompts once."""
    return tree_size([*map(text_of, group.examples)]) if shared else sum(map(size_of, group.examples))


def save(folder: Path, split: str, groups: Sequence[Group]) -> None:
    """Write the groups of a split."""
    examples = [example for group in groups for example in group.examples]
    arrays: dict[str, Any] = {
        "ids": np.concatenate([e.ids for e in examples]) if examples else np.zeros(0, np.int32),
        "weights": np.concatenate([e.weights for e in examples]).astype(np.uint8)
        if examples
        else np.zeros(0, np.uint8),
        "start": np.cumsum([0, *(len(e.ids) for e in examples)]),
        "first": np.cumsum([0, *(len(group.examples) for group in groups)]),
        "ranks": np.array([rank for group in groups for rank in group.ranks], np.float32),
        "margins": np.array([group.margin for group in groups], np.float32),
        "labels": np.array([group.label for group in groups], np.float32),
    }
    with storage.writing(folder / f"{split}.npz") as file:
        np.savez(file, **arrays)
    if any(group.columns for group in groups):
        lines = "".join(json.dumps(group.columns, default=str) + "\n" for group in groups)
        storage.write_text(folder / f"{split}.columns.jsonl", lines)


def load(workdir: Path, split: str) -> Store:
    """The groups of a split. Raises UserError when the rows stage has not run, or its files are damaged."""
    file = workdir / "rows" / f"{split}.npz"
    try:
        with np.load(file) as found:
            arrays = dict(found)
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise UserError(f"{file} cannot be read ({error}): run the rows stage again") from error
    arrays.setdefault("labels", np.zeros(len(arrays["margins"]), np.float32))  # of runs from before there were any
    beside = file.with_name(f"{split}.columns.jsonl")
    lines = beside.read_text("utf-8").splitlines() if beside.is_file() else ["{}"] * (len(arrays["first"]) - 1)
    return Store(**arrays, columns=[json.loads(line) for line in lines])


def read(c: ConfigDict, rejected: list[Rejected]) -> Iterator[tuple[Path, Row]]:
    """(file, row) of every usable row of `data.sources`; the others are added to `rejected`."""
    for file in records.files_of(c.data.sources):
        for found in conversations.read(file):
            if isinstance(found, Rejected):
                rejected.append(found)
            else:
                yield file, found


def fingerprint(c: ConfigDict, *, folders: bool = True) -> str:
    """A digest of what the stage reads: paths, sizes and times of the files of `data.sources`, and the chat template.

    Args:
        folders: off: of the paths only the names of the files count, so that they may be moved.

    Raises UserError when one is not there.
    """
    files = records.files_of(c.data.sources)
    parts = [[name if folders else Path(name).name, *rest] for name, *rest in map(records.state, files)]
    return hashlib.blake2b(json.dumps([parts, _template(c)]).encode(), digest_size=16).hexdigest()


def _template(c: ConfigDict) -> str:
    """The chat template of `data.chat_template`; "": the tokenizer's own."""
    if not c.data.chat_template or "{" in c.data.chat_template:
        return c.data.chat_template
    file = Path(c.data.chat_template)
    if not file.is_file():
        raise UserError(
            f"data.chat_template={c.data.chat_template} is no file: give one with a Jinja template, or the template itself"
        )
    return storage.read_text(file)


def _text_of(row: Row) -> str:
    """What tells a row from others: all that its prompt says, or the conversation."""
    said = as_messages(row.prompt, "user") or as_messages(row.answers[0] if row.answers else "", "assistant")
    return " ".join(str(message.get("content") or "") for message in said)


def _is_held_out(row: Row, percent: float) -> bool:
    """By a hash of the words of what begins the row, so that equal questions and all rows of a tree are on one side."""
    words = " ".join(WORDS.findall((row.root or _text_of(row)).lower()))
    digest = hashlib.blake2b(words.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64 * 100 < percent


def _shingles(row: Row) -> set[str]:
    words = WORDS.findall(_text_of(row).lower())
    return {" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}


def _twins(rows: Sequence[Row], heldout: set[int]) -> set[int]:
    """The rows of training that are nearly one of the held-out rows."""
    holds: dict[str, list[int]] = defaultdict(list)
    sizes = {}
    for i in heldout:
        shingles = _shingles(rows[i])
        sizes[i] = len(shingles)
        for shingle in shingles:
            holds[shingle].append(i)
    found = set()
    for i, row in enumerate(rows):
        if i in heldout:
            continue
        mine = _shingles(row)
        shared = Counter(other for shingle in mine for other in holds.get(shingle, ()))
        if any(count >= TWIN * (len(mine) + sizes[other] - count) for other, count in shared.items()):
            found.add(i)
    return found


def _check_template(tokenizer: Tokenizer, rows: Sequence[Row]) -> None:
    if tokenizer.chat_template or all(isinstance(text, str) for row in rows for text in (row.prompt, *row.answers)):
        return
    raise UserError(
        "the rows are messages, and the model has no chat template: set --config.data.chat_template=FILE to a Jinja template, "
        "or give prompt and completion as plain texts"
    )


def _check_rejected(c: ConfigDict, rejected: Sequence[Rejected], counts: Counter[str]) -> None:
    if 100 * len(rejected) > c.data.rejected_percent * counts["rows"]:
        raise UserError(
            f"{len(rejected)} of {counts['rows']} rows are left out, more than data.rejected_percent={c.data.rejected_percent:g}:\n"
            + "\n".join(_lines(rejected))
        )


def _lines(rejected: Iterable[Rejected]) -> list[str]:
    """One example of each of the commonest reasons."""
    by_reason: dict[str, list[Rejected]] = defaultdict(list)
    for one in rejected:
        by_reason[one.reason].append(one)
    commonest = sorted(by_reason.items(), key=lambda item: -len(item[1]))
    return [
        f"  {len(found)} x {reason} ({found[0].file.name}, row {found[0].number})"
        for reason, found in commonest[:SHOWN]
    ]


def _say(counts: Counter[str], rejected: Sequence[Rejected], folder: Path) -> None:
    print(
        f"rows: {counts['rows']:,} read; {counts['train_groups']:,} to train on ({counts['train_learnt_tokens']:,} of "
        f"{counts['train_tokens']:,} tokens are learnt), {counts['heldout_groups']:,} held out"
    )
    left_out = {"rejected": "not usable", "too_long": "too long for a row", "twins": "nearly held-out rows"}
    if any(counts[name] for name in left_out):
        told = ", ".join(f"{counts[name]:,} {words}" for name, words in left_out.items() if counts[name])
        print(f"left out: {told}; see {folder / 'rejected.jsonl'}")
        print("\n".join(_lines(rejected)), end="\n" if rejected else "")
