"""Matrix products in int8 or fp8, through qwix: an optional extra (pip install "llmjax[quantized]").

Parameters stay as they are stored. Every product quantizes its operands itself, with one scale for each row of the left
operand and each column of the right one. So nothing has to be calibrated, and a model that was trained in float32 or
bfloat16 runs in int8 by one line of config.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.errors import UserError

# For each kind the type of the products' operands, and that of gradients, which range more widely.
TYPES = {"int8": ("int8", "int8"), "fp8": ("float8_e4m3fn", "float8_e5m2")}


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x_RD: jax.Array, kernel_DF: jax.Array, kind: str) -> jax.Array:
    """x @ kernel -> (R, F) in x's type, with both rounded to `kind`: int8, or fp8 (Micikevicius et al. 2022).

    The gradient of x is such a product too. That of the kernel, a sum over all rows that outliers would spoil, is
    computed in the operands' own type (Wortsman et al. 2023).

    Raises UserError where qwix is not installed.
    """
    wide, _ = TYPES[kind]
    return _rounded(x_RD, kernel_DF, wide, wide)


def _forward(x_RD: jax.Array, kernel_DF: jax.Array, kind: str) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(x_RD, kernel_DF, kind), (x_RD, kernel_DF)


def _backward(kind: str, saved: tuple[jax.Array, jax.Array], dy_RF: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_RD, kernel_DF = saved
    wide, ranging = TYPES[kind]
    return _rounded(dy_RF, kernel_DF.T, ranging, wide).astype(x_RD.dtype), (x_RD.T @ dy_RF).astype(kernel_DF.dtype)


product.defvjp(_forward, _backward)


def _rounded(a: jax.Array, b: jax.Array, a_type: str, b_type: str) -> jax.Array:
    """a @ b, with a scale for each row of a and each column of b."""
    qwix = _library()
    low = [
        qwix.quantize(x, jnp.dtype(name), channelwise_axes=[axis], scale_dtype=jnp.float32)
        for x, name, axis in ((a, a_type, 0), (b, b_type, 1))
    ]
    return qwix.dot_general(*low, (((1,), (0,)), ((), ()))).astype(a.dtype)


def _library() -> Any:
    try:
        import qwix
    except ModuleNotFoundError as error:
        raise UserError(
            'model.quantization needs qwix: pip install "llmjax[quantized]", or set model.quantization=none'
        ) from error
    return qwix
