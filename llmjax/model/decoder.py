"""The decoder, from token ids to logits: embed, N equal blocks scanned over stacked parameters, norm, head.

Where further architectures plug in: a mixer is a module like `attention.Attention` called by `Block`; norms,
activations and positions are branches or tables in `layers.py`; attention kernels are rows in `attention.KERNELS`;
masks are functions beside `attention.training_mask`; initialisation schemes are branches in `init.py`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict, FrozenConfigDict

from llmjax import config
from llmjax.model.attention import Attention, Cache, cache_mask, training_mask
from llmjax.model.init import initializer
from llmjax.model.layers import GATED, MLP, Linear, Norm, dtype_of, label, mlp_width, rotary_table


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x)). The body of the scan over layers."""

    c: ConfigDict
    deterministic: bool

    @nn.compact
    def __call__(
        self,
        x_BLD: jax.Array,
        mask_BLM: jax.Array,
        rotary: tuple[jax.Array, jax.Array] | None,
        starts_B: jax.Array | None,
        cache: Cache | None,
    ) -> tuple[jax.Array, Cache | None]:
        c = self.c
        drop = functools.partial(nn.Dropout, c.dropout, deterministic=self.deterministic)
        y_BLD, cache = Attention(c, name="attention")(
            Norm(c, name="attention_norm")(x_BLD), mask_BLM, rotary, starts_B, cache
        )
        x_BLD = label(x_BLD + drop()(y_BLD), "BLD")
        y_BLD = MLP(c, name="mlp")(Norm(c, name="mlp_norm")(x_BLD))
        x_BLD = label(x_BLD + drop()(y_BLD), "BLD")
        return x_BLD, cache


REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "selective": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Decoder(nn.Module):
    """A causal language model. tokens_BL int32 -> logits_BLV float32 (and the cache when one is given).

    Args of the call:
        tokens_BL: ids below `c.vocab_size`.
        positions_BL: int32, default 0, 1, 2, ... With a cache they must be contiguous in each row.
        segments_BL: int32, tokens attend within their own number only; default: one document a row.
        cache: from `init_cache`. Row b's tokens are written to the slots `positions_BL[b, 0] + arange(L)`, and a
            query at position p sees the slots 0 to p; the call then returns (logits, cache).
        deterministic: False turns dropout on, which needs `rngs={"dropout": key}`.
    """

    c: ConfigDict

    @nn.compact
    def __call__(
        self,
        tokens_BL: jax.Array,
        *,
        positions_BL: jax.Array | None = None,
        segments_BL: jax.Array | None = None,
        cache: Cache | None = None,
        deterministic: bool = True,
    ) -> Any:
        c = self.c
        dtype = dtype_of(c.dtype)
        if positions_BL is None:
            positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1])[None], tokens_BL.shape)
        if segments_BL is None:
            segments_BL = jnp.ones_like(tokens_BL)

        embedding_VD = self.param(
            "embedding", initializer(c, "embedding"), (c.vocab_size, c.width), dtype_of(c.param_dtype)
        )
        x_BLD = jnp.take(label(embedding_VD.astype(dtype), "VD"), tokens_BL, axis=0)  # gathered over fsdp first
        if c.position == "learned":
            shape = (c.max_length, c.width)
            position_MD = self.param("position_embedding", initializer(c, "position"), shape, dtype_of(c.param_dtype))
            x_BLD = x_BLD + jnp.take(position_MD.astype(dtype), positions_BL, axis=0)
        x_BLD = label(nn.Dropout(c.dropout, deterministic=deterministic)(x_BLD), "BLD")

        rotary = None
        if c.position == "rotary":
            rotary = rotary_table(positions_BL, size=config.head_size(c), base=c.rotary_base)
        if cache is None:
            mask_BLM, starts_B = training_mask(segments_BL), None
        else:
            mask_BLM, starts_B = cache_mask(positions_BL, cache["key"].shape[2]), positions_BL[:, 0]

        block = Block if c.remat == "none" else nn.remat(Block, policy=REMAT_POLICIES[c.remat], prevent_cse=False)
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0),
            out_axes=0,
            length=c.layers,
            unroll=min(c.scan_unroll, c.layers),
        )
        x_BLD, cache = stack(c, deterministic, name="layers")(x_BLD, mask_BLM, rotary, starts_B, cache)
        x_BLD = Norm(c, name="final_norm")(x_BLD)

        if c.tie_embeddings:
            rows = x_BLD.reshape(-1, c.width) @ embedding_VD.astype(dtype).T
            logits_BLV = rows.reshape(*tokens_BL.shape, c.vocab_size)
        else:
            logits_BLV = Linear(c, (c.vocab_size,), "head", bias=False, name="head")(x_BLD)
        logits_BLV = label(logits_BLV.astype(jnp.float32), "BLV")
        if c.logit_soft_cap:
            logits_BLV = c.logit_soft_cap * jnp.tanh(logits_BLV / c.logit_soft_cap)
        return logits_BLV if cache is None else (logits_BLV, cache)


def build(c: ConfigDict) -> Decoder:
    """The module for `config.model`, whose vocab_size must be resolved (see `padded_vocab`)."""
    assert c.vocab_size > 0, "resolve model.vocab_size from the tokenizer first"
    return Decoder(FrozenConfigDict(c))


def padded_vocab(c: ConfigDict, tokenizer_size: int) -> int:
    """V: `c.vocab_size`, or the tokenizer's size rounded up to `c.vocab_multiple`. ValueError if it is too small."""
    size = c.vocab_size or -(-tokenizer_size // c.vocab_multiple) * c.vocab_multiple
    if size < tokenizer_size:
        raise ValueError(
            f"model.vocab_size={size} is less than the tokenizer's {tokenizer_size}; set it to 0 to follow the tokenizer"
        )
    return size


def init_cache(c: ConfigDict, *, batch: int, length: int) -> Cache:
    """An empty key/value cache for `batch` rows of up to `length` tokens: arrays (N, B, M, G, K) in the compute type."""
    shape = (c.layers, batch, length, c.kv_heads or c.heads, config.head_size(c))
    return {"key": jnp.zeros(shape, dtype_of(c.dtype)), "value": jnp.zeros(shape, dtype_of(c.dtype))}


def flops_per_token(c: ConfigDict, *, sequence_length: int) -> float:
    """Model FLOPs to train on one token: 6 per parameter in a matrix product, and 12 N L H K for attention.

    The convention of the PaLM paper (Chowdhery et al. 2022, appendix B): attention is counted over the whole
    sequence, recomputation is not counted, and the embedding lookup costs nothing.
    """
    size = config.head_size(c)
    attention = c.width * size * (2 * c.heads + 2 * (c.kv_heads or c.heads))
    mlp = c.width * mlp_width(c) * (3 if c.activation in GATED else 2)
    matrices = c.layers * (attention + mlp) + c.vocab_size * c.width
    return 6.0 * matrices + 12.0 * c.layers * sequence_length * c.heads * size
