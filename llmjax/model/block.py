"""A block of the network, and the stacks of blocks: equal ones share a scan over a leading layer dimension."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from ml_collections import ConfigDict

from llmjax.config.model_checks import ATTENTION
from llmjax.model import layers, recurrent, two_stream
from llmjax.model.attention import Attend, Attention
from llmjax.model.init import residual_scale
from llmjax.model.layers import MLP, Norm, constrain
from llmjax.model.moe import MoE
from llmjax.model.parametrization import branch_scale
from llmjax.model.stacks import Kind, Stack, layer_stacks
from llmjax.model.views import View


@struct.dataclass
class Inputs:
    """What every block reads beside the residual stream."""

    views: dict[str, View]  # by kind of attention
    valid_BL: jax.Array  # bool, false for padding
    reset_BL: jax.Array  # bool, the first token of a document
    starts_B: jax.Array | None = None  # slot of the cache for each row's first token
    encoded_BMD: jax.Array | None = None  # the encoder's output
    cross_view: View | None = None
    content: int | None = struct.field(
        pytree_node=False, default=None
    )  # only so many first tokens are keys (two_stream.py)


# A layer (or a repetition of a pattern) as a pure function: (its parameters, x_BLD, inputs, its state, random key or None) ->
# (x_BLD, its new state, what it sows: "losses", their sum, and "routing", a tree).
Layer = Callable[
    [Any, jax.Array, Inputs, dict[str, Any], jax.Array | None], tuple[jax.Array, dict[str, Any], dict[str, Any]]
]
# Another way than a scan to run the layers of a stack: (stack, layer, parameters and state with the layers in front or in
# the runner's own form) -> what `Layer` returns, of all layers; None: the stack is left to the scan.
RunLayers = Callable[
    [Stack, Layer, Any, jax.Array, Inputs, dict[str, Any], jax.Array | None],
    tuple[jax.Array, dict[str, Any], dict[str, Any]] | None,
]


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
    attend: Attend | None = None  # see `Attention`

    @nn.compact
    def __call__(self, x_BLD: jax.Array, inputs: Inputs, state: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        c, before_BLD = self.c, x_BLD
        new_state: dict[str, Any] = {}
        name = "attention" if self.kind in ATTENTION else "recurrent"
        mix = functools.partial(self._mix, inputs=inputs, state=state, new_state=new_state)
        if c.block == "parallel":
            norm = self._norm(f"{name}_norm")
            h_BLD = norm(x_BLD, inputs.valid_BL)
            y_BLD = self._output(mix(h_BLD, norm), state)
            if c.mlp != "none":
                if not c.shared_norm:
                    h_BLD = self._norm("mlp_norm")(x_BLD, inputs.valid_BL)
                y_BLD = y_BLD + self._output(self._feed_forward(h_BLD, inputs), state)
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
            new_state["memory"] = two_stream.remember(state["memory"], before_BLD[:, : inputs.content])
        return x_BLD, new_state

    def _branch(
        self,
        x_BLD: jax.Array,
        name: str,
        branch: Callable[[jax.Array, Norm], jax.Array],
        inputs: Inputs,
        state: dict[str, Any],
    ) -> jax.Array:
        """Pre: x + f(norm(x)). Post: norm(x + f(x)). Sandwich: x + norm(f(norm(x))). After: x + norm(f(x))."""
        place, norm = self.c.norm_place, self._norm(f"{name}_norm")
        y_BLD = branch(x_BLD if place in ("post", "after") else norm(x_BLD, inputs.valid_BL), norm)
        if place in ("sandwich", "after"):
            after = norm if place == "after" else self._norm(f"{name}_post_norm")
            y_BLD = after(y_BLD, inputs.valid_BL)
        x_BLD = self._residual(x_BLD) + self._output(y_BLD, state)
        return constrain(norm(x_BLD, inputs.valid_BL) if place == "post" else x_BLD, "BLD")

    def _mix(
        self,
        h_BLD: jax.Array,
        norm: Norm,
        *,
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
        keys_BMD = None if inputs.content is None else h_BLD[:, : inputs.content]
        if "memory" in state:
            memory_BMD = state["memory"] if c.norm_place in ("post", "after") else norm(state["memory"])
            keys_BMD = jnp.concatenate([memory_BMD, h_BLD if keys_BMD is None else keys_BMD], axis=1)
        y_BLD, new_cache = Attention(c, self.deterministic, attend=self.attend, name="attention")(
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
        y_BLD, cache = Attention(self.c, self.deterministic, cross=True, attend=self.attend, name="cross")(
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

    def _output(self, y_BLD: jax.Array, state: dict[str, Any]) -> jax.Array:
        """What a branch adds to the residual stream: scaled, with dropout."""
        scale = branch_scale(self.c)
        if scale != 1:
            y_BLD = y_BLD * jnp.asarray(scale, y_BLD.dtype)
        if self.deterministic or not self.c.dropout:
            return y_BLD
        return layers.drop(y_BLD, self._rate(self.c.dropout, state), self.make_rng("dropout"))


# What a layer keeps for its backward pass beside its input: names of `Linear`s, and "context", which attention returns. The
# policies have MaxText's names, whose "minimal" is "selective": all products with parameters.
REMAT_NAMES = {
    "save_qkv_proj": ("query", "key", "value"),
    "save_out_proj": ("out",),
    "save_dot_except_mlp": ("query", "key", "value", "out"),
    "save_dot_with_context_except_mlp": ("query", "key", "value", "context", "out"),
    "save_dot_except_mlpwi": ("query", "key", "value", "out", "down"),
}
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "selective": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "minimal_with_context": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names("context"),
    ),
    **{name: jax.checkpoint_policies.save_only_these_names(*kept) for name, kept in REMAT_NAMES.items()},
}


class SuperBlock(nn.Module):
    """Blocks of several kinds, one after another: the body of the scan over a pattern that has more than one kind."""

    make_block: Callable[..., nn.Module]
    kinds: tuple[Kind, ...]

    @nn.compact
    def __call__(self, x_BLD: jax.Array, inputs: Inputs, state: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        new_state: dict[str, dict[str, Any]] = {}
        for place, (kind, sparse) in enumerate(self.kinds):
            block = self.make_block(kind=kind, sparse=sparse, name=str(place))
            x_BLD, made = block(x_BLD, inputs, {name: tree[str(place)] for name, tree in state.items()})
            for name, tree in made.items():
                new_state.setdefault(name, {})[str(place)] = tree
        return x_BLD, new_state


def run_stacks(
    module: nn.Module,
    x_BLD: jax.Array,
    inputs: Inputs,
    states: dict[str, Any],
    *,
    deterministic: bool,
    encoder: bool = False,
) -> tuple[jax.Array, dict[str, Any]]:
    """All blocks, to be called inside a compact method of `module`, which gets their parameters.

    Each stack is scanned, unless `module.run_layers` takes it (see `RunLayers`).

    Args:
        states: what layers carry from call to call, "cache", "memory" or nothing: trees as `stacks.per_layer` makes them.

    Returns:
        The residual stream and the new states.
    """
    c: ConfigDict = module.c
    fields = {"c": c, "deterministic": deterministic, "attend": module.attend}
    fields |= {"cross": c.encoder_layers > 0 and not encoder, "encoder": encoder}
    rematerialised = Block if c.remat == "none" else nn.remat(Block, policy=REMAT_POLICIES[c.remat], prevent_cse=False)
    new_states: dict[str, Any] = {name: {} for name in states}
    for stack in layer_stacks(c, encoder=encoder):
        state = {name: tree[stack.name] for name, tree in states.items()}
        state["depth"] = _depths(stack, c.encoder_layers if encoder else c.layers)
        made = None
        if module.run_layers is not None and not module.is_initializing():
            block, settings = _body(stack, Block, fields)
            layer = functools.partial(_one_layer, block(**settings, parent=None))
            key = None if deterministic else module.make_rng("dropout")
            params = module.variables["params"][stack.name]
            made = module.run_layers(stack, layer, params, x_BLD, inputs, state, key)
        if made is None:
            block, settings = _body(stack, rematerialised, fields)
            scanned = nn.scan(
                block,
                variable_axes={"params": 0, "losses": 0, "routing": 0, "intermediates": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, 0),
                out_axes=0,
                length=stack.repeats,
                unroll=min(c.scan_unroll, stack.repeats),
            )
            x_BLD, new_state = scanned(**settings, name=stack.name)(x_BLD, inputs, state)
        else:
            x_BLD, new_state, sown = made
            for name, value in sown.items():
                module.sow(name, stack.name, value)
        for name, tree in new_state.items():
            new_states[name][stack.name] = tree
    return x_BLD, new_states


def _body(stack: Stack, block: type[nn.Module], fields: dict[str, Any]) -> tuple[type[nn.Module], dict[str, Any]]:
    """The module that a stack repeats, as a class and its fields."""
    if len(stack.kinds) > 1:
        return SuperBlock, {"make_block": functools.partial(block, **fields), "kinds": stack.kinds}
    kind, sparse = stack.kinds[0]
    return block, {**fields, "kind": kind, "sparse": sparse}


def _depths(stack: Stack, layers: int) -> Any:
    """How deep each layer of a stack is, in [0, 1]: (repeats,) float32, by place if the pattern has several kinds."""
    places = len(stack.kinds)
    depth_RP = stack.start + jnp.arange(stack.repeats * places, dtype=jnp.float32).reshape(stack.repeats, places)
    depth_RP = depth_RP / max(layers - 1, 1)
    return {str(i): depth_RP[:, i] for i in range(places)} if places > 1 else depth_RP[:, 0]


def _one_layer(
    block: nn.Module, params: Any, x_BLD: jax.Array, inputs: Inputs, state: dict[str, Any], key: jax.Array | None
) -> tuple[jax.Array, dict[str, Any], dict[str, Any]]:
    """A `Layer`: a block as a pure function."""
    rngs = {} if key is None else {"dropout": key}
    made, sown = block.apply({"params": params}, x_BLD, inputs, state, rngs=rngs, mutable=["losses", "routing"])
    losses = sum(map(jnp.sum, jax.tree.leaves(sown.get("losses", {}))), start=jnp.zeros((), jnp.float32))
    return *made, {"losses": losses, "routing": sown.get("routing", {})}
