"""How good scores are and what they mean: calibration of probabilities, measures, and what a threshold would keep.

Scores are those of the positive class throughout; labels are 0 and 1.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llmjax.errors import UserError

BINS = 15
THRESHOLDS = (0.1, 0.25, 0.5, 0.75, 0.9)
METHODS = ("platt", "isotonic", "none")


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow."""
    small = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1.0, small) / (1.0 + small)


def fit(logits: np.ndarray, labels: np.ndarray, *, method: str = "platt") -> dict[str, Any]:
    """Learn from held-out documents what probability a score stands for.

    Args:
        logits: float [documents], scores before the logistic function, of documents that were not trained on.
        labels: 0 or 1 [documents], both present.
        method: "platt" (Platt 1999, two numbers, keeps the order of the documents, good from a few dozen documents),
            "isotonic" (Zadrozny and Elkan 2002, any rising curve, wants a thousand documents or more), or "none".

    Returns:
        A JSON-able description for `apply`.

    Raises:
        UserError: for an unknown method, or labels of one class only.
    """
    if method not in METHODS:
        raise UserError(f"calibration {method!r} is not known: use one of {', '.join(METHODS)}")
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    if method == "none":
        return {"method": "none"}
    if not 0 < labels.sum() < len(labels):
        raise UserError("calibration needs documents of both classes: give more documents")
    if method == "platt":
        slope, bias = _fit_platt(logits, labels)
        return {"method": "platt", "slope": slope, "bias": bias}
    from scipy.optimize import isotonic_regression

    values, inverse, counts = np.unique(logits, return_inverse=True, return_counts=True)
    means = np.bincount(inverse, weights=labels) / counts
    heights = isotonic_regression(means, weights=counts).x
    # Only the corners of the staircase: between two of them the curve is a line, beyond the last it is flat.
    change = np.diff(heights, prepend=np.nan, append=np.nan) != 0
    corner = change[:-1] | change[1:]
    return {"method": "isotonic", "logits": values[corner].tolist(), "probabilities": heights[corner].tolist()}


def _fit_platt(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Newton's method on the cross entropy with Platt's smoothed targets, which keep it finite for separable data."""
    positive = float(labels.sum())
    negative = len(labels) - positive
    targets = np.where(labels > 0, (positive + 1) / (positive + 2), 1 / (negative + 2))
    inputs = np.stack([logits, np.ones_like(logits)])
    scale = float(np.std(logits)) or 1.0
    parameters = np.array([1.0 / scale, 0.0])

    def loss(candidate: np.ndarray) -> float:
        z = candidate @ inputs
        return float(np.sum(np.logaddexp(0, z) - targets * z))

    current = loss(parameters)
    for _ in range(100):
        probabilities = sigmoid(parameters @ inputs)
        gradient = inputs @ (probabilities - targets)
        hessian = (inputs * (probabilities * (1 - probabilities))) @ inputs.T + 1e-12 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        while (after := loss(parameters - step)) > current and np.abs(step).max() > 1e-12:
            step /= 2
        parameters = parameters - step
        if abs(current - after) <= 1e-12 * max(1.0, current):
            break
        current = after
    return float(parameters[0]), float(parameters[1])


def apply(calibration: Mapping[str, Any], logits: np.ndarray) -> np.ndarray:
    """Calibrated probabilities, float64 of the shape of `logits`."""
    if calibration["method"] == "platt":
        return sigmoid(calibration["slope"] * logits + calibration["bias"])
    if calibration["method"] == "isotonic":
        return np.interp(logits, calibration["logits"], calibration["probabilities"])
    return sigmoid(np.asarray(logits, np.float64))


def reliability(probabilities: np.ndarray, labels: np.ndarray, *, bins: int = BINS) -> list[dict[str, float]]:
    """For bins of equal width of the probability: from, to, documents, mean probability, share that is positive."""
    index = np.minimum((np.asarray(probabilities) * bins).astype(int), bins - 1)
    counts = np.bincount(index, minlength=bins)
    means = np.bincount(index, weights=probabilities, minlength=bins)
    shares = np.bincount(index, weights=labels, minlength=bins)
    return [
        {
            "from": k / bins,
            "to": (k + 1) / bins,
            "documents": int(counts[k]),
            "mean_probability": float(means[k] / counts[k]),
            "positive": float(shares[k] / counts[k]),
        }
        for k in range(bins)
        if counts[k]
    ]


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, *, bins: int = BINS) -> float:
    """The expected calibration error (Naeini et al. 2015): mean over documents of |confidence - share positive|."""
    rows = reliability(probabilities, labels, bins=bins)
    return sum(row["documents"] * abs(row["mean_probability"] - row["positive"]) for row in rows) / len(labels)


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The share of pairs of a positive and a negative in which the positive scores higher; ties count half."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    positive = np.asarray(labels) > 0
    n = int(positive.sum())
    if not 0 < n < len(positive):
        raise UserError("the area under the curve needs documents of both classes: give some of each")
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(positive) - n)))


def measures(probabilities: np.ndarray, labels: np.ndarray, *, threshold: float = 0.5) -> dict[str, Any]:
    """Accuracy, precision, recall, F1 and the confusion counts at a threshold; AUROC and calibration error."""
    probabilities, labels = np.asarray(probabilities), np.asarray(labels)
    said, true = probabilities >= threshold, labels > 0
    counts = {
        "true_positive": int(np.sum(said & true)),
        "false_positive": int(np.sum(said & ~true)),
        "true_negative": int(np.sum(~said & ~true)),
        "false_negative": int(np.sum(~said & true)),
    }
    right = counts["true_positive"]
    return {
        "documents": len(labels),
        "positive": int(true.sum()),
        "threshold": threshold,
        "accuracy": float(np.mean(said == true)),
        "precision": right / max(int(said.sum()), 1),
        "recall": right / max(int(true.sum()), 1),
        "f1": 2 * right / max(int(said.sum()) + int(true.sum()), 1),
        "auroc": auroc(probabilities, labels),
        "calibration_error": calibration_error(probabilities, labels),
        "confusion": counts,
    }


def kept_report(
    probabilities: np.ndarray,
    sizes: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    thresholds: Sequence[float] = THRESHOLDS,
) -> list[dict[str, float]]:
    """What each threshold would keep: a document is kept if its probability is at least the threshold.

    Args:
        probabilities: float [documents].
        sizes: [documents], tokens, words or bytes of each.
        labels: 0 or 1 [documents]; where given, the precision and recall of keeping are reported as well.

    Returns:
        A row a threshold: threshold, documents_kept, tokens_kept (shares of 1), and precision and recall.
    """
    probabilities, sizes = np.asarray(probabilities), np.asarray(sizes, np.float64)
    rows = []
    for threshold in thresholds:
        keep = probabilities >= threshold
        row = {
            "threshold": float(threshold),
            "documents_kept": float(keep.mean()) if len(keep) else 0.0,
            "tokens_kept": float(sizes[keep].sum()) / float(sizes.sum()) if sizes.sum() else 0.0,
        }
        if labels is not None:
            true = np.asarray(labels) > 0
            row["precision"] = float(np.sum(keep & true) / max(int(keep.sum()), 1))
            row["recall"] = float(np.sum(keep & true) / max(int(true.sum()), 1))
        rows.append(row)
    return rows
