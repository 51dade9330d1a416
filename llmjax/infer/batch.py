"""Batch inference: prompts from one file, answers to another. Run again, it answers the prompts without an answer."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmjax.data.chat import chat_ids
from llmjax.data.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.infer.beam import BeamSearch
from llmjax.infer.engine import Engine
from llmjax.infer.request import CONSTRAINTS, SETTINGS, Request, prompt_ids
from llmjax.infer.resuming import MADE_FROM, MadeFrom, digest, resuming

PROMPTS = ("prompt", "messages", "ids")
BESIDE = ("tools", "documents")  # given to the chat template with the messages


@dataclass(frozen=True)
class Row:
    """A row of a file of prompts, or its error."""

    id: Any  # of the answer: the id of the row, else the number of its line
    number: int  # from 0, with rows that have errors
    where: str  # FILE:LINE
    given: Mapping[str, Any]
    request: Request | None = None
    error: str = ""


def read_prompts(path: Path) -> Iterator[Row]:
    """The rows of a JSONL file, or {"prompt": line} for each line of another file. Empty lines are skipped.

    A row has "prompt" (text), "messages" (for chat models, with "tools" and "documents") or "ids". It may have an "id"
    and settings such as "temperature". A row that is wrong, or whose id came before, gets an error; others are read.
    Raises UserError when there is no such file.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path} with prompts")
    seen: set[str] = set()
    number = 0
    with path.open("rb") as file:
        for line_number, data in enumerate(file, 1):
            line = data.removeprefix(b"\xef\xbb\xbf" if line_number == 1 else b"").rstrip(b"\r\n")
            if not line.strip():
                continue
            where, error = f"{path}:{line_number}", ""
            own: Any = line_number
            given: dict[str, Any] = {}
            try:
                text = line.decode()
                given = _json_row(text) if path.suffix == ".jsonl" else {"prompt": text}
                own = given.get("id", line_number)
                if str(own) in seen:
                    raise UserError(f"the id {own!r} comes twice")
                _check_fields(given)
            except (UserError, UnicodeDecodeError) as wrong:
                what = wrong if isinstance(wrong, UserError) else f"this is no UTF-8: {wrong}"
                own = f"line {line_number}" if str(own) in seen or "id" not in given else own
                error = f"{where}: {what}"
            seen.add(str(own))
            yield Row(own, number, where, given, error=error)
            number += 1


def _json_row(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"this is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise UserError("a row must be an object with one of prompt, messages and ids")
    return row


def _check_fields(row: Mapping[str, Any]) -> None:
    if sum(name in row for name in PROMPTS) != 1:
        raise UserError("a row must have one of prompt, messages and ids")
    if unknown := sorted(row.keys() - SETTINGS - {"id", *PROMPTS, *(BESIDE if "messages" in row else ())}):
        raise UserError(f"no setting is called {unknown[0]!r}; there are {', '.join(sorted(SETTINGS))}")


def made_from(rows: Sequence[Row], common: MadeFrom) -> dict[str, MadeFrom]:
    """What the answer of each row is made from, by its id."""
    return {str(row.id): {"row": digest({k: v for k, v in row.given.items() if k != "id"}), **common} for row in rows}


def with_requests(
    tokenizer: Tokenizer, rows: Sequence[Row], defaults: Mapping[str, Any], *, chat: bool = False
) -> list[Row]:
    """The rows with their requests, or with errors. With `chat` a text prompt is a message of the user."""
    found = []
    for row in rows:
        if not row.error:
            try:
                row = replace(row, request=_request(tokenizer, row, defaults, chat=chat))
            except UserError as error:
                row = replace(row, error=f"{row.where}: {error}")
        found.append(row)
    return found


def _request(tokenizer: Tokenizer, row: Row, defaults: Mapping[str, Any], *, chat: bool) -> Request:
    given = row.given
    own = {name: value for name, value in given.items() if name in SETTINGS}
    if any(name in own for name in CONSTRAINTS):  # in place of the common constraint
        defaults = {name: value for name, value in defaults.items() if name not in CONSTRAINTS}
    if "prompt" in given and not isinstance(given["prompt"], str):
        raise UserError(f"prompt must be a text, not {given['prompt']!r:.60}")
    if "messages" in given or (chat and "prompt" in given):
        messages = given.get("messages", [{"role": "user", "content": given.get("prompt")}])
        ids: Any = chat_ids(tokenizer, messages, **{name: given[name] for name in BESIDE if name in given})
    elif "prompt" in given:
        ids = prompt_ids(tokenizer, [given["prompt"]])[0]
    else:
        ids = given["ids"]
    return Request.parse({**defaults, **own, "ids": ids, "number": row.number})


def answer_file(
    engine: Engine | BeamSearch, rows: Sequence[Row], out: Path, *, common: MadeFrom | None = None
) -> dict[str, int]:
    """Answer the rows without an answer in `out`, and write each answer when it is finished: counts of what was done.

    An answer has id, prompt, text, finish, tokens (their number) and log_probability (their sum, nats). For a row that
    cannot be answered it has id and "error", with file and line. Row i is sample i of the seed, however often the file
    was interrupted. `common` is what all answers are made from, see `resuming`.
    """
    wanted = made_from(rows, common or {})
    counts = {"answered before": 0, "answered": 0, "refused": 0, "tokens": 0}
    todo = iter(rows)
    row_of: dict[int, Row] = {}
    left = True
    with resuming(out, wanted) as (done, file):

        def refuse(row: Row, error: str) -> None:
            file.write(_line({"id": row.id, "error": error, MADE_FROM: wanted[str(row.id)]}))
            counts["refused"] += 1

        while left or engine.busy:
            while left and len(row_of) < 2 * engine.count:  # enough to keep all slots busy
                row = next(todo, None)
                if row is None:
                    left = False
                elif str(row.id) in done:
                    counts["answered before"] += 1
                elif row.request is None:
                    refuse(row, row.error)
                else:
                    try:
                        row_of[engine.submit(row.request)] = row
                    except UserError as error:
                        refuse(row, f"{row.where}: {error}")
            for event in engine.step():
                if (one := event.completion) is None:
                    continue
                row = row_of.pop(event.number)
                if one.error:
                    refuse(row, f"{row.where}: {one.error}")
                    continue
                prompt = row.given.get("prompt", row.given.get("messages", one.prompt))
                nats = sum(one.log_probabilities)
                answer = {"id": row.id, "prompt": prompt, "text": one.text, "finish": one.finish}
                answer |= {"tokens": len(one.tokens), "log_probability": nats, MADE_FROM: wanted[str(row.id)]}
                file.write(_line(answer))
                counts["answered"] += 1
                counts["tokens"] += len(one.tokens)
    return counts


def _line(answer: dict[str, Any]) -> str:
    """One line of JSON, with escapes only for lone surrogates, which are not UTF-8."""
    line = json.dumps(answer, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(answer)
    return line + "\n"
