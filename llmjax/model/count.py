"""What a model costs: its parameters, and the floating point operations of training on a token."""

import math
import re
from collections.abc import Callable

from flax import traverse_util
from ml_collections import ConfigDict

from llmjax import config
from llmjax.config.model_checks import ATTENTION
from llmjax.model.stacks import layer_stacks
from llmjax.model.transformer import build, param_shapes


def parameter_shapes(c: ConfigDict) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter of the model of `config.model`; nothing is computed or allocated."""
    tree = traverse_util.flatten_dict(param_shapes(build(c)), sep="/")
    return {path: leaf.shape for path, leaf in tree.items()}


def param_count(c: ConfigDict) -> int:
    """How many numbers the model of `config.model` has."""
    return sum(math.prod(shape) for shape in parameter_shapes(c).values())


def active_matrices(c: ConfigDict, *, chosen: Callable[[str], bool] = lambda path: True) -> float:
    """Numbers in the matrices that a token is multiplied with: the experts it is routed to, and the head even if tied.

    Args:
        chosen: whether the matrix of a path is counted; the path of a tied head is that of the embedding.

    Embedding lookups, norms and biases are left out. The extra blocks and heads of multi-token prediction count: training
    computes them.
    """
    total = 0.0
    for path, shape in parameter_shapes(c).items():
        if path.endswith("kernel") and chosen(path):
            routed = re.search(r"moe/(up|gate|down)/", path) is not None
            total += math.prod(shape) * (c.moe.active / c.moe.experts if routed else 1)
    head = c.vocab_size * (c.embedding_width or c.width)
    heads = c.ahead - 1 + (1 if c.tie_embeddings else 0)
    return total + (heads * head if chosen("embedding" if c.tie_embeddings else "head/kernel") else 0)


def flops_per_token(c: ConfigDict, *, sequence_length: int) -> float:
    """Model FLOPs to train on one token: 6 per parameter in a matrix product, and 12 H K for each key attention looks at.

    The convention of the PaLM paper (Chowdhery et al. 2022, appendix B): attention is counted over the whole sequence
    (local attention over its window), recomputation is not counted, the embedding lookup costs nothing. In an
    encoder-decoder each token stands for one of the source too. The element-wise work of recurrent layers is left out.
    """
    keys = 0
    for stack in layer_stacks(c):
        for kind, _ in stack.kinds:
            if kind in ATTENTION:
                seen = min(c.window, sequence_length) if kind == "local" else sequence_length
                keys += stack.repeats * seen
    keys += sequence_length * (c.encoder_layers + (c.layers if c.encoder_layers else 0))
    return 6.0 * active_matrices(c) + 12.0 * keys * c.heads * config.head_size(c)
