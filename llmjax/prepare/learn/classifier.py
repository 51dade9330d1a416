"""A document classifier to train on examples: textbook-like or not (phi-1, Gunasekar et al. 2023), toxic or not.

Logistic regression on hashed words and pairs of words (Weinberger et al. 2009), fitted by scikit-learn, with its scores
calibrated on held-out documents (Platt 1999). A saved model is an array of weights, no pickle.

A document's score does not depend on its batch, bit for bit: every sum is in the document's own order, and no vector
instruction's rounding depends on the place in the batch.
"""

import functools
import gzip
import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmjax.errors import UserError
from llmjax.prepare.learn.ngram import read_arrays, write_arrays

FORMAT = 2
FEWEST = 20  # documents of a class: 14 to fit, 3 to calibrate, 3 to measure
SHARES = (0.7, 0.85)  # fitted up to the first, calibrated up to the second, measured on the rest
BITS = 18  # 2^18 weights of hashed words
CHARACTERS = 50_000  # of a document are looked at, from its start
REGULARIZATION = 10.0  # C of scikit-learn: larger fits the training documents more closely
DOCUMENTS = 256  # whose features are in memory at once
BINS = 15  # of probabilities, for the calibration error
THRESHOLDS = (0.1, 0.25, 0.5, 0.75, 0.9)  # for which it is reported what they keep
PARAGRAPHS_UP_TO = 2000  # characters of a document cut from a text file, unless one paragraph is longer
# Every kana and Chinese character is a word; pairs of words then tell which stand together.
WORD = r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+"
_LOG_COUNT = np.array([0.0] + [1 + math.log(k) for k in range(1, 1024)])


@dataclass(frozen=True)
class Model:
    """A fitted classifier.

    Attributes:
        weights: float64 [2^BITS]. bias: of the logit. Both with the calibration in them.
        metrics: what `train` measured, JSON.
    """

    weights: np.ndarray
    bias: float
    metrics: Mapping[str, Any]


@functools.cache
def _vectorizer() -> Any:
    try:
        from sklearn.feature_extraction.text import HashingVectorizer
    except ModuleNotFoundError as error:
        raise UserError("a classifier needs scikit-learn: pip install 'llmjax[data]'") from error
    return HashingVectorizer(
        preprocessor=_plain, token_pattern=WORD, ngram_range=(1, 2), n_features=1 << BITS, norm=None, dtype=np.float64
    )


def _plain(text: str) -> str:
    """The text to hash: the beginning of the document in lower case, every digit as 0."""
    return re.sub(r"\d", "0", text[:CHARACTERS].lower())


def features(texts: Sequence[str]) -> Any:
    """Signed hashed words and pairs of neighbours, with 1 + ln(count), each document of length 1: CSR [documents, 2^BITS]."""
    from sklearn.preprocessing import normalize

    found = _vectorizer().transform(texts)
    counts = np.minimum(np.abs(found.data), len(_LOG_COUNT) - 1).astype(np.int64)
    found.data = np.copysign(_LOG_COUNT[counts], found.data)
    return normalize(found, copy=False)


def _logits(weights: np.ndarray, bias: float, texts: Sequence[str]) -> np.ndarray:
    """Of each document, float64 [documents]."""
    _vectorizer()
    pieces = [features(texts[start : start + DOCUMENTS]) @ weights for start in range(0, len(texts), DOCUMENTS)]
    return np.concatenate(pieces) + bias if pieces else np.empty(0)


def score(model: Model, texts: Sequence[str]) -> np.ndarray:
    """The calibrated probability of the positive class, float64 [documents]."""
    # One at a time: the vectorized exponential may round the last few of a batch differently.
    return np.array([_sigmoid(logit) for logit in _logits(model.weights, model.bias, texts).tolist()])


def _sigmoid(logit: float) -> float:
    small = math.exp(-abs(logit))
    return (1.0 if logit >= 0 else small) / (1.0 + small)


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


def train(texts: Sequence[str], labels: Sequence[int], *, seed: int = 0, groups: Sequence[str] | None = None) -> Model:
    """Fit on 70% of the documents, calibrate on 15% and measure on the rest, which the model has not seen.

    Args:
        texts: the documents. labels: 1 for the class to be found, 0 for the other.
        seed: of the split; the fit itself has no chance in it.
        groups: documents of one group (a site, a conversation) are on one side of the split.

    Returns:
        The model; its metrics are those of `measures`, with the calibration error before calibration and what thresholds
        would keep, all on the held-out documents.

    Raises:
        UserError: for one class missing, too few documents, or scikit-learn not installed.
    """
    y = _checked_labels(texts, labels)
    part = _split(texts, y, groups, seed)
    for k, name in enumerate(("to fit", "to calibrate", "to measure")):
        if len(set(y[part == k].tolist())) < 2:
            raise UserError(
                f"the part of the documents {name} has one class only: give more documents, or documents of more groups"
            )
    _vectorizer()
    from sklearn.linear_model import LogisticRegression

    fitted, calibrated, measured = (np.flatnonzero(part == k).tolist() for k in range(3))
    solver = LogisticRegression(C=REGULARIZATION, max_iter=1000)
    solver.fit(features([texts[k] for k in fitted]), y[fitted])
    weights, bias = solver.coef_[0], float(solver.intercept_[0])
    slope, offset = platt(_logits(weights, bias, [texts[k] for k in calibrated]), y[calibrated])
    held = [texts[k] for k in measured]
    before = np.array([_sigmoid(logit) for logit in _logits(weights, bias, held).tolist()])
    model = Model(slope * weights, slope * bias + offset, {})
    after = score(model, held)
    metrics = {
        "seed": seed,
        "documents_fitted": len(fitted),
        "documents_calibrated": len(calibrated),
        **measures(after, y[measured]),
        "calibration_error_before": calibration_error(before, y[measured]),
        "kept": kept_report(after, np.array([len(text.split()) for text in held]), y[measured]),
    }
    return Model(model.weights, model.bias, metrics)


def _checked_labels(texts: Sequence[str], labels: Sequence[int]) -> np.ndarray:
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
    return y


def platt(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Slope and offset with which the logits of held-out documents are calibrated (Platt 1999), his targets included.

    A document of a class of n counts as (n + 1) / (n + 2) of its own class and the rest of the other, which keeps both finite.
    """
    from sklearn.linear_model import LogisticRegression

    counts = np.bincount(labels, minlength=2)
    own = ((counts + 1) / (counts + 2))[labels]
    unregularized = LogisticRegression(C=1e10, tol=1e-8, max_iter=1000)
    unregularized.fit(
        np.concatenate([logits, logits])[:, None],
        np.concatenate([labels, 1 - labels]),
        sample_weight=np.concatenate([own, 1 - own]),
    )
    return float(unregularized.coef_[0, 0]), float(unregularized.intercept_[0])


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The expected calibration error (Naeini et al. 2015): mean over documents of |confidence - share positive|."""
    bins = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    return float(np.abs(np.bincount(bins, weights=probabilities - labels)).sum() / len(labels))


def measures(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Accuracy, precision, recall, F1 at a probability of 0.5; AUROC and calibration error.

    Raises:
        UserError: for documents of one class only.
    """
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support, roc_auc_score

    if len(set(np.asarray(labels).tolist())) < 2:
        raise UserError("the area under the curve needs documents of both classes: give some of each")
    said = probabilities >= 0.5
    precision, recall, f1, _ = precision_recall_fscore_support(labels, said, average="binary", zero_division=0.0)
    return {
        "documents": len(labels),
        "positive": int(np.sum(labels)),
        "accuracy": float(accuracy_score(labels, said)),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
        "auroc": float(roc_auc_score(labels, probabilities)),
        "calibration_error": calibration_error(probabilities, labels),
    }


def kept_report(probabilities: np.ndarray, sizes: np.ndarray, labels: np.ndarray) -> list[dict[str, float]]:
    """What each of THRESHOLDS would keep: a document is kept if its probability is at least the threshold.

    Args:
        probabilities: float [documents]. sizes: [documents], words of each. labels: 0 or 1 [documents].

    Returns:
        A row a threshold: threshold, documents_kept, words_kept (shares of 1), and precision and recall of keeping.
    """
    rows = []
    for threshold in THRESHOLDS:
        keep = probabilities >= threshold
        right = int(np.sum(keep & (labels > 0)))
        rows.append(
            {
                "threshold": threshold,
                "documents_kept": float(keep.mean()),
                "words_kept": int(sizes[keep].sum()) / max(int(sizes.sum()), 1),
                "precision": right / max(int(keep.sum()), 1),
                "recall": right / max(int(np.sum(labels > 0)), 1),
            }
        )
    return rows


def save(model: Model, path: str | os.PathLike[str]) -> None:
    """Write a model to one .npz file, whole or not at all. The same model gives the same bytes."""
    arrays = {"weights": model.weights, "bias": np.array(model.bias)}
    write_arrays(path, "classifier", FORMAT, arrays, dict(model.metrics))


def load(path: str | os.PathLike[str]) -> Model:
    """Read a model that `save` wrote; it scores the same bit for bit.

    Raises:
        UserError: if the file is not there, cut off, damaged, of another kind or of another version.
    """
    arrays, metrics = read_arrays(path, "classifier", FORMAT)
    try:
        return Model(arrays["weights"], float(arrays["bias"]), metrics)
    except KeyError as error:
        raise UserError(f"{path}: a classifier without {error}: train and save it again") from error


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
    )
    metrics = {**model.metrics, "held_out": "files" if by_file else "documents"}
    save(Model(model.weights, model.bias, metrics), out)
    return metrics
