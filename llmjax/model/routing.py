"""Routing of tokens to experts: scores, the choice, losses that balance the load, and the slots of the chosen rows.

Letters beside the legend of shapes: `J` the choices of a token (experts per token), `X` all choices of all tokens (choice
first, then token: x = j * T + t), `T` tokens, `P` slots, the rows that experts read and write.

| paper | top-k | score | normalize | balanced by (balance_over) |
|---|---|---|---|---|
| Switch (Fedus et al. 2021) | 1 | softmax | no: the probability scales the output, or the router would not learn | loss (batch) |
| GShard (Lepikhin et al. 2020) | 2 | softmax | yes | loss (batch) |
| Mixtral (Jiang et al. 2024) | 2 | softmax; of the chosen logits, which is the same as of all, divided by the chosen's sum | yes | loss (layers) |
| DeepSeekMoE, V2 (Dai et al. 2024) | many small, perhaps of a few groups, and shared ones | softmax | no | loss (row) |
| DeepSeek-V3 (2024) | many small of a few groups, and shared ones | sigmoid | yes, times a scale | a bias on the choice alone, and a small loss (row) |
| Qwen3 (Yang et al. 2025) | many small | softmax | yes | loss (layers) |

With batch and row the losses of the layers are added up. With layers there is one loss for all, as in transformers.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from llmjax.model.per_device import per_device

NEVER_ZERO = 1e-20  # added to sums of scores, which may all underflow


def scores(logits_BLE: jax.Array, moe: ConfigDict) -> jax.Array:
    """How well each expert suits each token, in (0, 1): (B, L, E) float32."""
    logits_BLE = logits_BLE.astype(jnp.float32)
    return jax.nn.softmax(logits_BLE) if moe.score == "softmax" else jax.nn.sigmoid(logits_BLE)


def choose(
    scores_BLE: jax.Array, valid_BL: jax.Array, moe: ConfigDict, bias_E: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The experts of each token, best first, and the weights of their outputs: (B, L, J) int32 and float32.

    Padding is sent to expert E, which does not exist, with weight 0. Ties go to the lower expert id.

    Args:
        bias_E: added to the scores for the choice, but not for the weights (DeepSeek-V3).
    """
    experts = scores_BLE.shape[-1]
    wanted_BLE = scores_BLE if bias_E is None else scores_BLE + bias_E[None, None]
    # Device by device: the compiler would gather the scores of the whole batch on each device for top-k.
    wanted_BLE = jax.lax.stop_gradient(wanted_BLE)

    def best(wanted_BLE: jax.Array, _: Any) -> jax.Array:
        return jax.lax.top_k(in_best_groups(wanted_BLE, moe), moe.active)[1]

    experts_BLJ = per_device(best, (wanted_BLE,), ("BLE",))
    # A masked sum, not a gather, whose derivative would be a scatter.
    chosen_BLJE = experts_BLJ[..., None] == jnp.arange(experts)[None, None, None]
    weights_BLJ = jnp.sum(jnp.where(chosen_BLJE, scores_BLE[:, :, None], 0.0), axis=-1)
    if moe.normalize:
        weights_BLJ = weights_BLJ / (jnp.sum(weights_BLJ, axis=-1, keepdims=True) + NEVER_ZERO)
    weights_BLJ = jnp.where(valid_BL[..., None], weights_BLJ * moe.scale, 0.0)
    return jnp.where(valid_BL[..., None], experts_BLJ, experts), weights_BLJ


def in_best_groups(wanted_BLE: jax.Array, moe: ConfigDict) -> jax.Array:
    """The scores of experts in the groups that each token chooses, and -inf for the others (DeepSeek-V2 and V3)."""
    if moe.groups == moe.active_groups:
        return wanted_BLE
    B, L, E = wanted_BLE.shape
    groups_BLGE = wanted_BLE.reshape(B, L, moe.groups, E // moe.groups)
    scores_BLG = jnp.sum(jax.lax.top_k(groups_BLGE, moe.group_score)[0], axis=-1)
    chosen_BLA = jax.lax.top_k(scores_BLG, moe.active_groups)[1]
    kept_BLG = jnp.any(chosen_BLA[..., None] == jnp.arange(moe.groups)[None, None, None], axis=2)
    return jnp.where(kept_BLG[..., None], groups_BLGE, -jnp.inf).reshape(B, L, E)


def loads(experts_BLJ: jax.Array, experts: int) -> jax.Array:
    """How many tokens chose each expert: (E,) float32; padding is not counted."""
    chosen_BLJE = experts_BLJ[..., None] == jnp.arange(experts)[None, None, None]
    return jnp.sum(chosen_BLJE, axis=(0, 1, 2), dtype=jnp.float32)


class Usage(NamedTuple):
    """How a batch used the experts of a layer: float32 sums over its tokens without padding. Of several layers: (N, ...)."""

    loads: jax.Array  # (E,): tokens that chose each expert
    probs: jax.Array  # (E,): the router's scores, each token's divided by their sum
    dropped: jax.Array | None = None  # choices that found no slot, where there are capacities


def usage(scores_BLE: jax.Array, experts_BLJ: jax.Array, valid_BL: jax.Array, moe: ConfigDict) -> Usage:
    """How a batch uses the experts of one layer."""
    probs_BLE = scores_BLE / (jnp.sum(scores_BLE, axis=-1, keepdims=True) + NEVER_ZERO)
    probs_E = jnp.sum(probs_BLE * valid_BL[..., None], axis=(0, 1))
    lost = dropped(experts_BLJ, moe) if moe.dispatch == "capacity" else None
    return Usage(loads(experts_BLJ, scores_BLE.shape[-1]), probs_E, lost)


def all_layers(found: Sequence[Usage]) -> Usage:
    """The usages of one layer each, or of stacks of any shape, as one of all layers: (N, E) and (N,)."""
    flat = [jax.tree.map(lambda x, one=u: x.reshape(-1, *x.shape[one.loads.ndim - 1 :]), u) for u in found]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *flat)


def balance_loss(loads_E: jax.Array, probs_E: jax.Array) -> jax.Array:
    """E * sum over experts of (share of the choices) * (mean score): 1 when balanced, E when one expert has all.

    Fedus et al. 2021, equation 4. With several choices a token, shares are of all choices (each token counts 1/k for
    each of its k experts). Scores that do not sum to 1 are divided by their sum (as in DeepSeek-V3). The gradient
    flows through the mean score. The means are over the tokens that loads and scores were summed over (see `Usage`).
    """
    share_E = loads_E / jnp.maximum(jnp.sum(loads_E), 1.0)
    mean_E = probs_E / jnp.maximum(jax.lax.stop_gradient(jnp.sum(probs_E)), NEVER_ZERO)
    return loads_E.shape[0] * jnp.sum(jax.lax.stop_gradient(share_E) * mean_E)


def row_balance_loss(scores_BLE: jax.Array, experts_BLJ: jax.Array, valid_BL: jax.Array, moe: ConfigDict) -> jax.Array:
    """The mean over rows of each row's balance loss; rows of padding do not count (DeepSeek-V3, equations 17 to 20)."""

    def one(scores_LE: jax.Array, experts_LJ: jax.Array, valid_L: jax.Array) -> jax.Array:
        used = usage(scores_LE[None], experts_LJ[None], valid_L[None], moe)
        return balance_loss(used.loads, used.probs)

    real_B = jnp.any(valid_BL, axis=1)
    losses_B = jax.vmap(one)(scores_BLE, experts_BLJ, valid_BL)
    return jnp.sum(losses_B * real_B) / jnp.maximum(jnp.sum(real_B), 1)


def pooled_balance_loss(used: Usage, moe: ConfigDict) -> jax.Array:
    """`balance_loss` over the tokens of all layers together, times the choices of a token and the weight: k at balance.

    The same as transformers' load_balancing_loss_func, for which the coefficients of Mixtral and Qwen3 are meant.
    """
    return moe.balance_loss * moe.active * balance_loss(jnp.sum(used.loads, axis=0), jnp.sum(used.probs, axis=0))


def metrics(used: Usage) -> dict[str, jax.Array]:
    """What a run logs of its experts, float32 scalars, from the sums over a step and all layers.

    expert_load_max: the load of a layer's busiest expert relative to the mean, a mean over the layers: 1 when balanced.
    expert_dropped: with capacities, the share of all choices that found no slot.
    """
    mean_N = jnp.maximum(jnp.mean(used.loads, axis=-1), NEVER_ZERO)
    found = {"expert_load_max": jnp.mean(jnp.max(used.loads, axis=-1) / mean_N)}
    if used.dropped is not None:
        found["expert_dropped"] = jnp.sum(used.dropped) / jnp.maximum(jnp.sum(used.loads), 1.0)
    return found


def z_loss(logits_BLE: jax.Array, valid_BL: jax.Array) -> jax.Array:
    """The mean over tokens of (log of the sum of exp(logits))^2 (Zoph et al. 2022, ST-MoE, equation 5)."""
    log_z_BL = jax.nn.logsumexp(logits_BLE, axis=-1)
    return jnp.sum(jnp.square(log_z_BL) * valid_BL) / jnp.maximum(jnp.sum(valid_BL), 1)


def excess(loads_E: jax.Array) -> jax.Array:
    """Tokens of each expert above the mean: the bias that balances experts moves against its sign (see observed.py)."""
    return loads_E - jnp.mean(loads_E)


class Assignment(NamedTuple):
    """The slot of each choice among the rows that experts work on; X or P, out of range, means none.

    Rows are sorted by expert: expert e has the `sizes[e]` rows after those of the experts before it.
    """

    slots: jax.Array  # (J, T) int32, below P
    choices: jax.Array  # (P,) int32, below X = J * T: the inverse
    sizes: jax.Array  # (E,) int32

    def tokens(self) -> jax.Array:
        """The token in each slot, (P,) int32; T, out of range, for none."""
        T = self.slots.shape[1]
        return jnp.where(self.choices < self.slots.size, self.choices % T, T)


def _by_expert(experts_X: jax.Array, experts: int) -> tuple[jax.Array, jax.Array]:
    """The choices sorted by expert (stable), and where each expert's begin, (E + 1,)."""
    count = experts_X.shape[0]
    if (experts + 1) * count < 2**31:  # one number holds both: several times faster on CPU than sorting pairs
        keys_X = jnp.sort(experts_X * count + jnp.arange(count, dtype=jnp.int32))
        order_X, sorted_X = keys_X % count, keys_X // count
    else:
        order_X = jnp.argsort(experts_X, stable=True)
        sorted_X = jnp.take(experts_X, order_X)
    return order_X, jnp.searchsorted(sorted_X, jnp.arange(experts + 1, dtype=jnp.int32)).astype(jnp.int32)


def dropless(experts_BLJ: jax.Array, experts: int) -> Assignment:
    """Every choice has its own slot: P = X rows, those of padding last (Gale et al. 2022, MegaBlocks)."""
    B, L, J = experts_BLJ.shape
    experts_X = experts_BLJ.transpose(2, 0, 1).reshape(-1)
    X = experts_X.shape[0]
    order_X, starts = _by_expert(experts_X, experts)
    slot_X = jnp.zeros(X, jnp.int32).at[order_X].set(jnp.arange(X, dtype=jnp.int32), unique_indices=True)
    slot_X = jnp.where(experts_X < experts, slot_X, X)
    choice_X = jnp.where(jnp.arange(X) < starts[-1], order_X, X)
    return Assignment(slot_X.reshape(J, B * L), choice_X, jnp.diff(starts))


def capacities(length: int, moe: ConfigDict) -> np.ndarray:
    """How many tokens of a row an expert takes, for rows of 0, 1, ... `length` tokens: ceil(capacity_factor * k * tokens / E)."""
    tokens = np.arange(length + 1)
    share = moe.capacity_factor * moe.active / moe.experts
    # A token chooses an expert at most once. 1e-9: 1.1 * 10 is 11 here, and not a little more.
    return np.minimum(np.ceil(tokens * share - 1e-9), tokens).astype(np.int32)


def dropped(experts_BLJ: jax.Array, moe: ConfigDict) -> jax.Array:
    """How many choices `limited` has no slot for, a float32 scalar."""
    loads_BE = jax.vmap(lambda row_LJ: loads(row_LJ[None], moe.experts))(experts_BLJ)
    capacity = jnp.asarray(capacities(experts_BLJ.shape[1], moe))
    tokens_B = jnp.sum(experts_BLJ[:, :, 0] < moe.experts, axis=1)
    return jnp.sum(jnp.maximum(loads_BE - jnp.take(capacity, tokens_B)[:, None], 0.0))


def limited(experts_BLJ: jax.Array, moe: ConfigDict) -> Assignment:
    """Each expert takes at most `capacities` of a row's tokens, the rest is dropped: P = E * B * C rows, (E, B, C) in order.

    First choices come before second ones, and each in the order of the tokens (Lepikhin et al. 2020). Capacity is counted
    row by row, so what is dropped depends neither on the mesh nor on how the batch was cut. Padding takes no slot and adds
    no capacity.
    """
    B, L, J = experts_BLJ.shape
    E, X = moe.experts, J * B * L
    capacity = capacities(L, moe)
    C = int(capacity[L])
    P = E * B * C
    experts_BX = experts_BLJ.transpose(0, 2, 1).reshape(B, J * L)
    order_BX, starts_BE = jax.vmap(_by_expert, in_axes=(0, None))(experts_BX, E)
    sorted_BX = jnp.take_along_axis(experts_BX, order_BX, axis=1)
    rank_BX = jnp.arange(J * L, dtype=jnp.int32)[None] - jnp.take_along_axis(starts_BE, sorted_BX, axis=1)
    limit_B = jnp.take(jnp.asarray(capacity), jnp.sum(experts_BX[:, :L] < E, axis=1))
    rows_B = jnp.arange(B, dtype=jnp.int32)[:, None]
    slot_BX = jnp.where((rank_BX < limit_B[:, None]) & (sorted_BX < E), (sorted_BX * B + rows_B) * C + rank_BX, P)
    choice_BX = (order_BX // L) * (B * L) + rows_B * L + order_BX % L
    choice_P = jnp.full(P, X, jnp.int32).at[slot_BX.reshape(-1)].set(choice_BX.reshape(-1), mode="drop")
    of_choice_X = jnp.zeros(X, jnp.int32).at[choice_BX.reshape(-1)].set(slot_BX.reshape(-1), unique_indices=True)
    return Assignment(of_choice_X.reshape(J, B * L), choice_P, jnp.full(E, B * C, jnp.int32))
