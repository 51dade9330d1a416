"""`llmjax classify`: train what the steps quality, toxicity and perplexity score documents with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmjax.errors import UserError

KINDS = ("classifier", "ngram")
STEPS = {
    "classifier": "quality with prepare.quality_model, or toxicity with prepare.toxicity_model",
    "ngram": "perplexity with prepare.perplexity_model",
}


def run(positive: Sequence[Path], negative: Sequence[Path], *, out: Path, kind: str, text_field: str, seed: int) -> str:
    """Train a classifier of two kinds of documents, or an n-gram model of one, and save it; what to show the user.

    Args:
        positive: files of documents (text, or JSONL such as RUN/prepare/train/*.jsonl) of the kind to be found.
        negative: files of other documents, for a classifier.

    Raises:
        UserError: for files that cannot be read, a class without files, or too few documents.
    """
    from llmjax.prepare.learn import classifier, ngram

    if kind == "ngram":
        if negative:
            raise UserError("an n-gram model learns from one kind of text: leave --negative out")
        texts, _ = classifier.read_documents(positive, field=text_field)
        ngram.save(ngram.train(texts), out)
        size = sum(len(text.encode()) for text in texts)
        lines = [f"an n-gram model of {len(texts):,} documents, {size / 1e6:.1f} MB"]
    else:
        metrics = classifier.train_from_files(positive, negative, out, seed=seed, field=text_field)
        lines = _measures(metrics)
    return "\n".join([*lines, f"saved as {out}; it is for the step {STEPS[kind]}={out}"])


def _measures(metrics: dict[str, Any]) -> list[str]:
    lines = [
        f"{metrics['documents_fitted']:,} documents to learn from, {metrics['documents']:,} to measure on "
        f"(held out by {metrics['held_out']})"
    ]
    lines += [f"  {name:<14}{metrics[name]:.3f}" for name in ("accuracy", "f1", "auroc")]
    before, after = metrics["calibration_error_before"], metrics["calibration_error"]
    lines.append(f"  calibration error {before:.3f}, after calibration {after:.3f}")
    lines.append("  what a threshold keeps:")
    lines.append(f"    {'threshold':>9}{'documents':>11}{'words':>8}{'precision':>11}{'recall':>8}")
    for row in metrics["kept"]:
        lines.append(
            f"    {row['threshold']:>9.2f}{row['documents_kept']:>11.1%}{row['words_kept']:>8.1%}"
            f"{row['precision']:>11.3f}{row['recall']:>8.3f}"
        )
    return lines
