"""LFM2's mixer: a gated short convolution, with which a layer sees the last few tokens at a small cost (Liquid AI 2025).

Letters: `R` the inner width, `W` the taps of the convolution.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from llmjax.model.convolution import ShortConvolution
from llmjax.model.layers import Linear, constrain, dtype_of


def width(c: ConfigDict) -> int:
    """R, the width of the convolution and of both gates."""
    return c.recurrent.width or c.width


def init_state(c: ConfigDict, batch: int) -> dict[str, jax.Array]:
    """The state before the first token: the window (B, W - 1, R) of the convolution's inputs."""
    return {"conv": jnp.zeros((batch, c.recurrent.conv_width - 1, width(c)), dtype_of(c.dtype))}


class GatedConvolution(nn.Module):
    """out(after * convolution(before * x)), where before, after and x are linear in the input.

    See `llmjax.model.recurrent` for the arguments.
    """

    c: ConfigDict

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, reset_BL: jax.Array, valid_BL: jax.Array, state: dict[str, jax.Array] | None
    ) -> tuple[jax.Array, dict[str, jax.Array] | None]:
        c, bias = self.c, "out" in self.c.bias
        before_BLR, after_BLR, x_BLR = (
            constrain(Linear(c, (width(c),), "inward", bias=bias, name=name)(x_BLD), "BLR")
            for name in ("before", "after", "input")
        )
        window = None if state is None else state["conv"]
        convolution = ShortConvolution(c, bias=bias, name="conv")
        y_BLR, window = convolution(before_BLR * x_BLR, reset_BL, valid_BL, window)
        y_BLD = Linear(c, (c.width,), "outward", bias=bias, name="out")(after_BLR * y_BLR)
        return y_BLD, None if window is None else {"conv": window}
