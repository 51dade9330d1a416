"""The output head, from hidden states to logits: inside the model, or alone for a loss that takes tokens by chunks."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from llmjax.model.embedding import embedding_table
from llmjax.model.layers import ACTIVATIONS, Linear, Norm, constrain, dtype_of
from llmjax.model.parametrization import logit_scale


class Head(nn.Module):
    """hidden_BLD -> logits_BLV float32.

    A `Transformer` shares its scope with its head, so the head's parameters are at the top of the tree. Alone, a head is
    applied to `head_params(params)`.
    """

    c: ConfigDict

    @nn.compact
    def __call__(self, hidden_BLD: jax.Array, embedding_VE: jax.Array | None = None) -> jax.Array:
        """Args: embedding_VE: what the head is tied to, where it is; None: a parameter of this module."""
        c, x_BLD = self.c, hidden_BLD
        dtype, size, scale = dtype_of(c.dtype), c.embedding_width or c.width, logit_scale(c)
        if c.head_transform:
            h_BLD = Linear(c, (c.width,), "inward", bias=True, name="head_transform")(x_BLD)
            x_BLD = Norm(c, name="head_norm")(ACTIVATIONS[c.activation](h_BLD))
        if size != c.width:
            x_BLD = Linear(c, (size,), "head", name="output_projection")(x_BLD)
        if scale != 1:
            x_BLD = x_BLD * jnp.asarray(scale, dtype)
        if c.tie_embeddings:
            embedding_VE = embedding_table(self) if embedding_VE is None else embedding_VE
            logits = x_BLD.reshape(-1, size) @ embedding_VE.T
            logits_BLV = logits.reshape(*x_BLD.shape[:-1], c.vocab_size)
        else:
            logits_BLV = Linear(c, (c.vocab_size,), "head", name="head")(x_BLD)
        if "head" in c.bias:
            bias_V = self.param("head_bias", nn.initializers.zeros, (c.vocab_size,), dtype_of(c.param_dtype))
            logits_BLV = logits_BLV + bias_V.astype(dtype)[None, None]
        logits_BLV = constrain(logits_BLV.astype(jnp.float32), "BLV")
        if c.logit_soft_cap:
            logits_BLV = c.logit_soft_cap * jnp.tanh(logits_BLV / c.logit_soft_cap)
        return logits_BLV


class ClassHead(nn.Module):
    """hidden (..., D) of a text's first or last token -> (..., classes) float32, or what the pooler makes of it.

    Its parameters are at the top of the tree, as those of `Head`. A classifier has no bias in models that read from left
    to right, as in transformers.
    """

    c: ConfigDict
    output: str = "classes"  # or "pooled"

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        c, pooled = self.c, hidden
        if c.pooler:
            pooled = jnp.tanh(Linear(c, (c.width,), "inward", bias=True, name="pooler")(pooled))
        if self.output == "pooled" or not c.classes:
            return pooled
        bias = c.direction == "bidirectional"
        return Linear(c, (c.classes,), "head", bias=bias, name="classifier")(pooled).astype(jnp.float32)


def classes(module: Any, params: Any, hidden: jax.Array) -> jax.Array:
    """(..., classes) float32 of hidden states (..., D) of a model with a classifier."""
    own = {name: params[name] for name in ("pooler", "classifier") if name in params}
    found: Any = ClassHead(module.c).apply({"params": own}, hidden)
    return found


class ValueHead(nn.Module):
    """hidden_BLD -> values_BL float32: one number a token, for reward models and critics."""

    c: ConfigDict

    @nn.compact
    def __call__(self, hidden_BLD: jax.Array) -> jax.Array:
        shape, dtype = (hidden_BLD.shape[-1],), dtype_of(self.c.param_dtype)
        kernel_D = self.param("kernel", nn.initializers.zeros, shape, dtype)
        bias = self.param("bias", nn.initializers.zeros, (), dtype)
        products_BLD = hidden_BLD.astype(jnp.float32) * kernel_D.astype(jnp.float32)[None, None]
        return jnp.sum(products_BLD, axis=-1) + bias.astype(jnp.float32)


def values(module: Any, params: Any, hidden_BLD: jax.Array) -> jax.Array:
    """values_BL float32 of a model's output "hidden", by its value head."""
    found: Any = ValueHead(module.c).apply({"params": params["value"]}, hidden_BLD)
    return found


MATRICES = {"embedding": "VD", "head": "DV"}  # the large ones, and the letters of their dimensions


def head_params(params: Any) -> dict[str, Any]:
    """Those of a Transformer's parameters that its head has: the embedding only where the head is tied to it."""
    names = ("head" if "head" in params else "embedding", "head_bias", "head_transform", "head_norm")
    return {name: params[name] for name in (*names, "output_projection") if name in params}


def gathered(c: ConfigDict, params: dict[str, Any]) -> dict[str, Any]:
    """A head's parameters as it computes with them: the large ones in the compute type, whole over fsdp.

    For a loop that reads them many times and should gather them once.
    """

    def gather(name: str, tree: Any) -> Any:
        if name not in MATRICES:
            return tree
        return jax.tree.map(lambda x: constrain(x.astype(dtype_of(c.dtype)), MATRICES[name]), tree)

    return {name: gather(name, tree) for name, tree in params.items()}
