"""Frozen kernels in few bits: int8 or nf4, with one float32 scale for every block of inputs of an output (QLoRA).

A kernel (*inputs, *features) is cut along its last input dimension into blocks of 64, 32 or 16 numbers. A number is its
code times the largest magnitude of its block. "int8" codes are whole numbers from -127 to 127. "nf4" codes are the 16
levels of Dettmers et al. 2023 (appendix E), which have equal probability under a normal distribution. Two of them share a
byte. A scale takes another 32 bits a block, so 64 numbers in nf4 take 4.5 bits each.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

FORMATS = ("int8", "nf4")
BLOCKS = (64, 32, 16)
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
CODES = {"int8": "kernel_int8", "nf4": "kernel_nf4"}  # format -> name of the parameter that holds the codes
SCALE = "kernel_scale"


def block_of(size: int) -> int:
    """How many of so many inputs share a scale; 0: they cannot be cut into blocks, and the kernel stays as it is."""
    return next((block for block in BLOCKS if size % block == 0), 0)


def axis_of(path: str, ndim: int) -> int:
    """The last input dimension of the kernel of this path, from the end: where it is cut into blocks."""
    inputs = 2 if re.search(r"(attention|cross)/out/", path) else 1
    stacked = re.match(r"(encoder/)?(first|layers|last)/|ahead/", path) is not None
    return int(stacked) + inputs - 1 - ndim


def quantize(kernel: jax.Array, form: str, axis: int) -> tuple[jax.Array, jax.Array]:
    """(codes, scales) of a kernel. `axis` is negative and has a multiple of 16 numbers.

    Codes are int8 of the kernel's shape, or uint8 with half as many along the axis; scales are float32, one a block.
    """
    x = jnp.moveaxis(kernel.astype(jnp.float32), axis, -1)
    blocks = x.reshape(*x.shape[:-1], -1, block_of(x.shape[-1]))
    scale = jnp.max(jnp.abs(blocks), axis=-1)
    relative = blocks / jnp.maximum(scale, 1e-30)[..., None]
    if form == "int8":
        codes = jnp.round(relative * 127).astype(jnp.int8).reshape(x.shape)
    else:
        borders = jnp.asarray((NF4[1:] + NF4[:-1]) / 2)
        found = jnp.searchsorted(borders, relative.reshape(-1)).astype(jnp.uint8).reshape(*x.shape[:-1], -1, 2)
        codes = found[..., 0] << 4 | found[..., 1]
    return jnp.moveaxis(codes, -1, axis), jnp.moveaxis(scale, -1, axis)


def dequantize(codes: jax.Array, scale: jax.Array, axis: int) -> jax.Array:
    """The kernel, float32, of what `quantize` returns; the type of the codes says the format."""
    codes, scale = jnp.moveaxis(codes, axis, -1), jnp.moveaxis(scale, axis, -1)
    if codes.dtype == jnp.uint8:
        both = jnp.stack([codes >> 4, codes & 15], axis=-1)
        relative = jnp.asarray(NF4)[both.reshape(*codes.shape[:-1], -1).astype(jnp.int32)]
    else:
        relative = codes.astype(jnp.float32) / 127
    blocks = relative.reshape(*scale.shape, -1) * scale[..., None]
    return jnp.moveaxis(blocks.reshape(relative.shape), -1, axis)


@functools.partial(jax.checkpoint, static_argnums=(3,))
def product(rows_RI: jax.Array, codes: jax.Array, scale: jax.Array, axis: int) -> jax.Array:
    """rows_RI @ the kernel with all inputs and all features as one dimension each, in the type of the rows.

    The backward pass makes the kernel again, so that the kernels of all layers are never there at a time.
    """
    kernel = dequantize(codes, scale, axis).astype(rows_RI.dtype)
    return rows_RI @ kernel.reshape(rows_RI.shape[1], -1)
