"""Search in a collection with known relevant documents: BM25, an encoder, and both by reciprocal rank.

    python benchmarks/retrieval.py --corpus FILE --queries FILE [--encoder RUN] [--out FILE.json]

The corpus is JSONL (.gz) with id, title, and sentences or text; the queries are JSONL with claim or question, and relevant,
the ids. Or both are SQuAD's JSON, maybe of two languages: a question then has one relevant paragraph, the one of the same
number. Each document is one block. Nothing is tuned on the queries: BM25's k1 1.2 and b .75 are SQLite's, words are
stemmed by Porter's rules, stop words are Lucene's, k of the fusion is 60, 100 documents of each ranking are fused.

With --encoder, the difference of the fused ranking and of BM25 is tested by a paired bootstrap over the queries. The score by
which a question without an answer is refused is measured on the queries themselves: with all documents, and with the
relevant ones removed.
"""

import functools
import gzip
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import numpy as np

from llmjax.eval.statistics import compare_paired, mean
from llmjax.retrieve.documents.ask import COVERAGE
from llmjax.retrieve.documents.index import DEPTH, RRF, Index, fused
from llmjax.retrieve.documents.measures import ndcg, recall

Documents = list[tuple[str, str, str]]  # id, title, text
Queries = list[tuple[str, list[str]]]  # text, ids of relevant documents
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


def main() -> None:
    parser = common.make_parser(__doc__, out=common.ROOT / "results" / "retrieval.json")
    parser.add_argument("--corpus", type=Path, required=True, metavar="FILE")
    parser.add_argument("--queries", type=Path, required=True, metavar="FILE")
    parser.add_argument("--encoder", type=Path, metavar="RUN", help="a run whose mean-pooled vectors are searched too")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="only the first N queries")
    args = parser.parse_args()
    documents, queries = read_documents(args.corpus), read_queries(args.queries)
    queries = queries[: args.limit] if args.limit else queries
    with tempfile.TemporaryDirectory() as folder, Index(Path(folder)) as index:
        results = measured(index, documents, queries, args.encoder)
    print(json.dumps(results, indent=1))
    common.write(results, args.out)


def lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def paragraphs(path: Path) -> list[dict[str, Any]]:
    """The paragraphs of a file of SQuAD, in order."""
    return [one for article in json.loads(path.read_text(encoding="utf-8"))["data"] for one in article["paragraphs"]]


def read_documents(path: Path) -> Documents:
    """The documents of a collection."""
    if path.suffix == ".json":
        return [(str(number), "", one["context"]) for number, one in enumerate(paragraphs(path))]
    return [
        (str(row["id"]), row.get("title", ""), row.get("text") or " ".join(row["sentences"])) for row in lines(path)
    ]


def read_queries(path: Path) -> Queries:
    """The queries with the ids of what is relevant."""
    if path.suffix == ".json":
        return [(one["question"], [str(n)]) for n, paragraph in enumerate(paragraphs(path)) for one in paragraph["qas"]]
    return [(row.get("claim") or row["question"], [str(one) for one in row["relevant"]]) for row in lines(path)]


def measured(index: Index, documents: Documents, queries: Queries, encoder: Path | None) -> dict[str, Any]:
    """The scores of each ranking."""
    began = common.cpu_seconds()
    index.add(documents)
    indexed = common.cpu_seconds() - began
    results: dict[str, Any] = {
        "documents": len(documents), "queries": len(queries), "index_cpu_seconds": round(indexed, 2),
        "parameters": {"k1": 1.2, "b": 0.75, "stemmer": "porter", "rrf_k": RRF, "depth": DEPTH},
    }  # fmt: skip
    began = common.cpu_seconds()
    rankings = {"bm25": [index.lexical(text) for text, _ in queries]}
    results["queries_per_cpu_second"] = round(len(queries) / (common.cpu_seconds() - began), 1)
    if encoder is not None:
        rankings |= with_encoder(index, queries, rankings["bm25"], encoder, results)
    ids = {passage.block: passage.path for passage in index.passages([(n, 0.0) for n in range(1, len(documents) + 1)])}
    scores: dict[str, list[float]] = {}
    for name, found in rankings.items():
        named = [[ids[block] for block, _ in ranking] for ranking in found]
        pairs = list(zip(named, (relevant for _, relevant in queries), strict=True))
        scores[name] = [ndcg(ranking, dict.fromkeys(relevant, 1.0)) for ranking, relevant in pairs]
        results[name] = {"ndcg@10": estimate(scores[name])}
        for k in (1, 10, 100):
            results[name][f"recall@{k}"] = estimate([recall(ranking, relevant, k=k) for ranking, relevant in pairs])
    if encoder is not None:
        test = compare_paired(scores["bm25"], scores["fused"])
        results["fused_minus_bm25"] = {"ndcg@10": test.difference, "interval": test.interval, "p": test.bootstrap}
    results["refusing"] = refusals(index, queries, rankings["bm25"], ids)
    return results


def with_encoder(
    index: Index, queries: Queries, lexical: Any, encoder: Path, results: dict[str, Any]
) -> dict[str, Any]:
    """The rankings by an encoder's vectors, and fused with those by words."""
    import llmjax
    from llmjax.retrieve.documents import embed

    model = llmjax.load(encoder)
    encode = functools.partial(embed.encode, model, length=128)
    began = time.perf_counter()
    index.embed("encoder", encode)
    results["embedding_seconds"] = round(time.perf_counter() - began, 1)
    vectors = encode([text for text, _ in queries])
    semantic = [index.semantic("encoder", vector) for vector in vectors]
    return {"encoder": semantic, "fused": [fused(a, b)[:DEPTH] for a, b in zip(lexical, semantic, strict=True)]}


def refusals(index: Index, queries: Queries, rankings: Any, ids: dict[int, str]) -> dict[str, Any]:
    """Shares of questions that are refused by the coverage of their words, with and without the relevant documents."""
    covered: dict[str, list[float]] = {"answerable": [], "unanswerable": []}
    for (text, relevant), ranking in zip(queries, rankings, strict=True):
        left = [pair for pair in ranking if ids[pair[0]] not in relevant]
        for name, some in (("answerable", ranking), ("unanswerable", left)):
            covered[name].append(index.coverage(text, index.passages(some[:6])))
    return {"threshold_used": COVERAGE} | {
        str(t): {name: round(float(np.mean(np.array(values) < t)), 4) for name, values in covered.items()}
        for t in THRESHOLDS
    }


def estimate(values: list[float]) -> dict[str, float]:
    """The mean and its standard error."""
    one = mean(values)
    return {"value": round(one.value, 4), "error": round(one.error, 4)}


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
