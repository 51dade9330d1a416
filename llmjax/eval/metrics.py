"""Numbers about texts and predictions: BLEU, chrF, ROUGE-L, accuracy, F1, confusion, calibration. Plain functions.

BLEU and chrF are sacrebleu's and ROUGE-L is rouge-score's, so that they equal what is published; both come with
`pip install 'llmjax[eval]'`.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from llmjax.errors import UserError


def bleu(hypotheses: Sequence[str], references: Sequence[str] | Sequence[Sequence[str]]) -> float:
    """Corpus BLEU (Papineni et al. 2002) from 0 to 100, as sacrebleu defines it (13a tokens, exponential smoothing).

    Args:
        references: one text, or as many for all, for each hypothesis.
    """
    return float(_library("sacrebleu").corpus_bleu(list(hypotheses), _by_set(hypotheses, references)).score)


def chrf(
    hypotheses: Sequence[str], references: Sequence[str] | Sequence[Sequence[str]], *, word_order: int = 0
) -> float:
    """Corpus chrF (Popovic 2015) from 0 to 100; with `word_order=2` chrF++."""
    library = _library("sacrebleu")
    return float(library.corpus_chrf(list(hypotheses), _by_set(hypotheses, references), word_order=word_order).score)


def rouge_l(hypotheses: Sequence[str], references: Sequence[str] | Sequence[Sequence[str]]) -> float:
    """The mean of ROUGE-L's F measure (Lin 2004) from 0 to 1, of each text's best reference; no stemming."""
    if not hypotheses:
        raise UserError("there is no text to score")
    scorer = _library("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    sets = _by_set(hypotheses, references)
    best = [
        max(scorer.score(target, text)["rougeL"].fmeasure for target in targets)
        for text, targets in zip(hypotheses, zip(*sets, strict=True), strict=True)
    ]
    return float(np.mean(best))


def accuracy(labels: Sequence[int], predictions: Sequence[int]) -> float:
    """The share of predictions that equal their label."""
    labels_B, predictions_B = _checked(labels, predictions)
    return float((labels_B == predictions_B).mean())


def confusion_matrix(labels: Sequence[int], predictions: Sequence[int], *, classes: int = 0) -> np.ndarray:
    """(classes, classes) of int: how often label i (row) was predicted as j (column). `classes` 0: as many as occur."""
    labels_B, predictions_B = _checked(labels, predictions)
    size = classes or int(max(labels_B.max(), predictions_B.max())) + 1
    if min(labels_B.min(), predictions_B.min()) < 0 or max(labels_B.max(), predictions_B.max()) >= size:
        raise UserError(f"classes must be numbers from 0 to {size - 1}")
    matrix = np.zeros((size, size), np.int64)
    np.add.at(matrix, (labels_B, predictions_B), 1)
    return matrix


def f1(labels: Sequence[int], predictions: Sequence[int], *, average: str = "macro") -> float:
    """F1, the harmonic mean of precision and recall; 0 for a class without either.

    Args:
        average: "macro" (mean over the classes that occur), "micro" (all decisions together), "weighted" (by how often
            a class is the label) or "binary" (of class 1).
    """
    matrix = confusion_matrix(labels, predictions)
    right, actual, guessed = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    by_class = 2 * right / np.maximum(actual + guessed, 1)
    occurs = actual + guessed > 0
    if average == "macro":
        return float(by_class[occurs].mean())
    if average == "micro":
        return float(right.sum()) / float(matrix.sum())
    if average == "weighted":
        return float((by_class * actual).sum() / actual.sum())
    if average == "binary":
        return float(by_class[1]) if len(by_class) > 1 else 0.0
    raise UserError(f"average={average!r} is not known: give macro, micro, weighted or binary")


def calibration_error(confidences: Sequence[float], right: Sequence[bool], *, bins: int = 10) -> float:
    """The expected calibration error (Naeini et al. 2015): over bins of equal width (low, high], the mean distance of
    their accuracy from their mean confidence, weighted by how many predictions they hold."""
    confidence_B, right_B = np.asarray(confidences, float), np.asarray(right, float)
    if confidence_B.shape != right_B.shape or not confidence_B.size:
        raise UserError("confidences and right must be of the same predictions, at least one")
    if confidence_B.min() < 0 or confidence_B.max() > 1:
        raise UserError("confidences must be from 0 to 1")
    bin_B = np.clip(np.ceil(confidence_B * bins).astype(int) - 1, 0, bins - 1)
    counts, sums, hits = (np.bincount(bin_B, weights=w, minlength=bins) for w in (None, confidence_B, right_B))
    return float(np.abs(hits - sums).sum()) / float(counts.sum())


def _checked(labels: Sequence[int], predictions: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    labels_B, predictions_B = np.asarray(labels), np.asarray(predictions)
    if labels_B.shape != predictions_B.shape or not labels_B.size:
        raise UserError("labels and predictions must be as many, at least one")
    return labels_B.astype(np.int64), predictions_B.astype(np.int64)


def _by_set(hypotheses: Sequence[str], references: Sequence[Any]) -> list[list[str]]:
    """[references of the first set, of the second, ...]."""
    if len(hypotheses) != len(references):
        raise UserError(f"there are {len(hypotheses)} texts and {len(references)} references: give one for each")
    rows = [[row] if isinstance(row, str) else list(row) for row in references]
    if len({len(row) for row in rows}) > 1:
        raise UserError("every text must have as many references as the others")
    return [list(column) for column in zip(*rows, strict=True)]


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"this needs the package {name.partition('.')[0]}: pip install 'llmjax[eval]'") from error
