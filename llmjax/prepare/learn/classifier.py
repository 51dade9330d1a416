"""A document classifier that anyone can train: textbook-like or not (phi-1, Gunasekar et al. 2023), toxic or not.

Logistic regression on features of a document: by default hashed words and pairs of words (Weinberger et al. 2009) and
a few statistics of its writing. scikit-learn fits it; the fitted numbers are saved as plain arrays, so that a saved
model is read and scored by the few lines of numpy here, whatever version of scikit-learn is installed, or none.

A document's score is the same bit for bit whatever other documents it is scored with: every sum is taken in the
document's own order, and no vector instruction's rounding depends on its place in the batch.
"""

import gzip
import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmjax.errors import UserError
from llmjax.prepare.learn import calibration
from llmjax.prepare.learn.features import FEATURES, Features
from llmjax.prepare.learn.ngram import read_arrays, write_arrays

FORMAT = 1
FEWEST = 20  # documents of a class: 14 to fit, 3 to calibrate, 3 to measure
SHARES = (0.7, 0.85)  # fitted up to the first, calibrated up to the second, measured on the rest
DEFAULTS: dict[str, Any] = {
    "features": "hashed_words",
    "bits": 18,  # 2^18 weights of hashed words
    "characters": 50_000,  # of a document are looked at, from its start
    "regularization": 10.0,  # C of scikit-learn: larger fits the training documents more closely
    # Of the dense features beside the hashed words, each document's of length 1. As large as the words (1.0), the
    # statistics lower the AUROC on sources that were not trained on from 0.98 to 0.74 (benchmarks/classifiers.py);
    # for embeddings, which are all there is, use 1.0.
    "dense_scale": 0.1,
    "calibration": "platt",
}


PARAGRAPHS_UP_TO = 2000  # characters of a document cut from a text file, unless one paragraph is longer
PIECE = 1 << 20  # characters for which features are made at once


def _pieces(texts: Sequence[str], settings: Mapping[str, Any]) -> Iterator[Features]:
    name = settings["features"]
    if name not in FEATURES:
        raise UserError(f"features {name!r} are not known: use one of {', '.join(sorted(FEATURES))}")
    begin = 0
    while begin < len(texts):
        end, size = begin, 0
        while end < len(texts) and (end == begin or size < PIECE):
            size += min(len(texts[end]), settings["characters"])
            end += 1
        yield FEATURES[name](texts[begin:end], settings)
        begin = end


@dataclass(frozen=True)
class Model:
    """A fitted classifier.

    Attributes:
        weights: float64 [features]. dense_weights, means, scales: float64 [statistics]. bias: of the logit.
        calibration: for `calibration.apply`.
        settings: DEFAULTS as used, JSON. metrics: what `train` measured, JSON.
    """

    weights: np.ndarray
    dense_weights: np.ndarray
    means: np.ndarray
    scales: np.ndarray
    bias: float
    calibration: Mapping[str, Any]
    settings: Mapping[str, Any]
    metrics: Mapping[str, Any]


def _standardize(dense: np.ndarray, means: np.ndarray, scales: np.ndarray, size: float) -> np.ndarray:
    return np.clip((dense - means) / scales, -4, 4) * (size / math.sqrt(max(len(means), 1)))


def logits(model: Model, texts: Sequence[str]) -> np.ndarray:
    """Scores before calibration and the logistic function, float64 [documents]."""
    results = []
    for features in _pieces(texts, model.settings):
        count = len(features.dense)
        total = np.bincount(
            features.rows, weights=features.values * model.weights[features.columns], minlength=count
        ).astype(np.float64)
        dense = _standardize(features.dense, model.means, model.scales, model.settings["dense_scale"])
        for k, weight in enumerate(model.dense_weights):  # not @: BLAS rounds differently for other batch sizes
            total += dense[:, k] * weight
        results.append(total + model.bias)
    return np.concatenate(results) if results else np.empty(0)


def score(model: Model, texts: Sequence[str]) -> np.ndarray:
    """The calibrated probability of the positive class, float64 [documents]."""
    # One at a time: the vectorized exponential may round the last few of a batch differently.
    return np.array([float(calibration.apply(model.calibration, z)) for z in logits(model, texts)])


def _split(texts: Sequence[str], labels: np.ndarray, groups: Sequence[str] | None, seed: int) -> np.ndarray:
    """0 to fit, 1 to calibrate, 2 to measure: int [documents], by the hash of the group, each class apart.

    Without groups a document is its own, so that equal documents are never on both sides.
    """
    names = [str(name) for name in (texts if groups is None else groups)]
    first: dict[str, int] = {}
    for name, label in zip(names, labels.tolist(), strict=True):
        first.setdefault(name, int(label))
    part = {}
    for label in (0, 1):
        mine = [name for name, own in first.items() if own == label]
        mine.sort(key=lambda name: hashlib.blake2b(f"{seed}\n{name}".encode(errors="replace"), digest_size=8).digest())
        for place, name in enumerate(mine):
            part[name] = int(np.searchsorted(SHARES, (place + 0.5) / len(mine)))
    return np.array([part[name] for name in names])


def train(
    texts: Sequence[str],
    labels: Sequence[int],
    *,
    seed: int = 0,
    groups: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Model:
    """Fit on 70% of the documents, calibrate on 15% and measure on the rest, which the model has not seen.

    Args:
        texts: the documents. labels: 1 for the class to be found, 0 for the other.
        seed: of the split; the fit itself has no chance in it.
        groups: documents of one group (a site, a conversation) are on one side of the split.
        settings: over DEFAULTS.

    Returns:
        The model; its metrics are those of `evaluate`, with the calibration error before calibration, the reliability
        table and the kept-words report, all on the held-out documents.

    Raises:
        UserError: for an unknown setting, one class missing, too few documents, or scikit-learn not installed.
    """
    chosen = {**DEFAULTS, **(settings or {})}
    if unknown := set(chosen) - set(DEFAULTS):
        raise UserError(f"no classifier setting {', '.join(sorted(unknown))}: there are {', '.join(DEFAULTS)}")
    y = np.asarray(labels, np.int64)
    if len(y) != len(texts):
        raise UserError(f"{len(texts)} documents and {len(y)} labels: give one label a document")
    for label in (0, 1):
        if (count := int(np.sum(y == label))) < FEWEST:
            raise UserError(
                f"{'positive' if label else 'negative'} documents: {count}, at least {FEWEST} are needed "
                "(a few hundred for a useful classifier): give more of them, in files of their own or as JSONL"
            )
    if set(y.tolist()) - {0, 1}:
        raise UserError("labels must be 0 or 1")
    part = _split(texts, y, groups, seed)
    for k, name in enumerate(("to fit", "to calibrate", "to measure")):
        if len(set(y[part == k].tolist())) < 2:
            raise UserError(
                f"the part of the documents {name} has one class only: give more documents, or documents of more groups"
            )
    try:
        from scipy.sparse import csr_matrix, hstack
        from sklearn.linear_model import LogisticRegression
    except ModuleNotFoundError as error:
        raise UserError("training a classifier needs scikit-learn: pip install 'llmjax[data]'") from error

    fitted = np.flatnonzero(part == 0)
    parts = list(_pieces([texts[k] for k in fitted.tolist()], chosen))
    dense = np.concatenate([features.dense for features in parts])
    means, scales = dense.mean(axis=0), dense.std(axis=0)
    scales = np.where(scales > 1e-12, scales, 1.0)
    offsets = np.cumsum([0] + [len(features.dense) for features in parts])
    rows = np.concatenate([features.rows + offset for features, offset in zip(parts, offsets, strict=False)])
    columns = np.concatenate([features.columns for features in parts])
    values = np.concatenate([features.values for features in parts])
    width = parts[0].width
    used, places = np.unique(columns, return_inverse=True)  # the weight of a feature that never occurs stays 0
    sparse = csr_matrix((values, (rows, places)), shape=(len(fitted), len(used)))
    inputs = hstack([sparse, csr_matrix(_standardize(dense, means, scales, chosen["dense_scale"]))], format="csr")
    solver = LogisticRegression(C=chosen["regularization"], solver="lbfgs", max_iter=1000)
    solver.fit(inputs, y[fitted])
    weights = np.zeros(width)
    weights[used] = solver.coef_[0, : len(used)]
    plain = Model(
        weights=weights,
        dense_weights=solver.coef_[0, len(used) :].astype(np.float64),
        means=means,
        scales=scales,
        bias=float(solver.intercept_[0]),
        calibration={"method": "none"},
        settings=chosen,
        metrics={},
    )
    held = [np.flatnonzero(part == k) for k in (1, 2)]
    scores = [logits(plain, [texts[k] for k in own.tolist()]) for own in held]
    fitted_calibration = calibration.fit(scores[0], y[held[0]], method=chosen["calibration"])
    before = calibration.apply({"method": "none"}, scores[1])
    after = calibration.apply(fitted_calibration, scores[1])
    words = np.array([len(texts[k].split()) for k in held[1].tolist()])
    metrics = {
        "seed": seed,
        "documents_fitted": len(fitted),
        "documents_calibrated": len(held[0]),
        **calibration.measures(after, y[held[1]]),
        "calibration_error_before": calibration.calibration_error(before, y[held[1]]),
        "reliability": calibration.reliability(after, y[held[1]]),
        "kept": calibration.kept_report(after, words, y[held[1]]),
    }
    return Model(**{**vars(plain), "calibration": fitted_calibration, "metrics": metrics})


def evaluate(model: Model, texts: Sequence[str], labels: Sequence[int], *, threshold: float = 0.5) -> dict[str, Any]:
    """Accuracy, precision, recall, F1, AUROC, calibration error and the confusion counts on labelled documents."""
    return calibration.measures(score(model, texts), np.asarray(labels), threshold=threshold)


def save(model: Model, path: str | os.PathLike[str]) -> None:
    """Write a model to one .npz file, whole or not at all. The same model gives the same bytes."""
    arrays = {name: getattr(model, name) for name in ("weights", "dense_weights", "means", "scales")}
    arrays["bias"] = np.array(model.bias)
    rest = {name: dict(getattr(model, name)) for name in ("calibration", "settings", "metrics")}
    write_arrays(path, "classifier", FORMAT, arrays, rest)


def load(path: str | os.PathLike[str]) -> Model:
    """Read a model that `save` wrote; it scores the same bit for bit.

    Raises:
        UserError: if the file is not there, cut off, damaged, of another kind or of a later version.
    """
    arrays, rest = read_arrays(path, "classifier", FORMAT)
    try:
        parts: dict[str, Any] = {**arrays, **rest}
        return Model(**{**parts, "bias": float(parts["bias"])})
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: a classifier with parts missing ({error}): train and save it again") from error


def read_documents(paths: Sequence[str | os.PathLike[str]], *, field: str = "text") -> tuple[list[str], list[str]]:
    """Documents of text and JSONL files (also .gz), and the file that each comes from.

    A row of JSONL is a document. Any other file is text and is cut between paragraphs into documents of about 2,000
    characters: a classifier that has seen only whole books does not know a page.

    Raises:
        UserError: for a file that is not there, is not UTF-8, or has a row that is not JSON or lacks the field.
    """
    texts: list[str] = []
    files: list[str] = []
    for path in map(Path, paths):
        try:
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            content = raw.decode("utf-8-sig")
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as UTF-8 text ({error}): give text or JSONL files") from error
        if ".jsonl" in path.suffixes or ".ndjson" in path.suffixes:
            found = []
            for number, line in enumerate(content.split("\n"), start=1):
                if line.strip():
                    try:
                        found.append(str(json.loads(line)[field]))
                    except (ValueError, KeyError, TypeError) as error:
                        raise UserError(
                            f"{path}:{number}: not a JSON object with the field {field!r}: mend the row or name its field"
                        ) from error
        else:
            found, size = [], PARAGRAPHS_UP_TO
            for paragraph in content.split("\n\n"):
                if size + len(paragraph) > PARAGRAPHS_UP_TO:
                    found.append(paragraph)
                    size = len(paragraph)
                else:
                    found[-1] += "\n\n" + paragraph
                    size += len(paragraph)
        found = [text for text in found if text.strip()]
        texts += found
        files += [str(path)] * len(found)
    return texts, files


def train_from_files(
    positive: Sequence[str | os.PathLike[str]],
    negative: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    field: str = "text",
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train a classifier on files of each class, save it to `out` and return its metrics.

    Where both classes have ten files or more, whole files are held out (metrics["held_out"] is "files"); else documents
    are, and the measures flatter the classifier as far as the documents of a file are alike.

    Raises:
        UserError: for files that cannot be read, one class missing, or too few documents.
    """
    for paths, name in ((positive, "positive"), (negative, "negative")):
        if not paths:
            raise UserError(f"no {name} files: a classifier learns from examples of both classes")
    if shared := {Path(path).resolve() for path in positive} & {Path(path).resolve() for path in negative}:
        raise UserError(f"both positive and negative: {', '.join(sorted(map(str, shared)))}: give each file once")
    yes, yes_files = read_documents(positive, field=field)
    no, no_files = read_documents(negative, field=field)
    by_file = min(len(set(yes_files)), len(set(no_files))) >= 10
    model = train(
        yes + no,
        [1] * len(yes) + [0] * len(no),
        seed=seed,
        groups=yes_files + no_files if by_file else None,
        settings=settings,
    )
    metrics = {**model.metrics, "held_out": "files" if by_file else "documents"}
    save(Model(**{**vars(model), "metrics": metrics}), out)
    return metrics
