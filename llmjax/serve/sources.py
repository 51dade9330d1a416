"""What questions are asked of: databases and documents of the server's operator, and files that come with a question."""

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmjax.errors import UserError
from llmjax.infer.asking import Conversation
from llmjax.progress import counter
from llmjax.serve.messages import GivenFile

if TYPE_CHECKING:
    from llmjax.retrieve.documents.ask import Answer as DocumentsAnswer
    from llmjax.retrieve.documents.index import Index
    from llmjax.retrieve.questions import Answer


@dataclass(frozen=True)
class Source:
    """A source of answers.

    Args:
        kind: database or documents.
        begin: the conversation about a question. Its second argument is today's date.
        shown: the answer as clients get it.
        text: the answer as a text.
    """

    name: str
    kind: str
    begin: Callable[[str, str], "Conversation[Answer]"]
    shown: Callable[[Any], dict[str, Any]]
    text: Callable[[Any], str]

    @property
    def listed(self) -> dict[str, Any]:
        """The entry of GET /sources."""
        return {"id": self.name, "object": "source", "kind": self.kind}


def database(path: Path) -> Source:
    """A database. Each question opens it, and so sees its tables as they are. Raises UserError if it cannot be read now."""
    from llmjax.retrieve.database import ask
    from llmjax.retrieve.database.execute import open_database

    def begin(question: str, today: str) -> "Conversation[Answer]":
        answer = yield from ask.ask(open_database(path), question, today=today)
        return answer

    def safe(answer: ask.Answer) -> ask.Answer:
        """A message of the database may have its path, which is the operator's."""
        return replace(answer, reason=answer.reason.replace(str(path.expanduser().absolute()), path.name))

    _ = open_database(path).schema
    place = path.resolve()
    return Source(
        _name(place.name if place.is_dir() else place.stem),
        "database",
        begin,
        lambda answer: safe(answer).row(),
        lambda answer: ask.table_text(safe(answer)),
    )


def documents(path: Path, index: Path) -> Source:
    """A folder of documents, whose index is brought up to date now. Raises UserError for a folder without documents.

    Args:
        index: the folder of the index.
    """
    from llmjax.retrieve.documents.index import Index

    with Index(index) as opened:
        opened.update(path, tell=counter("reading", " files"))

    def begin(question: str, today: str) -> "Conversation[Answer]":
        if not opened.path.is_file():  # an empty one would be made
            raise UserError(f"{opened.path} is gone: start the server again, which makes it anew")
        return _conversation(functools.partial(Index, index), question)

    return Source(_name(path.resolve().name), "documents", begin, shown_documents, lambda answer: answer.text)


def _name(name: str) -> str:
    """A name of a file in UTF-8, which it may not be."""
    return name.encode("utf-8", "backslashreplace").decode()


def files(given: Sequence[GivenFile]) -> Source:
    """Files that came with a question."""

    def begin(question: str, today: str) -> "Conversation[Answer]":
        return _conversation(functools.partial(_filled, given), question)

    return Source("files", "documents", begin, shown_documents, lambda answer: answer.text)


@contextlib.contextmanager
def _filled(given: Sequence[GivenFile]) -> "Iterator[Index]":
    from llmjax.retrieve.documents.index import Index

    with tempfile.TemporaryDirectory() as folder, Index(Path(folder)) as index:
        index.add_texts((one.name, one.text.replace("\0", "\ufffd")) for one in given)  # SQLite ends texts there
        yield index


def _conversation(
    opened: "Callable[[], contextlib.AbstractContextManager[Index]]", question: str
) -> "Conversation[DocumentsAnswer]":
    """The conversation about an index. SQLite's connections stay in one thread, so the index is closed before the model answers."""
    from llmjax.retrieve.documents.ask import ask  # takes half a second, which the server's start need not wait for

    with opened() as index:
        conversation = ask(index, question)
        try:
            asked = next(conversation)
        except StopIteration as end:
            refused: DocumentsAnswer = end.value
            return refused
    text = yield asked
    try:
        conversation.send(text)
    except StopIteration as end:
        answer: DocumentsAnswer = end.value
        return answer
    raise AssertionError("a question to documents asks the model once")


def shown_documents(answer: "DocumentsAnswer") -> dict[str, Any]:
    """The row of an answer, with the texts of its passages."""
    passages = [
        {"path": one.path, "heading": one.heading, "start": one.start, "end": one.end, "text": one.text}
        for one in answer.passages
    ]
    return {**answer.row(), "passages": passages}
