"""Parameters that follow what the forward pass observes, and not the loss.

Batch norm's running statistics follow the statistics of the batches, and the bias that balances experts follows their loads.
In the forward pass `observe` says how far such a parameter is from what was seen; in the backward pass that number
arrives in the place of its gradient, so it takes the gradient's way through micro-batches, pipelines and meshes:

- a step adds the numbers up over micro-batches and divides by how many there are (train/step.py); a pipeline takes the mean
  over its parts (parallel/pipeline.py);
- the norm of the gradient and clipping leave them out;
- `RULES` names the update that each gets (train/optimizer.py).
"""

import jax
import jax.numpy as jnp

RULES = {
    "running_mean": "average",
    "running_var": "average",
    "expert_bias": "balance",
}  # the last name of the path -> rule


def is_observed(path: str) -> bool:
    """Whether the parameter of this path, names joined by slashes, follows what the forward pass observes."""
    return path.rpartition("/")[2] in RULES


@jax.custom_vjp
def observe(y: jax.Array, parameter: jax.Array, excess: jax.Array) -> jax.Array:
    """y; in the backward pass the gradient of `parameter` is `excess`, whatever the loss."""
    return y


observe.defvjp(lambda y, parameter, excess: (y, excess), lambda excess, dy: (dy, excess, jnp.zeros_like(excess)))
