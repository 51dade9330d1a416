"""Makes a persona: reads and indexes the writings, measures which questions to decline, trains adapters, extracts
facts.

When the same command runs again, each step keeps the results that exist. The training is a chain config: this module
writes it to the persona's voice.py, and `llmjax run` runs it in another process, so that two processes never hold the
devices at once.
"""

import contextlib
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmjax import config, storage
from llmjax.errors import UserError
from llmjax.infer import asking
from llmjax.infer.engine import Engine
from llmjax.persona import card, rights, speakers, style, threshold
from llmjax.persona.card import Fact, Persona
from llmjax.retrieve.documents import ask, reading
from llmjax.retrieve.documents.index import Index

REPLIES = "replies.jsonl"
# What facts are looked for with.
LOOKED_FOR = (
    "I my me born father mother childhood family home friend life years", "I think believe opinion hope fear love hate ought must never",
)  # fmt: skip
EPOCHS = 3
LONGEST_SEQUENCE, SHORTEST_SEQUENCE = 1024, 64
LARGEST_BATCH, FEWEST_STEPS = 8, 20
FEWEST_WORDS = 200  # to learn from
CONFIG = '''"""The training of the persona {name}. `llmjax persona` writes this file again, and gives it what --set has.

    llmjax run --config voice.py --workdir voice
"""

from ml_collections import ConfigDict

from llmjax import config


def get_chain(arg: str = "") -> dict[str, ConfigDict]:
    """One link: {what}."""
    c = config.load({recipe!r}).copy_and_resolve_references().unlock()
    c.name = {link!r}
    c.train.init_from = {base!r}
    c.data.sources = ({source!r},)
    c.data.min_bytes = 1
    c.data.holdout_{holdout} = 10.0
    c.model.adapter.kind = {kind!r}
    c.optimizer.learning_rate = {rate}
    c.train.duration = "{epochs} epochs"
    c.train.batch_size, c.train.sequence_length = {batch}, {length}
    return {{{link!r}: c}}
'''


@dataclass(frozen=True)
class Wanted:
    """The settings of a persona."""

    texts: Path
    name: str
    rights: Path
    base: Path
    folder: Path
    speaker: str = ""
    learn: str = "texts"
    all_weights: bool = False
    questions: Path | None = None
    settings: Sequence[str] = ()  # KEY=VALUE of the training
    again: bool = False


def build(
    wanted: Wanted, open_engine: Callable[[], Engine], *, train: Callable[[Sequence[str]], int] | None = None,
    say: Callable[[str], None] = print,
) -> Persona:  # fmt: skip
    """Make a persona, and write its card.

    Args:
        open_engine: gives the engine of the base model, which extracts the facts.
        train: runs a command of llmjax with these arguments and returns its status; None: in another process.

    Raises UserError for rights that are not stated, before it reads anything else, and for writings that are too few or
    unreadable.
    """
    stated = rights.read(wanted.rights)
    name = card.check_name(wanted.name)
    if wanted.learn == "replies" and not wanted.speaker:
        raise UserError("--learn replies needs --speaker: only plays and novels say what somebody replied to")
    _check_folder(wanted.folder)
    base = config.run_of(wanted.base).resolve()
    if not (base / "config.json").is_file():
        raise UserError(f"--base {wanted.base} is not a run: it has no config.json")
    texts, rows = _read(wanted)
    figures = style.figures(list(texts.values()))
    if wanted.learn != "nothing" and figures["words"] < FEWEST_WORDS:
        raise UserError(
            f"the writings have {figures['words']} words, and at least {FEWEST_WORDS} are needed to learn from: give more of "
            "them, or --learn nothing, which only finds and quotes"
        )
    before, digest = _before(wanted.folder), card.fingerprint(texts)
    if before is not None and before.texts != digest and not wanted.again:
        raise UserError(
            f"the texts changed since the persona in {wanted.folder} was made: --again makes it of them anew"
        )
    with (
        tempfile.TemporaryDirectory() as scratch,
        Index(Path(scratch)) as trial,
    ):  # what is refused leaves nothing behind
        trial.add_texts(texts.items())
        measured = threshold.measure(trial, texts, questions=wanted.questions)
    _write(wanted.folder, texts, rows)
    with Index(wanted.folder / card.INDEX) as index:
        index.update(wanted.folder / card.TEXTS)
        looked = [ask.search(index, words) for words in LOOKED_FOR]
    say(
        f"{name}: {figures['words']:,} words in {len(texts):,} texts; declines below a coverage of {measured.coverage:.2f}"
    )
    run = _trained(wanted, base, figures["words"], train or _command)
    made = Persona(
        name, str(base), run, bool(run) and not wanted.all_weights, stated, measured, figures, speaker=wanted.speaker,
        texts=digest, folder=wanted.folder,
    )  # fmt: skip
    same = before is not None and (before.texts, before.base, before.name) == (digest, made.base, name)
    facts = before.facts if before is not None and same else _facts(name, open_engine, looked, say)
    made = dataclasses.replace(made, facts=facts)
    card.write(made)
    return made


def _check_folder(folder: Path) -> None:
    """Raise UserError for a folder that has something else in it."""
    parts = (card.FILE, card.PAGE, card.TEXTS, card.INDEX, card.VOICE, f"{card.VOICE}.py", REPLIES, "__pycache__")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--to {folder} is a file: give a folder")
    if folder.is_dir() and (other := sorted(one.name for one in folder.iterdir() if one.name not in parts)):
        raise UserError(f"--to {folder} has {other[0]}, which is no part of a persona: give another folder")


def _read(wanted: Wanted) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """The writings by the names of their files in the persona's folder, and rows of what a speaker replied."""
    every = [one for file in reading.files_of(wanted.texts) for one in reading.texts_of(file)]
    found = {path: text for path, text, why in every if not why}
    rows: list[dict[str, Any]] = []
    if wanted.speaker:
        lines = speakers.lines_of(found, wanted.speaker)
        found = {path: "\n\n".join(one.text for one in own) for path, own in lines.items()}
        rows = [
            {"messages": [{"role": "user", "content": one.before}, {"role": "assistant", "content": one.text}]}
            for own in lines.values() for one in own if one.before
        ]  # fmt: skip
    texts: dict[str, str] = {}
    for path, text in found.items():
        if text.strip():
            texts[_file_name(path, texts)] = text
    if not texts:
        path, _, why = every[0] if every else ("", "", "")
        first = f" ({path}: {why or 'empty'})" if path else ""
        raise UserError(
            f"--texts {wanted.texts} has no text that can be read{first}: give files of text, Markdown, HTML, PDF or mail"
        )
    return texts, rows


def _write(folder: Path, texts: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the writings into the persona's folder; files that have not changed stay as they are."""
    inside = folder / card.TEXTS
    for old in sorted(inside.iterdir()) if inside.is_dir() else ():
        if old.name not in texts:
            storage.remove(old)
    files = {inside / name: text for name, text in texts.items()}
    if rows:
        files[folder / REPLIES] = "".join(json.dumps(row) + "\n" for row in rows)
    for path, text in files.items():
        if not path.is_file() or storage.read_text(path) != text:
            storage.write_text(path, text)


def _file_name(path: str, taken: Mapping[str, str]) -> str:
    """A file name for a document: the letters of its path, different from the names in use."""
    name = re.sub(r"[^\w.-]+", "_", path.removesuffix(".txt")).strip("._") or "text"
    found, number = f"{name}.txt", 2
    while found in taken:
        found, number = f"{name}_{number}.txt", number + 1
    return found


def _batch(words: int, longest: int, *, shorter: bool) -> tuple[int, int]:
    """(rows of a step, tokens of a row), small enough that a short text gives several steps. A word counts as one
    token.

    Args:
        shorter: whether rows may be cut; rows of conversations have fixed lengths.
    """
    length = longest
    while shorter and length > SHORTEST_SEQUENCE and words < 4 * length:
        length //= 2
    return min(LARGEST_BATCH, max(1, EPOCHS * words // (FEWEST_STEPS * length))), length


def _trained(wanted: Wanted, base: Path, words: int, train: Callable[[Sequence[str]], int]) -> str:
    """Train on the writings, which have that many words. Returns the run within the folder; "" if there is nothing to
    train."""
    if wanted.learn == "nothing":
        return ""
    folder = wanted.folder.resolve()
    replies = wanted.learn == "replies"
    longest = int(config.load(str(base / "config.json")).model.max_length)
    batch, length = _batch(words, min(LONGEST_SEQUENCE, longest), shorter=not replies)
    written = CONFIG.format(
        name=wanted.name.strip().replace('"', "'").replace("\\", "/"),
        what=f"{'all weights' if wanted.all_weights else 'adapters'} learn {'how it replies' if replies else 'its texts'}",
        recipe="configs/post/sft.py" if replies else "configs/post/cpt.py", link=wanted.learn, base=str(base),
        source=str(folder / (REPLIES if replies else card.TEXTS)), holdout="percent" if replies else "tail_percent",
        kind="none" if wanted.all_weights else "lora", rate=5e-5 if wanted.all_weights else 5e-4,
        epochs=EPOCHS, batch=batch, length=length,
    )  # fmt: skip
    file = wanted.folder / f"{card.VOICE}.py"
    storage.write_text(file, written)
    given = [f"--config.{wanted.learn}.{one}" for one in wanted.settings]
    again = ["--again"] if wanted.again else []
    status = train(["run", "--config", str(file), "--workdir", str(folder / card.VOICE), *given, *again])
    if status:
        raise UserError(
            f"the training of the persona ended with status {status}, for the reason above; the same command goes on"
        )
    return f"{card.VOICE}/{wanted.learn}"


def _command(arguments: Sequence[str]) -> int:
    """Run llmjax in another process; its exit status."""
    return subprocess.run([sys.executable, "-m", "llmjax", *arguments], check=False).returncode


def _before(folder: Path) -> Persona | None:
    """The persona in the folder; None if its card is missing, damaged or out of date, and must be made again."""
    with contextlib.suppress(UserError):
        return card.read(folder)
    return None


def _facts(
    name: str, open_engine: Callable[[], Engine], looked: Sequence[Sequence[ask.Passage]], say: Callable[[str], None]
) -> tuple[Fact, ...]:
    """The facts that the base model extracts from passages."""
    jobs = [(number, lambda p=passages: card.facts(name, p)) for number, passages in enumerate(looked) if passages]
    found: list[Fact] = []
    for one in asking.run(open_engine(), jobs) if jobs else ():
        if one.error:
            say(f"no facts from some passages: {one.error}")
        found += one.result or ()
    return tuple({fact.sentence: fact for fact in found}.values())[: card.FACTS]
