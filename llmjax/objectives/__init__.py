"""What is learnt: pure functions `(module, params, batch, rng, c) -> Sums`.

Sums and weights are added up over devices and micro-batches and divided once a step, so the loss does not depend on
how the batch was cut.
"""

from collections.abc import Callable

from llmjax.objectives.causal import Sums, causal

OBJECTIVES: dict[str, Callable[..., Sums]] = {"causal": causal}
