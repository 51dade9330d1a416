"""Small networks with random parameters, and what tests ask of them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmjax import config
from llmjax.infer.engine import Engine
from llmjax.infer.request import Completion, Request
from llmjax.model import transformer
from llmjax.model.views import Tokens, visible
from llmjax.parallel.placement import path_name


def settings(**changes: Any) -> config.ConfigDict:
    """A small model of two layers."""
    c = config.base().model
    c.update({"layers": 2, "width": 16, "heads": 4, "mlp_width": 32, "max_length": 32, "vocab_size": 32})
    c.update({"attention": "reference", **changes})
    return c


def make(c: config.ConfigDict, seed: int = 0) -> tuple[transformer.Transformer, Any]:
    """The module and random parameters, none of them zero or one, and large enough that attention is far from uniform.

    Without a norm of the values at hand they are smaller, so that values stay of the order of one from layer to layer: had they grown to
    hundreds, a soft cap of the logits would hide them, and what it leaves, logits near zero, would be their rounding.
    """
    module = transformer.build(c)
    shapes = transformer.param_shapes(module)
    rng = np.random.default_rng(seed)
    scale = 0.18 if c.norm in ("none", "batch") else 0.3

    def value(path: Any, x: jax.ShapeDtypeStruct) -> jax.Array:
        drawn = rng.normal(size=x.shape) * scale
        return jnp.asarray(1 + np.abs(drawn) if "running_var" in path_name(path) else drawn, x.dtype)

    return module, jax.tree_util.tree_map_with_path(value, shapes)


def answers(engine: Engine, requests: list[Request]) -> list[Completion]:
    """What an engine answers to requests that it gets at once."""
    numbers = [engine.submit(request) for request in requests]
    done = dict(engine.run())
    return [done[number] for number in numbers]


def logits_of(module: transformer.Transformer, params: Any, tokens_BL: jax.Array, **arguments: Any) -> jax.Array:
    apply = functools.partial(module.apply, output=arguments.pop("output", "logits"))
    return jax.jit(apply)({"params": params}, tokens_BL, **arguments)


def packed(rows: list[list[int]]) -> tuple[jax.Array, jax.Array]:
    """positions_BL and segments_BL of rows that hold documents of these lengths."""
    positions = [[p for length in row for p in range(length)] for row in rows]
    segments = [[i for i, length in enumerate(row, start=1) for _ in range(length)] for row in rows]
    return jnp.array(positions), jnp.array(segments)


def causal_mask(segments_BL: jax.Array) -> jax.Array:
    """mask_BLM of packed documents, each read from left to right."""
    index_BL = jnp.broadcast_to(jnp.arange(segments_BL.shape[1])[None], segments_BL.shape)
    tokens = Tokens(index_BL, index_BL, segments_BL, index_BL)
    return visible(tokens, tokens)


def close(a: Any, b: Any, tolerance: float) -> None:
    """Every array of two trees is equal within a share of its own largest value."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        assert np.isfinite(y).all()
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())
