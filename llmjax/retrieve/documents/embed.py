"""Vectors of texts: the mean of a model's last hidden states, of length 1, as sentence encoders are trained to give them."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llmjax.infer.language_model import LanguageModel
from llmjax.model import transformer
from llmjax.parallel import placement

ROWS, STEP = 32, 32  # texts at a time; lengths are multiples of STEP, so that few programs are compiled


@functools.partial(jax.jit, static_argnames="module")
def _means(module: transformer.Transformer, params: Any, tokens_BL: np.ndarray, segments_BL: np.ndarray) -> jax.Array:
    hidden_BLD: Any = module.apply({"params": params}, tokens_BL, segments_BL=segments_BL, output="hidden")
    real_BL1 = (segments_BL > 0).astype(hidden_BLD.dtype)[..., None]
    return (hidden_BLD * real_BL1).sum(1) / real_BL1.sum(1)


def encode(model: LanguageModel, texts: Sequence[str], *, length: int = 256) -> np.ndarray:
    """The vectors (texts, D) float32 of texts, of length 1.

    Args:
        length: the most tokens of a text that are read; the rest is cut off.
    """
    tokenizer = model.tokenizer
    length = min(length, model.config.model.max_length)
    is_encoder = model.config.model.direction == "bidirectional"
    end = [tokenizer.end_id] if is_encoder else []  # [SEP]; a text model reads its end only at the end
    rows = [
        [*tokenizer.prefix_ids, *ids[: length - len(tokenizer.prefix_ids) - len(end)], *end] or [tokenizer.start_id]
        for ids in tokenizer.encode_batch(list(texts))
    ]
    found = np.zeros((len(rows), model.config.model.width), np.float32)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for first in range(0, len(order), ROWS):
        some = order[first : first + ROWS]
        size = min(-(-max(len(rows[i]) for i in some) // STEP) * STEP, model.config.model.max_length)
        tokens_BL, segments_BL = (np.zeros((ROWS, size), np.int32) for _ in range(2))
        segments_BL[:, 0] = 1  # rows that only fill the batch have one token
        for row, i in enumerate(some):
            tokens_BL[row, : len(rows[i])], segments_BL[row, : len(rows[i])] = rows[i], 1
        with placement.active(model.mesh, model.config):
            means_BD = np.asarray(_means(model.module, model.params, tokens_BL, segments_BL), np.float32)
        found[some] = means_BD[: len(some)]
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)


def name_of(path: Path, model: LanguageModel) -> str:
    """A name of an encoder, under which an index keeps its vectors: another checkpoint has another one."""
    return f"{path.resolve()} {model.step}"
