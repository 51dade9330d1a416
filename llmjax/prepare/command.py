"""The verb `classify`. Imports are late: help is quick."""

import argparse
from pathlib import Path

from ml_collections import ConfigDict

from llmjax.config.ranges import SEED, number
from llmjax.verb import Verb


def _add(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--positive", type=Path, nargs="+", required=True, metavar="FILE",
        help="documents of the kind to be found: text files, or JSONL such as RUN/prepare/train/*.jsonl",
    )  # fmt: skip
    verb.add_argument("--negative", type=Path, nargs="+", default=[], metavar="FILE", help="other documents")
    verb.add_argument("--out", type=Path, required=True, metavar="FILE.npz", help="where the model goes")
    verb.add_argument(
        "--kind", default="classifier", choices=("classifier", "ngram"),
        help="classifier (of two kinds of documents) or ngram (a model of one kind, for perplexity)",
    )  # fmt: skip
    verb.add_argument("--text-field", default="text", metavar="NAME", help="the field of JSONL rows (default: text)")
    verb.add_argument(
        "--seed", type=number(int, SEED), default=0, help="of the split into learning and measuring (default: 0)"
    )


def _run(args: argparse.Namespace, _: ConfigDict) -> int:
    from llmjax.prepare.learn import classify

    made = classify.run(
        args.positive, args.negative, out=args.out, kind=args.kind, text_field=args.text_field, seed=args.seed
    )
    print(made)
    return 0


VERBS = {
    "classify": Verb(
        "train a document classifier or an n-gram model for the steps quality, toxicity and perplexity of prepare",
        _add, _run, config="none",
    ),
}  # fmt: skip
