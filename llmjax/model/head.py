"""The output head: from hidden states to logits, inside the model, or alone for a loss that takes tokens by chunks."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from llmjax.model.init import initializer, logit_scale
from llmjax.model.layers import ACTIVATIONS, Linear, Norm, constrain, dtype_of


def embedding_table(module: nn.Module) -> jax.Array:
    """embedding_VE in the compute type; a parameter of the module that calls, which has the settings `c`."""
    c = module.c
    shape = (c.vocab_size, c.embedding_width or c.width)
    stored_VE = module.param("embedding", initializer(c, "embedding"), shape, dtype_of(c.param_dtype))
    return constrain(stored_VE.astype(dtype_of(c.dtype)), "VD")


def logits_function(module: nn.Module, embedding_VE: jax.Array | None) -> Callable[[jax.Array], jax.Array]:
    """hidden_BLD -> logits_BLV, float32; its parameters are those of the module that calls, which has the settings `c`.

    Args:
        embedding_VE: read where the head is tied to it.
    """
    c = module.c
    dtype, size, scale = dtype_of(c.dtype), c.embedding_width or c.width, logit_scale(c)
    transform = Linear(c, (c.width,), "inward", bias=True, name="head_transform") if c.head_transform else None
    norm = Norm(c, name="head_norm") if c.head_transform else None
    project = Linear(c, (size,), "head", name="output_projection") if size != c.width else None
    head = None if c.tie_embeddings else Linear(c, (c.vocab_size,), "head", name="head")
    bias_V = None
    if "head" in c.bias:
        bias_V = module.param("head_bias", nn.initializers.zeros, (c.vocab_size,), dtype_of(c.param_dtype))

    def logits(x_BLD: jax.Array) -> jax.Array:
        if transform is not None and norm is not None:
            x_BLD = norm(ACTIVATIONS[c.activation](transform(x_BLD)))
        if project is not None:
            x_BLD = project(x_BLD)
        if scale != 1:
            x_BLD = x_BLD * jnp.asarray(scale, dtype)
        if head is None:
            assert embedding_VE is not None
            rows = x_BLD.reshape(-1, size) @ embedding_VE.T
            logits_BLV = rows.reshape(*x_BLD.shape[:-1], c.vocab_size)
        else:
            logits_BLV = head(x_BLD)
        if bias_V is not None:
            logits_BLV = logits_BLV + bias_V.astype(dtype)[None, None]
        logits_BLV = constrain(logits_BLV.astype(jnp.float32), "BLV")
        if c.logit_soft_cap:
            logits_BLV = c.logit_soft_cap * jnp.tanh(logits_BLV / c.logit_soft_cap)
        return logits_BLV

    return logits


class Head(nn.Module):
    """The head of a `Transformer` with the same settings: hidden_BLD -> logits_BLV float32, parameters as in `parameters`."""

    c: ConfigDict

    @nn.compact
    def __call__(self, hidden_BLD: jax.Array) -> jax.Array:
        return logits_function(self, embedding_table(self) if self.c.tie_embeddings else None)(hidden_BLD)


MATRICES = {"embedding": "VD", "head": "DV"}  # the large ones, and the letters of their dimensions


def parameters(params: Any) -> dict[str, Any]:
    """Those of a Transformer's parameters that its head has: the embedding only where the head is tied to it."""
    names = ("head" if "head" in params else "embedding", "head_bias", "head_transform", "head_norm")
    return {name: params[name] for name in (*names, "output_projection") if name in params}


def gathered(c: ConfigDict, params: dict[str, Any]) -> dict[str, Any]:
    """The head's parameters as they are computed with: the large ones in the compute type, whole over fsdp.

    For a loop that reads them many times and should gather them once.
    """

    def gather(name: str, tree: Any) -> Any:
        if name not in MATRICES:
            return tree
        return jax.tree.map(lambda x: constrain(x.astype(dtype_of(c.dtype)), MATRICES[name]), tree)

    return {name: gather(name, tree) for name, tree in params.items()}
