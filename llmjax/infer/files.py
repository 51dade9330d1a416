"""Prompts from a file, answers to another, one JSON object a line; run again, it goes on with what is not answered."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmjax.data.chat import chat_ids
from llmjax.data.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.infer.engine import Engine
from llmjax.infer.request import FIELDS, Request, prompt_ids

OWN = ("id", "prompt", "messages", "ids")
SETTINGS = FIELDS - {"ids", "constraint", "source", "shared", "number"}  # what a row may set for itself


def read_prompts(path: Path) -> Iterator[dict[str, Any]]:
    """Rows with an id each: of JSONL as they are, of other files {"id": line number, "prompt": line}; empty lines are none.

    A row has "prompt" (text), "messages" (for chat models) or "ids", and may have an "id" and settings of its own, such
    as "temperature". Raises UserError with file and line for what is none of that, and for an id that comes twice.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path} with prompts")
    seen: set[str] = set()
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            row: dict[str, Any] = (
                _json_row(path, number, line) if path.suffix == ".jsonl" else {"prompt": line.rstrip("\n")}
            )
            row.setdefault("id", number)
            if str(row["id"]) in seen:
                raise UserError(f"{path}:{number}: the id {row['id']!r} comes twice")
            seen.add(str(row["id"]))
            yield row


def _json_row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{number}: this is no JSON: {error}") from error
    if not isinstance(row, dict) or sum(name in row for name in OWN[1:]) != 1:
        raise UserError(f"{path}:{number}: a row must have one of prompt, messages and ids")
    if unknown := sorted(row.keys() - SETTINGS - set(OWN)):
        raise UserError(
            f"{path}:{number}: no setting is called {unknown[0]!r}; there are {', '.join(sorted(SETTINGS))}"
        )
    return row


def answered(path: Path) -> set[str]:
    """The ids in a file of answers. A last line that was cut off in writing is removed."""
    if not path.is_file():
        return set()
    found, whole = set(), 0
    with path.open("rb") as file:
        for line in file:
            try:
                found.add(str(json.loads(line)["id"]))
            except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
                if line.endswith(b"\n"):
                    raise UserError(f"{path} is no file of answers: give another --out") from error
                break
            whole += len(line)
    if whole < path.stat().st_size:
        os.truncate(path, whole)
    elif whole and not path.read_bytes().endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")
    return found


def request_of(
    tokenizer: Tokenizer, row: dict[str, Any], defaults: dict[str, Any], *, vocab_size: int, chat: bool = False
) -> Request:
    """The request that a row makes; with `chat` a text prompt is what a user says."""
    if "messages" in row or (chat and "prompt" in row):
        ids = chat_ids(tokenizer, row.get("messages") or [{"role": "user", "content": row["prompt"]}])
    else:
        ids = prompt_ids(tokenizer, [row["prompt"] if "prompt" in row else row["ids"]], vocab_size=vocab_size)[0]
    given = {**defaults, **{name: value for name, value in row.items() if name in SETTINGS}}
    for name, value in given.items():
        if name in ("stop", "stop_ids"):
            given[name] = (value,) if isinstance(value, (str, int)) else tuple(value)
        elif name == "logit_bias":
            given[name] = {int(i): float(bias) for i, bias in value.items()}
    return Request(tuple(ids), **given)


def answer_file(
    engine: Engine, rows: Sequence[dict[str, Any]], out: Path, defaults: dict[str, Any], *, chat: bool = False
) -> dict[str, int]:
    """Answer the rows that `out` does not answer yet, in the order in which they are finished: what was done.

    Answers: id, prompt, text, finish, tokens (their number) and log_probability (their sum, nats). A row that cannot be
    answered, being too long, has "error" instead. Row i is sample i of the seed, whatever was answered before.
    """
    done = answered(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    counts = {"answered before": 0, "answered": 0, "refused": 0, "tokens": 0}
    todo = iter(enumerate(rows))
    row_of: dict[int, Any] = {}
    left = True
    with out.open("a", encoding="utf-8") as file:

        def write(answer: dict[str, Any]) -> None:
            file.write(json.dumps(answer, ensure_ascii=False) + "\n")
            file.flush()

        while left or engine.busy:
            while left and len(row_of) < 2 * engine.count:  # enough that no slot waits
                number, row = next(todo, (-1, None))
                if row is None:
                    left = False
                elif str(row["id"]) in done:
                    counts["answered before"] += 1
                else:
                    given = {**defaults, "number": number}
                    vocab_size = engine.module.c.vocab_size
                    try:
                        request = request_of(engine.tokenizer, row, given, vocab_size=vocab_size, chat=chat)
                        row_of[engine.submit(request)] = row
                    except UserError as error:
                        write({"id": row["id"], "error": str(error)})
                        counts["refused"] += 1
            for number, one in engine.step():
                row = row_of.pop(number)
                prompt = row.get("prompt", row.get("messages", one.prompt))
                nats = sum(one.log_probabilities)
                answer = {"id": row["id"], "prompt": prompt, "text": one.text, "finish": one.finish}
                write({**answer, "tokens": len(one.tokens), "log_probability": nats})
                counts["answered"] += 1
                counts["tokens"] += len(one.tokens)
    return counts
