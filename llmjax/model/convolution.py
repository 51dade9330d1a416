"""The short convolution before a linear recurrence: each channel mixes its last few tokens (Griffin, Mamba).

Letters of this file and of the recurrent mixers beside the project's: `R` the mixer's inner width, `W` the taps of the
convolution.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from llmjax.model.layers import dtype_of


class ShortConvolution(nn.Module):
    """Causal depthwise convolution, with a bias if asked: y_t = bias + sum_i kernel_{W-1-i} x_{t-i}, channel by channel.

    Taps never reach over the start of a document. Padding may stand before or after the real tokens of a row, not
    between those of one document.
    """

    c: ConfigDict
    bias: bool = True

    @nn.compact
    def __call__(
        self, x_BLR: jax.Array, reset_BL: jax.Array, valid_BL: jax.Array, window_BWR: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """y_BLR in the compute type, and the inputs of the last W - 1 real tokens when such a window is given.

        Args:
            reset_BL, valid_BL: see `llmjax.model.recurrent`.
            window_BWR: (B, W - 1, R), the inputs before x; None: there were none, and none are returned.
        """
        taps, (batch, length, width) = self.c.recurrent.conv_width, x_BLR.shape
        # Uniform like every convolution with W inputs in PyTorch, where both papers' models started.
        start = nn.initializers.uniform(2 * taps**-0.5)
        kernel_WR = self.param("kernel", lambda *a: start(*a) - taps**-0.5, (taps, width), dtype_of(self.c.param_dtype))

        before = jnp.zeros((batch, taps - 1, width), x_BLR.dtype) if window_BWR is None else window_BWR
        inputs = jnp.concatenate([before.astype(x_BLR.dtype), jnp.where(valid_BL[:, :, None], x_BLR, 0)], 1)
        document_BL = jnp.cumsum(reset_BL & valid_BL, axis=1)
        document = jnp.pad(document_BL, ((0, 0), (taps - 1, 0)))  # what the window holds precedes the first reset
        y_BLR = jnp.zeros(x_BLR.shape, jnp.float32)
        if self.bias:
            bias_R = self.param("bias", nn.initializers.zeros, (width,), dtype_of(self.c.param_dtype))
            y_BLR = y_BLR + bias_R.astype(jnp.float32)[None, None]
        for tap in range(taps):
            there = slice(tap, tap + length)
            same_BL1 = (document[:, there] == document_BL)[:, :, None]
            weight = kernel_WR[tap].astype(jnp.float32)[None, None]
            y_BLR = y_BLR + weight * jnp.where(same_BL1, inputs[:, there], 0).astype(jnp.float32)
        if window_BWR is not None:
            end_B = jnp.max(jnp.where(valid_BL, jnp.arange(1, length + 1)[None], 0), axis=1)
            last_BW = end_B[:, None] + jnp.arange(taps - 1)[None]
            kept_BW = jnp.take_along_axis(document, last_BW, axis=1) == document_BL[:, -1:]
            latest = jnp.take_along_axis(inputs, last_BW[:, :, None], axis=1)
            window_BWR = jnp.where(kept_BW[:, :, None], latest, 0).astype(window_BWR.dtype)
        return y_BLR.astype(dtype_of(self.c.dtype)), window_BWR
