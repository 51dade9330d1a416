"""POST /ask: a question to a database or to documents of the server, or to files that come with it; GET /sources lists them.

`source` of a chat completion asks the same, for clients of OpenAI's interface.

The answer has SQL and rows, or sentences with quotes that were checked, or it says that the question is refused. The layers
that keep a database from harm are those of `llmjax ask` (`retrieve.database.execute`).
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from llmjax.errors import UserError
from llmjax.serve import sources, whole
from llmjax.serve.calls import Call
from llmjax.serve.conversing import Talk
from llmjax.serve.messages import AskBody, ChatBody
from llmjax.serve.refusals import Refusal
from llmjax.serve.server import new_id
from llmjax.serve.sources import Source

MOST_FILES = 100
LONGEST_QUESTION = 2000  # characters


async def ask(call: Call) -> None:
    """Answer a question from a source of the server, or from the files of the request."""
    body = call.read(AskBody)
    served = call.server.writer(body.model)
    source = _source_of(call, body)
    question = checked(body.question, "question")
    setting = {"today": datetime.date.today().isoformat()}
    with call.server.ticket(served, 1, call.key) as ticket:
        talk = Talk(call, served, ticket)
        answer = await _answer(talk, source, question, setting["today"])
    own, row = new_id("ask"), source.shown(answer)
    found = {"id": own, "object": "answer", "model": body.model or served.name, **row, "usage": talk.usage}
    if body.transcript:
        kept = {"id": own, "question": question, "setting": setting, "asked": talk.transcript}
        found["transcript"] = json.dumps({**kept, "answer": {**answer.row(), "reason": row["reason"]}})
    await call.reply.json(found)


async def converse(call: Call, body: ChatBody, name: str, messages: Sequence[Mapping[str, Any]]) -> None:
    """Answer a chat completion from a source. The question is the last message; those before it are not read."""
    served, source = call.server.writer(body.model), _source(call, name)
    whole.check_fields(body, "source")
    last = whole.plain(messages)[-1]
    if last["role"] != "user":
        raise Refusal(400, "the last message must be the user's, with the question", param="messages")
    question = checked(last["content"], "messages")
    with call.server.ticket(served, 1, call.key) as ticket:
        talk = Talk(call, served, ticket, streams=bool(body.stream))
        answer = await _answer(talk, source, question, datetime.date.today().isoformat())
    beside = {"answer": {"source": name, **source.shown(answer)}}
    await whole.send(call, served, body, source.text(answer), talk.usage, beside={}, end=beside)


async def _answer(talk: Talk, source: Source, question: str, today: str) -> Any:
    try:
        return await talk.result(source.begin(question, today))
    except UserError as error:  # its message may tell paths of this machine
        talk.call.facts["source_error"] = str(error)[:500]
        raise Refusal(503, f"{source.name} cannot be read now", code="source_unavailable") from error


async def list_sources(call: Call) -> None:
    """The sources that questions can be asked of, and the tools of the agent."""
    found = [one.listed for one in call.server.sources.values()]
    found += [] if call.server.agents is None else [call.server.agents.listed]
    await call.reply.json({"object": "list", "data": found})


def checked(text: str, param: str) -> str:
    """A question or a goal. Raises Refusal for one that is empty or too long."""
    if not text.strip() or len(text) > LONGEST_QUESTION:
        raise Refusal(400, f"{param} must have from 1 to {LONGEST_QUESTION:,} characters", param=param)
    return text


def _source_of(call: Call, body: AskBody) -> Source:
    """What the question is asked of. Raises Refusal."""
    if (body.files is None) == (body.source is None):
        raise Refusal(400, "give source, a name of GET /sources, or files", param="source")
    if body.files is not None:
        if not 1 <= len(body.files) <= MOST_FILES or len({one.name for one in body.files}) < len(body.files):
            raise Refusal(400, f"files must have from 1 to {MOST_FILES} files with different names", param="files")
        return sources.files(body.files)
    assert body.source is not None
    return _source(call, body.source)


def _source(call: Call, name: str) -> Source:
    """The source of this name. Raises Refusal if there is none."""
    found = call.server.sources.get(name)
    if found is None:
        known = ", ".join(call.server.sources) or "none: start it with --db or --docs"
        message = f"the source {name[:200]!r} does not exist; there are {known}"
        raise Refusal(404, message, code="source_not_found", param="source")
    return found
