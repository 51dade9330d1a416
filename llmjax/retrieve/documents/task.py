"""Tasks of `llmjax eval`: how well a model's vectors find what is relevant, and how well its answers cite it.

Both read *corpus*.jsonl (.gz), rows with id, title, and text or sentences, and *queries*.jsonl, rows with question (or claim)
and relevant, the ids. Each document is one block.
"""

import functools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llmjax import storage
from llmjax.errors import UserError
from llmjax.eval.leaderboard import TaskScore
from llmjax.eval.statistics import mean
from llmjax.infer import asking
from llmjax.infer.language_model import LanguageModel
from llmjax.retrieve.documents import ask, embed
from llmjax.retrieve.documents.index import DEPTH, Index, fused
from llmjax.retrieve.documents.measures import ndcg, recall

Documents = list[tuple[str, str, str]]  # id, title, text
Queries = list[tuple[str, list[str]]]  # text, ids of relevant documents
Rankings = list[list[tuple[int, float]]]  # (block, score) for each query
LENGTH = 2048  # tokens of a prompt and an answer


def retrieval(model: LanguageModel, folders: Sequence[str | Path], *, limit: int = 0) -> TaskScore:
    """nDCG@10 and recall@100 of BM25, of the model's mean-pooled vectors, and of both by reciprocal rank."""
    documents, queries = _read(folders, limit)
    with tempfile.TemporaryDirectory() as folder, Index(Path(folder)) as index:
        index.add(documents)
        lexical = [index.lexical(text) for text, _ in queries]
        rankings = {"bm25": lexical} | with_encoder(index, queries, lexical, functools.partial(embed.encode, model))
        scores = {name: scored(index, found, queries) for name, found in rankings.items()}
    items = [
        {"id": number, **{f"{name}_{measure}": values[number] for name, own in scores.items() for measure, values in own.items()}}
        for number in range(len(queries))
    ]  # fmt: skip
    metrics = {name: mean([item[name] for item in items]) for name in items[0] if name != "id"}
    return TaskScore("retrieval", 0, "fused_ndcg@10", metrics, items)


def citations(model: LanguageModel, folders: Sequence[str | Path], *, limit: int = 0) -> TaskScore:
    """Of answers to the queries: the shares of sentences with a citation that holds, of citations that hold, of citations of a
    relevant document, and of questions that are refused. A question without the sentences of a share has none of it."""
    documents, queries = _read(folders, limit)
    engine = model.engine(slots=4, length=min(LENGTH, model.config.model.max_length))
    with tempfile.TemporaryDirectory() as folder, Index(Path(folder)) as index:
        index.add(documents)
        jobs = [(number, functools.partial(ask.ask, index, text)) for number, (text, _) in enumerate(queries)]
        found = {one.key: one.result for one in asking.run(engine, jobs)}
    items: list[dict[str, Any]] = []
    for number, (_, relevant) in enumerate(queries):
        answer = found[number]
        item: dict[str, Any] = {"id": number, "refused": float(answer is None or answer.refused)}
        if answer is not None and (kept := len(answer.citations)) + (lost := len(answer.dropped)):
            sentences = {one.sentence for one in answer.citations} | {one["sentence"] for one in answer.dropped}
            item["citation_recall"] = len({one.sentence for one in answer.citations}) / len(sentences)
            item["citation_precision"] = kept / (kept + lost)
            if kept:
                item["cited_relevant"] = sum(one.path in relevant for one in answer.citations) / kept
        items.append(item)
    names = ("refused", "citation_recall", "citation_precision", "cited_relevant")
    metrics = {name: mean(values) for name in names if (values := [item[name] for item in items if name in item])}
    return TaskScore(
        "citations", 0, "citation_precision" if "citation_precision" in metrics else "refused", metrics, items
    )


def with_encoder(
    index: Index, queries: Queries, lexical: Rankings, encode: Callable[[Sequence[str]], Any]
) -> dict[str, Rankings]:
    """The rankings by an encoder's vectors ("encoder"), and fused with those by words ("fused")."""
    index.embed("encoder", encode)
    semantic = [index.semantic("encoder", vector) for vector in encode([text for text, _ in queries])]
    return {"encoder": semantic, "fused": [fused(a, b)[:DEPTH] for a, b in zip(lexical, semantic, strict=True)]}


def scored(index: Index, rankings: Rankings, queries: Queries) -> dict[str, list[float]]:
    """The measures of a ranking for each query."""
    found: dict[str, list[float]] = {"ndcg@10": [], "recall@1": [], "recall@10": [], "recall@100": []}
    for ranking, (_, relevant) in zip(rankings, queries, strict=True):
        named = [index.path_of(block) for block, _ in ranking]
        found["ndcg@10"].append(ndcg(named, dict.fromkeys(relevant, 1.0)))
        for k in (1, 10, 100):
            found[f"recall@{k}"].append(recall(named, relevant, k=k))
    return found


def read_documents(path: Path) -> Documents:
    """The documents of a collection, JSONL or the paragraphs of SQuAD's JSON."""
    if path.suffix == ".json":
        return [(str(number), "", one["context"]) for number, one in enumerate(_paragraphs(path))]
    found = []
    for line, row in _lines(path):
        if row.get("text") is None and row.get("sentences") is None:
            raise UserError(f"{path}, line {line}, has neither text nor sentences: give one of them")
        text = row["text"] if row.get("text") is not None else " ".join(map(str, row["sentences"]))
        found.append((_field(path, line, row, "id"), str(row.get("title") or ""), str(text)))
    return found


def read_queries(path: Path) -> Queries:
    """The queries with the ids of what is relevant; of SQuAD's JSON a question's own paragraph is."""
    if path.suffix == ".json":
        return [
            (one["question"], [str(n)]) for n, paragraph in enumerate(_paragraphs(path)) for one in paragraph["qas"]
        ]
    found: Queries = []
    for line, row in _lines(path):
        text = _field(path, line, row, "question" if row.get("claim") is None else "claim")
        relevant = row.get("relevant")
        if not isinstance(relevant, list):
            raise UserError(f"{path}, line {line}: relevant is {relevant!r}, and must be a list of ids of documents")
        found.append((text, [str(one) for one in relevant]))
    return found


def _field(path: Path, line: int, row: dict[str, Any], name: str) -> str:
    if row.get(name) is None:
        raise UserError(f"{path}, line {line}, has no {name}")
    return str(row[name])


def _read(folders: Sequence[str | Path], limit: int) -> tuple[Documents, Queries]:
    found = []
    for name in ("corpus", "queries"):
        files = sorted(path for folder in folders for path in Path(folder).rglob(f"*{name}*.jsonl*"))
        if len(files) != 1:
            where = ", ".join(map(str, folders)) or "no folder"
            raise UserError(
                f"there must be one file *{name}*.jsonl in {where}, not {len(files)}: give its folder with --data"
            )
        found.append(files[0])
    queries = read_queries(found[1])
    return read_documents(found[0]), queries[:limit] if limit else queries


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a JSONL file with the numbers of their lines."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    for number, line in enumerate(storage.read_lines(path), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}, is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}, is no JSON object: write a row with names")
            yield number, row


def _paragraphs(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        data = json.loads(storage.read_text(path))
        return [{"context": one["context"], "qas": [{"question": qa["question"]} for qa in one["qas"]]}
                for article in data["data"] for one in article["paragraphs"]]  # fmt: skip
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is no file of SQuAD's form ({error!r}): rows of JSONL end in .jsonl") from error
