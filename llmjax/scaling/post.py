"""Plans on paper of post-training: an update, and what stands beside it on the same devices.

A policy is sampled by an engine on the training's mesh. The engine has a copy of the weights in the layout of decoding
and a cache for `rollout.slots` texts, and both stay while the policy is updated. A step of decoding reads all weights and
the whole cache, so the bandwidth of memory decides. Weights that are divided over fsdp or pipeline are gathered at every
step. Before the updates of a round the trainer reads all texts once, and the reference too, where there is one. A teacher
reads every batch.

Texts are counted at their longest: a prompt and `rollout.tokens` fill a row of `train.sequence_length`. Rewards and tools
run elsewhere and are not counted. Log-probabilities of given answers by a reference are made once, before the first step.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from flax import traverse_util
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from llmjax import config
from llmjax.data.ramp import Stage
from llmjax.infer import slots
from llmjax.infer.prefixes import ALIGN
from llmjax.model.transformer import build
from llmjax.parallel.mesh import row_ways
from llmjax.post.reference import abstract_params
from llmjax.scaling import analytic, compiler
from llmjax.scaling.analytic import BYTES, Paper
from llmjax.scaling.topology import Topology
from llmjax.train import folders
from llmjax.train.frozen import divide, is_trained

STEP_PARTS = (  # of the memory of an update, which are free while texts are sampled
    "gradients", "cast parameters", "gathered parameters", "activations kept", "activations of a layer", "logits",
)  # fmt: skip


@dataclass(frozen=True)
class Decoding:
    """An engine on one device."""

    texts: int  # slots of all devices
    weights: float  # bytes
    cache: float  # bytes of all its slots, with the settings of each
    numbers: float  # of the weights that a step reads
    spread: int  # devices over which these are divided that have other rows


def plan(c: ConfigDict, topology: Topology, stage: Stage) -> Paper:
    """Memory, bytes and seconds of an update by formula, with its share of a round; see `analytic.plan`.

    Raises UserError as that does, and for a teacher that is not there.
    """
    paper = analytic.plan(c, topology, stage)
    mesh = compiler.abstract_mesh(c, devices=topology.devices)
    found = dict(paper.memory)
    found.pop("peak")
    if with_reference(c):
        own, _ = divide(abstract_params(c, build(c.model), mesh), is_trained(c))  # type: ignore[arg-type]
        found["reference"] = compiler.shard_bytes(own)
    theirs = teacher_of(c)
    if theirs is not None:
        found["teacher"] = compiler.shard_bytes(abstract_params(theirs, build(theirs.model), mesh))  # type: ignore[arg-type]
    seconds = dict(paper.seconds)
    step = seconds.pop("step")
    forward = _forward_seconds(c, theirs, topology, stage)
    if forward:
        seconds["forward"] = forward
    if samples(c) or c.eval.texts:
        engine = decoding(c, mesh)
        found["engine's weights"], found["engine's cache"] = engine.weights, engine.cache
        in_update = sum(found[name] for name in STEP_PARTS)
        found["rollouts beyond an update"] = max(0.0, _while_sampling(c, mesh, engine) - in_update)
    if samples(c):
        seconds["rollouts"] = _rollout_seconds(c, topology, mesh, engine, stage)
    seconds["step"] = step + forward + seconds.get("rollouts", 0.0)
    return replace(paper, memory=found | {"peak": sum(found.values())}, seconds=seconds)


def samples(c: ConfigDict) -> float:
    """The share of the batches that are sampled."""
    if c.objective.name == "policy":
        return 1.0
    return float(c.objective.distill.on_policy) if c.objective.name == "distill" else 0.0


def with_reference(c: ConfigDict) -> bool:
    """Whether there is a model that the policy is compared with; what is frozen the two share."""
    return c.objective.name == "policy" and bool(
        c.rollout.kl_weight or c.rollout.kl_target or c.objective.policy.kl_weight
    )


def teacher_of(c: ConfigDict) -> ConfigDict | None:
    """The config with the model of the teacher; None: there is none. Raises UserError for one that is not there."""
    if c.objective.name != "distill":
        return None
    meta = folders.read_meta(folders.newest(Path(c.objective.distill.teacher)))
    theirs = c.copy_and_resolve_references()
    with theirs.unlocked():
        theirs.train.init_from = c.objective.distill.teacher
        theirs.model = config.from_json(json.dumps(meta["config"])).model
        theirs.model.vocab_size = theirs.model.vocab_size or c.model.vocab_size
    return theirs


def decoding(c: ConfigDict, mesh: AbstractMesh) -> Decoding:
    """The engine of a config, with room for the longest texts."""
    module, ways = build(c.model), row_ways(mesh)  # type: ignore[arg-type]
    count = -(-c.rollout.slots // ways) * ways
    longest = c.train.sequence_length if samples(c) else c.model.max_length
    length = -(-longest // ALIGN) * ALIGN
    empty = jax.eval_shape(lambda: slots.empty((module,), count=count, length=length))
    places = slots.shardings(empty, mesh)  # type: ignore[arg-type]
    params = abstract_params(c, module, mesh)  # type: ignore[arg-type]
    read = params if c.model.tie_embeddings else {name: tree for name, tree in params.items() if name != "embedding"}
    return Decoding(
        texts=count,
        weights=_weights(c, params),
        cache=float(
            sum(
                math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
                for leaf, place in zip(jax.tree.leaves(empty), jax.tree.leaves(places), strict=True)
            )
        ),
        numbers=analytic.numbers(read),
        spread=(mesh.shape["fsdp"] if c.parallel.zero == 3 else 1) * mesh.shape["pipeline"],
    )


def _weights(c: ConfigDict, params: Any) -> float:
    """Bytes of the weights as the engine keeps them (`infer.weights`)."""
    found = 0.0
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        whole = compiler.shard_bytes(leaf)
        bytes_each = 1 if c.infer.weights == "int8" and path.endswith("/kernel") else leaf.dtype.itemsize
        found += whole / leaf.dtype.itemsize * bytes_each
    return found


def _while_sampling(c: ConfigDict, mesh: AbstractMesh, engine: Decoding) -> float:
    """Bytes of one device that come and go: weights in the type of products, two layers gathered, logits of the slots."""
    act, rows = BYTES[c.model.dtype], engine.texts / row_ways(mesh)  # type: ignore[arg-type]
    cast = engine.numbers * act if engine.weights > engine.numbers * act else 0.0
    gathered = 2 * engine.numbers * engine.spread * act / c.model.layers if engine.spread > 1 else 0.0
    return cast + gathered + 2 * 4 * rows * c.model.vocab_size


def _forward_seconds(c: ConfigDict, theirs: ConfigDict | None, topology: Topology, stage: Stage) -> float:
    """Seconds of the forward passes beside an update: of the trainer, the reference or the teacher."""
    tokens = stage.rows * c.train.sequence_length / topology.devices
    speed = topology.chip.flops / topology.chip.devices
    flops = analytic.token_flops(theirs).forward if theirs is not None else 0.0
    if c.objective.name == "policy":
        flops = analytic.token_flops(c).forward * (2 if with_reference(c) else 1)
    return flops * tokens / speed


def decode_seconds(c: ConfigDict, topology: Topology, mesh: AbstractMesh, engine: Decoding) -> float:
    """Seconds of a step of decoding, in which each slot gets a token."""
    chip, act, shape = topology.chip, BYTES[c.model.dtype], mesh.shape
    bandwidth = chip.bandwidth / chip.devices
    whole = engine.numbers * engine.spread  # of the weights that one device multiplies with
    stored = min(act, engine.weights / max(engine.numbers, 1.0))
    read = (whole * stored + engine.cache) / bandwidth
    products = analytic.token_flops(c).forward * engine.texts / topology.devices / (chip.flops / chip.devices)
    gathers = 0.0
    if engine.spread > 1:
        axis = ("fsdp",) if shape["fsdp"] > 1 and c.parallel.zero == 3 else ("pipeline",)
        gathers = whole * stored * (1 - 1 / engine.spread) / analytic.link_speed(topology, shape, axis)
    sums = 0.0
    if (n := shape["tensor"]) > 1:
        stream = engine.texts / row_ways(mesh) * c.model.width * act  # type: ignore[arg-type]
        sent = 2 * (1 if c.model.block == "parallel" else 2) * stream * (n - 1) / n * c.model.layers
        sums = sent / analytic.link_speed(topology, shape, ("tensor",))
    return max(read, products, gathers) + sums


def _rollout_seconds(c: ConfigDict, topology: Topology, mesh: AbstractMesh, engine: Decoding, stage: Stage) -> float:
    """An update's share of the seconds in which a round's prompts are read and its answers written."""
    r, chip = c.rollout, topology.chip
    policy = c.objective.name == "policy"
    updates, each = (r.updates, r.samples) if policy else (1, 1)
    texts = updates * stage.rows
    steps = -(-texts // engine.texts) * r.tokens
    prompts = texts / each * max(c.train.sequence_length - r.tokens, 0)
    reading = prompts * analytic.token_flops(c).forward / topology.devices / (chip.flops / chip.devices)
    return samples(c) * (steps * decode_seconds(c, topology, mesh, engine) + reading) / updates
