"""The state of a run and the jitted step that advances it."""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from llmjax.model import routing
from llmjax.model.observed import is_observed
from llmjax.model.transformer import Transformer, init_params
from llmjax.objectives import Objective, chunks, losses
from llmjax.parallel import placement
from llmjax.train import noise
from llmjax.train.frozen import combine, split
from llmjax.train.optimizer import apply_updates, is_matrix

ROUNDING = zlib.crc32(b"rounding")  # what sets the random numbers of rounding apart from those of dropout
Batch = dict[str, jax.Array]


@struct.dataclass
class State:
    """The state of a training. `combine(params, frozen)` are the parameters of the model.

    `step` counts steps, skipped ones included. `ema` is the moving average of `params`; None: off.
    """

    step: Any  # int32 scalar
    params: Any  # trained parameters, in `trained_dtype`
    frozen: Any  # the other parameters; {}: all are trained
    opt_state: Any  # float32, and counts
    ema: Any  # float32
    skipped: Any  # int32 scalar, steps whose gradients or updates were not finite
    bad_in_a_row: Any  # int32 scalar, such steps since the last good one


def trained_dtype(c: ConfigDict) -> str:
    """The type of trained parameters: float32 in a run that starts from the weights of another one.

    Most published models are in bfloat16, which is too coarse for the small steps of fine-tuning. Frozen parameters keep
    `model.param_dtype`, and so does a run from random numbers: `optimizer.apply_updates` rounds its updates at random.
    """
    return "float32" if c.train.init_from else c.model.param_dtype


def init_state(
    module: Transformer, optimizer: optax.GradientTransformation, c: ConfigDict, mesh: Mesh
) -> tuple[Callable[[jax.Array], State], State]:
    """A function that makes the first state on the mesh, and the state's abstract form.

    Returns:
        A jitted function from a random key to the state, which makes each array in its place; and the state as
        ShapeDtypeStructs with shardings, into which a checkpoint is restored.

    The random numbers of a parameter depend on the key alone, so the values are the same bits on any mesh.

    Raises:
        UserError: when nothing is trained (`frozen.split`).
    """

    def init(key: jax.Array) -> State:
        params, frozen = split(init_params(module, key), c)
        if trained_dtype(c) == "float32":
            params = _in_float32(params)
        zero = jnp.zeros((), jnp.int32)
        ema = _in_float32(params) if c.train.ema else None
        return State(
            step=zero,
            params=params,
            frozen=frozen,
            opt_state=optimizer.init(params),
            ema=ema,
            skipped=zero,
            bad_in_a_row=zero,
        )

    shapes = jax.eval_shape(init, jax.random.key(0))
    whole = () if c.parallel.zero == 3 else ("fsdp",)
    shardings = placement.parameter_shardings(shapes.params, mesh, rules=c.parallel.rules, whole=whole)
    divided = placement.parameter_shardings(shapes.params, mesh, rules=c.parallel.rules)
    everywhere = NamedSharding(mesh, PartitionSpec())
    places = State(
        step=everywhere,
        params=shardings,
        frozen=placement.parameter_shardings(shapes.frozen, mesh, rules=c.parallel.rules, whole=whole),
        opt_state=placement.like_parameters(shapes.opt_state, shapes.params, divided, mesh),
        ema=divided if c.train.ema else None,
        skipped=everywhere,
        bad_in_a_row=everywhere,
    )
    abstract = jax.tree.map(
        lambda shape, place: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place), shapes, places
    )
    return jax.jit(init, out_shardings=places), abstract


def batch_shardings(mesh: Mesh) -> NamedSharding:
    """The rows of a batch are divided over the axes data, fsdp and expert."""
    return NamedSharding(mesh, placement.BATCH)


def make_train_step(
    module: nn.Module,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    c: ConfigDict,
    *,
    micro_batches: int = 0,
) -> Callable[[State, Batch, jax.Array], tuple[State, dict[str, jax.Array]]]:
    """The training step, a pure function `(state, batch, key) -> (state, metrics)` to be jitted with the state donated.

    Args:
        objective: the loss, `(module, parameters, batch, key, c.objective) -> Sums`.
        micro_batches: parts that the batch is cut into; 0: as many as `train.micro_batches`.

    The sums of the loss, of its gradient and of the weights over all parts are divided once.

    If the gradient, the update or the new parameters are not finite, parameters, optimizer state and average stay as
    they were, and the step counts as skipped. A batch without weight changes nothing either: no decay, no momentum. In
    both cases the step and the schedule advance.

    Metrics are float32 scalars: the sums of the objective divided by their weights (loss, and auxiliary_loss of sparse
    layers; NaN without weight), `routing.metrics` of sparse layers, objective, grad_norm, param_norm, update_norm,
    learning_rate, skipped, bad_in_a_row, and target_tokens, the sum of the weights; with `train.noise_scale` and
    several parts also gradient_signal and gradient_noise (`noise.estimates`).
    """
    parts = micro_batches or c.train.micro_batches
    gradients = _make_gradients(module, objective, c, parts=parts)

    def step(state: State, batch: Batch, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(key, state.step)
        grads, sums, squares = gradients(state, batch, key)
        weight = jnp.where(sums.weight > 0, sums.weight, 1.0)  # weights may be shares, and their sum below 1
        noisy: dict[str, jax.Array] = {}
        if squares is not None:
            large, rows = jnp.square(optax.tree.norm(_learnt(grads)) / weight), jax.tree.leaves(batch)[0].shape[0]
            signal, spread = noise.estimates(squares / parts, large, rows=rows, parts=parts)
            noisy = {"gradient_signal": signal, "gradient_noise": spread}
        if c.objective.l1 or c.objective.l2:
            terms = jax.grad(penalty)(state.params, c.objective)
            grads = jax.tree.map(lambda g, term: g + weight * term, grads, terms)
        grad_norm = norm(_learnt(grads)) / weight
        scale = jnp.minimum(1.0, c.optimizer.clip_norm / (grad_norm + 1e-6)) if c.optimizer.clip_norm else 1.0

        def moved() -> tuple[Any, tuple[Any, Any, Any]]:
            """The updates, and the new parameters, optimizer state and average."""
            # The mean and the clip in one pass. Observed parameters get means over a micro-batch already.
            means = jax.tree_util.tree_map_with_path(
                lambda path, g: g * (1 / parts if _observed(path) else scale / weight), grads
            )
            updates, opt_state = optimizer.update(means, state.opt_state, state.params)
            params = apply_updates(state.params, updates, jax.random.fold_in(key, ROUNDING))
            ema = None
            if c.train.ema:
                ema = optax.incremental_update(_in_float32(params), state.ema, 1 - c.train.ema)
            return updates, (params, opt_state, ema)

        updates, new = moved()
        update_norm = norm(updates)
        # Finite parameters and updates have finite sums, unless these pass the largest number of their type.
        finite = jnp.isfinite(jnp.stack((grad_norm, sums.objective, update_norm))).all()
        learns = finite & (sums.weight > 0)
        # A skipped step still advances the step count, and with it the schedule: batch k belongs to step k.
        old = (state.params, _counts_of(new[1], state.opt_state), state.ema)
        if c.optimizer.name == "muon" or jax.sharding.get_abstract_mesh().size > 1:
            params, opt_state, ema = jax.tree.map(lambda new, kept: jnp.where(learns, new, kept), new, old)
        else:
            # Computed a second time, each array takes the place of its old one: without this, new parameters and moments
            # wait beside the old ones until the last norm is known. Muon's products are too dear, and no pod was measured.
            params, opt_state, ema = jax.lax.cond(learns, lambda: moved()[1], lambda: old)
        bad = jnp.where(finite, 0, state.bad_in_a_row + 1)
        new_state = State(
            step=state.step + 1,
            params=params,
            frozen=state.frozen,
            opt_state=opt_state,
            ema=ema,
            skipped=state.skipped + (~finite).astype(jnp.int32),
            bad_in_a_row=bad,
        )
        metrics = {
            **{name: mean.total / mean.weight for name, mean in sums.metrics.items()},
            **(routing.metrics(sums.usage) if sums.usage is not None else {}),
            "objective": sums.objective / sums.weight,
            "grad_norm": grad_norm,
            **noisy,
            "param_norm": norm(_in_float32(params)),
            "update_norm": update_norm,
            "learning_rate": c.optimizer.learning_rate * schedule(state.step),
            "target_tokens": sums.weight,
            "skipped": new_state.skipped,
            "bad_in_a_row": bad,
        }
        return new_state, metrics

    return step


def _make_gradients(
    module: nn.Module, objective: Objective, c: ConfigDict, *, parts: int
) -> Callable[[State, Batch, jax.Array], tuple[Any, Any, jax.Array | None]]:
    """`(state, batch, key) -> (gradients, Sums, squares)`, all added up over the parts of the batch, in float32.

    The squares are the squared norms of the parts' mean gradients; None without `train.noise_scale` or with one part.
    Part t of T has the rows t, t + T, ...: each device cuts the rows that it has. A row is what may not be torn apart,
    such as a preference pair.
    """

    measured = c.train.noise_scale and parts > 1
    empty_parts = c.objective.name == "policy" and c.rollout.pack > 1  # post/sharing.py makes them

    def of_part(state: State, batch: Batch, key: jax.Array) -> tuple[Any, Any, jax.Array | None]:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            sums = objective(module, combine(params, state.frozen), batch, key, c.objective)
            return sums.objective, sums

        grads, sums = jax.grad(loss, has_aux=True)(state.params)
        grads, mesh = _in_float32(grads), jax.sharding.get_abstract_mesh()
        if c.parallel.zero == 2 and mesh.axis_names:  # divided, although the parameters are not
            specs = placement.parameter_specs(grads, mesh.shape, rules=c.parallel.rules)
            grads = jax.tree.map(jax.lax.with_sharding_constraint, grads, specs)
        weight = jnp.where(sums.weight > 0, sums.weight, 1.0)
        return grads, sums, jnp.square(optax.tree.norm(_learnt(grads)) / weight) if measured else None

    def of_all(state: State, batch: Batch, key: jax.Array) -> tuple[Any, Any, jax.Array | None]:
        if parts == 1:
            return of_part(state, batch, key)
        cut = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)

        def add(total: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            def added() -> Any:
                return jax.tree.map(jnp.add, total, of_part(state, *part))

            if empty_parts:
                return jax.lax.cond(jnp.any(part[0]["exists"] > 0), added, lambda: total), None
            return added(), None

        like = jax.eval_shape(of_part, state, jax.tree.map(lambda x: x[0], cut), key)
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        return jax.lax.scan(add, zero, (cut, jax.random.split(key, parts)))[0]

    return of_all


def lower_step(
    step: Callable[..., Any], state: State, batch: dict[str, Any], *arguments: Any, mesh: Mesh, c: ConfigDict
) -> jax.stages.Lowered:
    """The step traced for a mesh, to be compiled. The new state takes the memory and the places of the old one.

    Args:
        state, batch: arrays, or ShapeDtypeStructs with shardings.
        arguments: those of the step after the batch, its key first.
        mesh: may be of devices that are not here.
    """
    places = jax.tree.map(lambda x: x.sharding, state)
    with placement.active(mesh, c):
        return jax.jit(step, donate_argnums=0, out_shardings=(places, None)).lower(state, batch, *arguments)


def _in_float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _observed(path: Any) -> bool:
    return is_observed(placement.path_name(path))


def _learnt(grads: Any) -> Any:
    """The gradients of the loss alone, as a list: without those of observed parameters (model/observed.py)."""
    return [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(grads) if not _observed(path)]


def _counts_of(new: Any, old: Any) -> Any:
    """The old optimizer state with the new step counters, so that a skipped step advances the schedule."""
    return jax.tree.map(lambda n, o: n if jnp.issubdtype(o.dtype, jnp.integer) else o, new, old)


def norm(tree: Any) -> jax.Array:
    """The global L2 norm of a tree of float32 arrays."""
    return jnp.sqrt(sum(map(_squares, jax.tree.leaves(tree))))


def _squares(x: jax.Array) -> jax.Array:
    """The sum of the squares. On a CPU the squares of all layers would be an array of their own, and take twice the time."""

    def at_once(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(x))

    if x.ndim < 3 or jax.sharding.get_abstract_mesh().size > 1:
        return at_once(x)
    return jax.lax.platform_dependent(x, cpu=lambda x: jnp.sum(jax.lax.map(at_once, x)), default=at_once)


def penalty(params: Any, c: ConfigDict) -> jax.Array:
    """L1 and L2 terms over the matrices: l1 * sum |p| + l2 / 2 * sum p^2."""
    total = jnp.zeros((), jnp.float32)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if is_matrix(placement.path_name(path)):
            leaf = leaf.astype(jnp.float32)
            total += c.l1 * jnp.sum(jnp.abs(leaf)) + 0.5 * c.l2 * jnp.sum(jnp.square(leaf))
    return total


def make_eval_step(module: nn.Module, c: ConfigDict) -> Callable[[Any, Batch], jax.Array]:
    """A pure function `(params, batch) -> nats_BL`, float32: the weighted nats of every target given what precedes it."""

    def step(params: Any, batch: Batch) -> jax.Array:
        made = losses.predict(module, params, batch, None)
        nats_BL, _ = chunks.token_values(losses.cross_entropy, made, c.objective.loss_chunks)
        return nats_BL * made.weights

    return step


def make_heldout_step(
    module: nn.Module, objective: Objective, c: ConfigDict
) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """A pure function `(params, batch) -> sums` over the objective's predictions: nats, correct, tokens; float32 scalars.

    A prediction is correct if the likeliest token is the target. "tokens" is the sum of the weights.
    """

    def measure(logits_BLV: jax.Array, targets_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
        right_BL = jnp.argmax(logits_BLV, axis=-1) == targets_BL
        return losses.cross_entropy(logits_BLV, targets_BL)[0], right_BL.astype(jnp.float32)

    def step(params: Any, batch: Batch) -> dict[str, jax.Array]:
        made = objective.predict(module, params, batch, None, c.objective)
        nats_BL, correct_BL = chunks.token_values(measure, made, c.objective.loss_chunks)
        return {
            "nats": jnp.sum(nats_BL * made.weights),
            "correct": jnp.sum(correct_BL * made.weights),
            "tokens": jnp.sum(made.weights),
        }

    return step
