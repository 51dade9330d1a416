"""Marks of a run: tags and a note that a person gives it, in RUN/marks.json. Nothing that is computed depends on them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmjax import storage
from llmjax.errors import UserError

FILE = "marks.json"
MARKED = ("config.json", "metrics.jsonl", "stages.json", "chain.json", "study.json")  # a folder with one may have marks
TAG = re.compile(r"[^\s#,]{1,40}")
MOST_TAGS, LONGEST_NOTE = 20, 2000


@dataclass(frozen=True)
class Marks:
    """Tags, each once, and a note."""

    tags: tuple[str, ...] = ()
    note: str = ""

    @classmethod
    def parse(cls, tree: Any) -> "Marks":
        """The marks in a value of JSON; what is none is left out, so that a damaged file is no error."""
        tags, note = (tree.get("tags"), tree.get("note")) if isinstance(tree, dict) else ((), "")
        kept = [one for one in tags if isinstance(one, str)] if isinstance(tags, list) else []
        return cls(tuple(dict.fromkeys(kept)), note if isinstance(note, str) else "")


def checked(tags: Sequence[str], note: str) -> Marks:
    """The marks of these tags, each once, and this note. Raises UserError for what is no tag, and for too much."""
    tags = tuple(dict.fromkeys(tags))
    if wrong := [one for one in tags if not TAG.fullmatch(one)]:
        raise UserError(f"{wrong[0][:60]!r} is no tag: give 1 to 40 characters without spaces, commas and #")
    if len(tags) > MOST_TAGS:
        raise UserError(f"a run may have {MOST_TAGS} tags, and these are {len(tags)}: leave some out")
    if len(note) > LONGEST_NOTE:
        raise UserError(f"the note has {len(note):,} characters, and {LONGEST_NOTE:,} may be: shorten it")
    return Marks(tags, note.strip())


def read(folder: Path) -> Marks:
    """The marks of a run. Raises UserError for a file that is no JSON."""
    path = folder / FILE
    return Marks.parse(storage.read_json(path, mend="mend or delete it")) if path.is_file() else Marks()


def write(folder: Path, marks: Marks) -> None:
    """Replace the marks of a run; without any its file goes."""
    if marks == Marks():
        storage.remove(folder / FILE)
    else:
        storage.write_json(folder / FILE, {"tags": marks.tags, "note": marks.note}, shared=True)
