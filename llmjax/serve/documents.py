"""POST /ask: a question to texts that come with it. Each sentence of the answer has a quote that was checked."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmjax.infer.asking import Ask, Conversation, fitting
from llmjax.infer.request import Request
from llmjax.serve import answering
from llmjax.serve.answering import Asked
from llmjax.serve.calls import Call
from llmjax.serve.choices import Written, usage
from llmjax.serve.messages import AskBody, GivenFile
from llmjax.serve.refusals import Refusal
from llmjax.serve.server import Served, new_id

if TYPE_CHECKING:
    from llmjax.retrieve.documents.ask import Answer

MOST_FILES = 100
LONGEST_QUESTION = 2000  # characters


async def ask_files(call: Call) -> None:
    """Answer a question from the files of the request."""
    body = call.read(AskBody)
    served = call.server.writer(body.model)
    if not body.question.strip() or len(body.question) > LONGEST_QUESTION:
        raise Refusal(400, f"question must have from 1 to {LONGEST_QUESTION:,} characters", param="question")
    if not 1 <= len(body.files) <= MOST_FILES or len({one.name for one in body.files}) < len(body.files):
        raise Refusal(400, f"files must have from 1 to {MOST_FILES} files with different names", param="files")
    with call.server.ticket(served, 1, call.key) as ticket:
        begun = await call.server.prepare(_begun, body.question, body.files)
        if not isinstance(begun, tuple):
            await _send(call, served, body, begun, Asked(call, ticket, [], [0]))
            return
        conversation, wanted = begun
        kept, ids = await call.server.prepare(fitting, served.model.tokenizer, served.room, wanted)
        del kept["messages"]
        await ticket.submit([Request(ids=tuple(ids), adapter=served.adapter, **kept)])
        asked = Asked(call, ticket, [Written(served.names)], [len(ids)])
        await answering.finish(asked)
        try:
            conversation.send(asked.texts[0].text)
        except StopIteration as end:
            await _send(call, served, body, end.value, asked)


def _begun(question: str, files: Sequence[GivenFile]) -> "Answer | tuple[Conversation[Answer], Ask]":
    """The conversation about files with what it asks first, or its answer where no passage holds one."""
    from llmjax.retrieve.documents.ask import ask  # takes half a second, which the server's start need not wait for
    from llmjax.retrieve.documents.index import Index

    with tempfile.TemporaryDirectory() as folder, Index(Path(folder)) as index:
        index.add_texts((one.name, one.text.replace("\0", "\ufffd")) for one in files)  # SQLite ends texts there
        conversation = ask(index, question)
        try:
            return conversation, next(conversation)
        except StopIteration as end:
            answer: Answer = end.value
            return answer


async def _send(call: Call, served: Served, body: AskBody, answer: "Answer", asked: Asked) -> None:
    passages = [
        {"path": one.path, "heading": one.heading, "start": one.start, "end": one.end, "text": one.text}
        for one in answer.passages
    ]
    answered = {**answer.row(), "passages": passages, "usage": usage(asked.prompts, asked.texts)}
    await call.reply.json({"id": new_id("ask"), "object": "answer", "model": body.model or served.name, **answered})
