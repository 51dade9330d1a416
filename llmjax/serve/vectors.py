"""POST /v1/embeddings and /v1/rerank: one vector for a text, and texts in the order of their likeness to a query."""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from llmjax.infer.given import parts_of_vectors
from llmjax.serve.calls import Call
from llmjax.serve.completions import prompts_of
from llmjax.serve.messages import EmbeddingsBody, RerankBody
from llmjax.serve.refusals import Refusal, unsupported
from llmjax.serve.server import Served, new_id

MOST_TEXTS = 256


async def embeddings(call: Call) -> None:
    """The vectors of texts."""
    body = call.read(EmbeddingsBody)
    served = call.server.model(body.model)
    width = served.model.config.model.width
    if body.dimensions not in (None, width):
        raise unsupported("dimensions", f"the vectors of {served.name} have {width}")
    vectors, tokens = await _vectors(call, served, prompts_of(body.input, served, "input"), "input")
    rows = [
        base64.b64encode(row.astype("<f4").tobytes()).decode() if body.encoding_format == "base64" else row.tolist()
        for row in vectors
    ]
    data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    await call.reply.json({"object": "list", "data": data, "model": body.model or served.name, "usage": usage})


async def rerank(call: Call) -> None:
    """Documents in the order of the cosine of their vectors with the query's."""
    body = call.read(RerankBody)
    served = call.server.model(body.model)
    if not body.query:
        raise Refusal(400, "query must have a text", param="query")
    if not body.documents:
        raise Refusal(400, "documents must have a text", param="documents")
    if body.top_n is not None and body.top_n < 1:
        raise Refusal(400, f"top_n={body.top_n} must be at least 1", param="top_n")
    vectors, tokens = await _vectors(call, served, [body.query, *body.documents], "documents")
    scores = vectors[1:] @ vectors[0]
    order = np.argsort(-scores, kind="stable").tolist()[: body.top_n]
    results: list[dict[str, Any]] = []
    for index in order:
        document = {"document": {"text": body.documents[index]}} if body.return_documents else {}
        results.append({"index": index, "relevance_score": float(scores[index]), **document})
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    await call.reply.json(
        {"id": new_id("rerank"), "model": body.model or served.name, "results": results, "usage": usage}
    )


async def _vectors(
    call: Call, served: Served, texts: Sequence[str | Sequence[int]], param: str
) -> tuple[np.ndarray, int]:
    """The vectors of texts, and how many tokens they have. Raises Refusal."""
    if len(texts) > MOST_TEXTS:
        raise Refusal(400, f"{param} has {len(texts)} texts, and {MOST_TEXTS} may be", param=param)
    if any(not len(text) for text in texts):
        raise Refusal(400, f"{param} has an empty text", param=param)
    call.server.check_ready()
    place = call.server.admission.enter(1, call.key)
    try:
        rows = await call.server.prepare(_ids, served, texts)
        place.hold(sum(map(len, rows)))
        if any(len(row) > served.room for row in rows):
            longest = max(map(len, rows))
            raise Refusal(
                400, f"a text has {longest} tokens, and the model reads {served.room}", code="context_length_exceeded",
                param=param,
            )  # fmt: skip
        vectors = np.array(await call.server.compute(served, lambda model: parts_of_vectors(model, rows)))
    finally:
        place.leave()
    tokens = sum(map(len, rows))
    call.server.metrics.prompt_tokens.inc(tokens)
    call.facts["prompt_tokens"] = tokens
    return vectors, tokens


def _ids(served: Served, texts: Sequence[str | Sequence[int]]) -> list[list[int]]:
    suffix = served.model.tokenizer.suffix_ids
    return [[*served.prompt(text), *(suffix if isinstance(text, str) else ())] for text in texts]
