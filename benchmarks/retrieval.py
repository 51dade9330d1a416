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
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import common
import numpy as np

from llmjax.eval.statistics import compare_paired, mean
from llmjax.retrieve.documents import embed
from llmjax.retrieve.documents.ask import COVERAGE
from llmjax.retrieve.documents.index import DEPTH, RRF, Index
from llmjax.retrieve.documents.task import Documents, Queries, read_documents, read_queries, scored, with_encoder

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
        import llmjax

        encode = functools.partial(embed.encode, llmjax.load(encoder), length=128)
        began = common.cpu_seconds()
        rankings |= with_encoder(index, queries, rankings["bm25"], encode)
        results["encoder_cpu_seconds"] = round(common.cpu_seconds() - began, 1)
    scores = {name: scored(index, found, queries) for name, found in rankings.items()}
    for name, own in scores.items():
        results[name] = {measure: estimate(values) for measure, values in own.items()}
    if encoder is not None:
        test = compare_paired(scores["bm25"]["ndcg@10"], scores["fused"]["ndcg@10"])
        results["fused_minus_bm25"] = {"ndcg@10": test.difference, "interval": test.interval, "p": test.bootstrap}
    results["refusing"] = refusals(index, queries, rankings["bm25"])
    return results


def refusals(index: Index, queries: Queries, rankings: Any) -> dict[str, Any]:
    """Shares of questions that are refused by the coverage of their words, with and without the relevant documents."""
    covered: dict[str, list[float]] = {"answerable": [], "unanswerable": []}
    for (text, relevant), ranking in zip(queries, rankings, strict=True):
        left = [pair for pair in ranking if index.path_of(pair[0]) not in relevant]
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
