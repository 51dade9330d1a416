"""From token ids to the residual stream: the embeddings of tokens, positions, types and languages."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from llmjax.model import positions as P
from llmjax.model.init import initializer
from llmjax.model.layers import Linear, Norm, constrain, drop, dtype_of, lookup


def embedding_table(module: nn.Module) -> jax.Array:
    """embedding_VE in the compute type, a parameter of `module`, which has the settings `c`."""
    c = module.c
    shape = (c.vocab_size, c.embedding_width or c.width)
    stored_VE = module.param("embedding", initializer(c, "embedding"), shape, dtype_of(c.param_dtype))
    return constrain(stored_VE.astype(dtype_of(c.dtype)), "VD")


def make_embed(module: nn.Module, deterministic: bool) -> tuple[Callable[..., jax.Array], jax.Array]:
    """The function (tokens_BL, positions_BL, types_BL, languages_BL) -> x_BLD, and embedding_VE; parameters of `module`."""
    c = module.c
    dtype, stored = dtype_of(c.dtype), dtype_of(c.param_dtype)
    size, rows = c.embedding_width or c.width, c.position_offset + c.max_length

    def table(name: str, count: int) -> jax.Array:
        return module.param(name, initializer(c, "position"), (count, c.width), stored).astype(dtype)

    embedding_VE = embedding_table(module)
    project = Linear(c, (c.width,), "inward", name="embedding_projection") if size != c.width else None
    position_MD = table("position_embedding", rows) if c.position == "learned" else None
    in_types = c.types and c.position != "xlnet"  # XLNet's types are terms of the attention
    type_TD = table("type_embedding", c.types) if in_types else None
    language_TD = table("language_embedding", c.languages) if c.languages else None
    norm = Norm(c, deterministic=deterministic, name="embedding_norm") if c.embedding_norm else None

    def embed(
        tokens_BL: jax.Array,
        positions_BL: jax.Array,
        types_BL: jax.Array | None = None,
        languages_BL: jax.Array | None = None,
    ) -> jax.Array:
        x_BLD = lookup(embedding_VE, tokens_BL)  # gathered over fsdp first
        if c.embedding_scale != 1:
            x_BLD = x_BLD * jnp.asarray(c.embedding_scale, dtype)
        if project is not None:
            x_BLD = project(x_BLD)
        if position_MD is not None:
            # Padding may have positions after the last row; its embedding must still be finite.
            x_BLD = x_BLD + lookup(position_MD, jnp.clip(positions_BL + c.position_offset, 0, rows - 1))
        elif c.position == "sinusoidal":
            x_BLD = x_BLD + P.sinusoids(positions_BL, c.width).astype(dtype)
        for table_TD, ids_BL in ((type_TD, types_BL), (language_TD, languages_BL)):
            if table_TD is not None:
                x_BLD = x_BLD + (table_TD[:1][None] if ids_BL is None else lookup(table_TD, ids_BL))
        if norm is not None:
            x_BLD = norm(x_BLD)
        if c.embedding_dropout and not deterministic:
            x_BLD = drop(x_BLD, c.embedding_dropout, module.make_rng("dropout"))
        return constrain(x_BLD, "BLD")

    return embed, embedding_VE
