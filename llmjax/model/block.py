"""A block of the network, and the stacks of blocks: equal ones share a scan over a leading layer dimension."""

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from ml_collections import ConfigDict

from llmjax.config.model_checks import ATTENTION
from llmjax.model import layers, recurrent
from llmjax.model.attention import Attention
from llmjax.model.init import residual_scale
from llmjax.model.layers import MLP, Norm, constrain
from llmjax.model.moe import MoE
from llmjax.model.stacks import Kind, Stack, layer_stacks
from llmjax.model.views import View

# Another way than a scan to run the repeated layers; see `run_stacks`. parallel/pipeline.py sets it.
RUNNER: ContextVar[Callable[..., tuple[jax.Array, jax.Array, Any]] | None] = ContextVar("RUNNER", default=None)


@struct.dataclass
class Inputs:
    """What every block reads beside the residual stream."""

    views: dict[str, View]  # by kind of attention
    valid_BL: jax.Array  # bool, false for padding
    reset_BL: jax.Array  # bool, the first token of a document
    starts_B: jax.Array | None = None  # slot of the cache for each row's first token
    encoded_BMD: jax.Array | None = None  # the encoder's output
    cross_view: View | None = None
    content: int | None = struct.field(pytree_node=False, default=None)  # only the first so many tokens are looked at


class Block(nn.Module):
    """A mixer of tokens and an MLP, each added to the residual stream: x_BLD -> x_BLD. The body of the scan over layers.

    `state` holds what belongs to this layer alone: "depth" in [0, 1], and when given "cache" and "memory".
    """

    c: ConfigDict
    kind: str
    sparse: bool = False
    deterministic: bool = True
    cross: bool = False
    encoder: bool = False

    @nn.compact
    def __call__(self, x_BLD: jax.Array, inputs: Inputs, state: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        c, before_BLD = self.c, x_BLD
        new_state: dict[str, Any] = {}
        name = "attention" if self.kind in ATTENTION else "recurrent"
        mix = functools.partial(self._mix, x_BLD=x_BLD, inputs=inputs, state=state, new_state=new_state)
        if c.block == "parallel":
            norm = self._norm(f"{name}_norm")
            h_BLD = norm(x_BLD, inputs.valid_BL)
            y_BLD = self._drop(mix(h_BLD, norm), state)
            if c.mlp != "none":
                if not c.shared_norm:
                    h_BLD = self._norm("mlp_norm")(x_BLD, inputs.valid_BL)
                y_BLD = y_BLD + self._drop(self._feed_forward(h_BLD, inputs), state)
            x_BLD = constrain(self._residual(x_BLD) + y_BLD, "BLD")
        else:
            x_BLD = self._branch(x_BLD, name, mix, inputs, state)
            if self.cross:
                x_BLD = self._branch(
                    x_BLD, "cross", lambda h, _: self._cross(h, inputs, state, new_state), inputs, state
                )
            if c.mlp != "none":
                x_BLD = self._branch(x_BLD, "mlp", lambda h, _: self._feed_forward(h, inputs), inputs, state)
        if c.layer_drop and not self.deterministic:  # Fan et al. 2020
            keep = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - self._rate(c.layer_drop, state))
            x_BLD = jnp.where(keep, x_BLD, before_BLD)
        if "memory" in state:
            seen_BMD = jnp.concatenate([state["memory"], before_BLD[:, : inputs.content]], axis=1)
            new_state["memory"] = jax.lax.stop_gradient(seen_BMD[:, seen_BMD.shape[1] - state["memory"].shape[1] :])
        return x_BLD, new_state

    def _branch(
        self,
        x_BLD: jax.Array,
        name: str,
        branch: Callable[[jax.Array, Norm], jax.Array],
        inputs: Inputs,
        state: dict[str, Any],
    ) -> jax.Array:
        """Pre: x + f(norm(x)). Post: norm(x + f(x)). Sandwich: x + norm(f(norm(x)))."""
        place, norm = self.c.norm_place, self._norm(f"{name}_norm")
        y_BLD = branch(x_BLD if place == "post" else norm(x_BLD, inputs.valid_BL), norm)
        if place == "sandwich":
            y_BLD = self._norm(f"{name}_post_norm")(y_BLD, inputs.valid_BL)
        x_BLD = self._residual(x_BLD) + self._drop(y_BLD, state)
        return constrain(norm(x_BLD, inputs.valid_BL) if place == "post" else x_BLD, "BLD")

    def _mix(
        self,
        h_BLD: jax.Array,
        norm: Norm,
        *,
        x_BLD: jax.Array,
        inputs: Inputs,
        state: dict[str, Any],
        new_state: dict[str, Any],
    ) -> jax.Array:
        c, cache = self.c, state.get("cache")
        if self.kind not in ATTENTION:
            mixer = recurrent.MIXERS[self.kind](c, name=self.kind)
            y_BLD, cache = mixer(h_BLD, inputs.reset_BL, inputs.valid_BL, cache)
            if cache is not None:
                new_state["cache"] = cache
            return y_BLD
        keys_BMD = None
        if inputs.content is not None:
            keys_BMD = h_BLD[:, : inputs.content]
        if "memory" in state:
            memory_BMD = state["memory"] if c.norm_place == "post" else norm(state["memory"])
            keys_BMD = jnp.concatenate([memory_BMD, h_BLD if keys_BMD is None else keys_BMD], axis=1)
        y_BLD, new_cache = Attention(c, self.deterministic, name="attention")(
            h_BLD,
            inputs.views[self.kind],
            keys_BMD=keys_BMD,
            starts_B=inputs.starts_B,
            cache=None if cache is None else {name: cache[name] for name in ("key", "value")},
        )
        if new_cache is not None:
            new_state["cache"] = new_cache
        return y_BLD

    def _cross(self, h_BLD: jax.Array, inputs: Inputs, state: dict[str, Any], new_state: dict[str, Any]) -> jax.Array:
        cache = state.get("cache")
        assert inputs.cross_view is not None
        y_BLD, cache = Attention(self.c, self.deterministic, cross=True, name="cross")(
            h_BLD,
            inputs.cross_view,
            keys_BMD=inputs.encoded_BMD,
            cache=None if cache is None else {name: cache[f"cross_{name}"] for name in ("key", "value")},
        )
        if cache is not None:
            new_state["cache"] |= {f"cross_{name}": value for name, value in cache.items()}
        return y_BLD

    def _feed_forward(self, h_BLD: jax.Array, inputs: Inputs) -> jax.Array:
        if self.sparse:
            return MoE(self.c, self.deterministic, name="moe")(h_BLD, inputs.valid_BL)
        return MLP(self.c, name="mlp")(h_BLD)

    def _norm(self, name: str) -> Norm:
        return Norm(self.c, deterministic=self.deterministic, name=name)

    def _residual(self, x_BLD: jax.Array) -> jax.Array:
        scale = residual_scale(self.c, encoder=self.encoder)
        return x_BLD if scale == 1 else x_BLD * jnp.asarray(scale, x_BLD.dtype)

    def _rate(self, rate: float, state: dict[str, Any]) -> float | jax.Array:
        return rate * state["depth"] if self.c.dropout_shape == "linear" else rate

    def _drop(self, y_BLD: jax.Array, state: dict[str, Any]) -> jax.Array:
        if self.deterministic or not self.c.dropout:
            return y_BLD
        return layers.drop(y_BLD, self._rate(self.c.dropout, state), self.make_rng("dropout"))


REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "selective": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class SuperBlock(nn.Module):
    """Blocks of several kinds, one after another: the body of the scan when a pattern has more than one kind."""

    make_block: Callable[..., nn.Module]
    kinds: tuple[Kind, ...]

    @nn.compact
    def __call__(self, x_BLD: jax.Array, inputs: Inputs, states: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        new_states = {}
        for place, (kind, sparse) in enumerate(self.kinds):
            block = self.make_block(kind=kind, sparse=sparse, name=str(place))
            x_BLD, new_states[str(place)] = block(x_BLD, inputs, states[str(place)])
        return x_BLD, new_states


def run_stacks(
    module: nn.Module,
    x_BLD: jax.Array,
    inputs: Inputs,
    states: dict[str, Any],
    *,
    deterministic: bool,
    encoder: bool = False,
) -> tuple[jax.Array, dict[str, Any]]:
    """All blocks of the stack, to be called inside a compact method of `module`, which gets their parameters.

    The layers of the repeated pattern are scanned, or handed to `RUNNER` when it is set and nothing is carried from call
    to call: as a pure function of one layer (or period) and trees with the layers in front.

    Args:
        states: by stack, then by place in the period if there is more than one: trees with a leading layer
            dimension, such as {"layers": {"cache": ...}} (see `Block`); may be empty. Where the parameters are
            `unstack`, a tuple of such trees without that dimension.

    Returns:
        The residual stream and the new states.
    """
    c: ConfigDict = module.c
    runner = RUNNER.get() if not module.is_initializing() else None
    cls = Block if c.remat == "none" else nn.remat(Block, policy=REMAT_POLICIES[c.remat], prevent_cse=False)
    common = {"c": c, "deterministic": deterministic, "cross": c.encoder_layers > 0 and not encoder, "encoder": encoder}
    count = c.encoder_layers if encoder else c.layers
    new_states = {}
    for stack in layer_stacks(c, encoder=encoder):
        places, repeats = len(stack.kinds), stack.repeats
        depth = stack.start + jnp.arange(repeats * places, dtype=jnp.float32).reshape(repeats, places)
        depth = depth / max(count - 1, 1)
        given = states.get(stack.name, {})
        kind, sparse = stack.kinds[0]
        own_params = None if module.is_initializing() else module.variables["params"].get(stack.name)
        if isinstance(own_params, tuple):
            x_BLD, new_states[stack.name] = _one_by_one(stack, common, own_params, x_BLD, inputs, given, depth)
            continue
        elsewhere = runner is not None and stack.name == "layers" and not jax.tree.leaves(given)
        own = Block if elsewhere else cls
        body: type[nn.Module] = own
        if places == 1:
            fields = {**common, "kind": kind, "sparse": sparse}
            per_layer = {**given, "depth": depth[:, 0]}
        else:
            body, fields = SuperBlock, {"make_block": functools.partial(own, **common), "kinds": stack.kinds}
            per_layer = {str(i): {**given.get(str(i), {}), "depth": depth[:, i]} for i in range(places)}
        if elsewhere:
            assert runner is not None
            layer = functools.partial(_one_layer, body(**fields, parent=None))
            key = None if deterministic else module.make_rng("dropout")
            x_BLD, auxiliary, routing = runner(layer, own_params, x_BLD, inputs, per_layer, key)
            module.sow("losses", "layers", auxiliary)
            module.sow("routing", "layers", routing)
            continue
        scanned = nn.scan(
            body,
            variable_axes={"params": 0, "losses": 0, "routing": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, 0),
            out_axes=0,
            length=repeats,
            unroll=min(c.scan_unroll, repeats),
        )
        x_BLD, new_states[stack.name] = scanned(**fields, name=stack.name)(x_BLD, inputs, per_layer)
    return x_BLD, new_states


def _one_by_one(
    stack: Stack,
    common: dict[str, Any],
    layer_params: tuple[Any, ...],
    x_BLD: jax.Array,
    inputs: Inputs,
    given: Any,
    depth: jax.Array,
) -> tuple[jax.Array, tuple[Any, ...]]:
    """The layers of a stack whose parameters are `unstack`, in a loop of Python's: each with arrays of its own."""
    new_states = []
    for i, params in enumerate(layer_params):
        state = dict(given[i]) if isinstance(given, tuple) else {}
        if len(stack.kinds) == 1:
            kind, sparse = stack.kinds[0]
            block: nn.Module = Block(**common, kind=kind, sparse=sparse, parent=None)
            state["depth"] = depth[i, 0]
        else:
            make_block = functools.partial(Block, **common)
            block = SuperBlock(make_block=make_block, kinds=stack.kinds, parent=None)
            places = range(len(stack.kinds))
            state = {str(j): {**state.get(str(j), {}), "depth": depth[i, j]} for j in places}
        made: Any = block.apply({"params": params}, x_BLD, inputs, state)
        x_BLD, new_state = made
        new_states.append(new_state)
    return x_BLD, tuple(new_states)


def _one_layer(
    block: nn.Module, params: Any, x_BLD: jax.Array, inputs: Inputs, state: dict[str, Any], key: jax.Array | None
) -> tuple[jax.Array, jax.Array, Any]:
    """A block as a pure function: the residual stream, the sum of what it sows into "losses", what it sows into "routing"."""
    rngs = {} if key is None else {"dropout": key}
    made, sown = block.apply({"params": params}, x_BLD, inputs, state, rngs=rngs, mutable=["losses", "routing"])
    losses = jax.tree.leaves(sown.get("losses", {}))
    return made[0], sum(map(jnp.sum, losses), start=jnp.zeros((), jnp.float32)), sown.get("routing", {})
