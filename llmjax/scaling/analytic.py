"""Plans on paper: memory, bytes sent and time of a step by formula, for GPUs and to rank the settings of a search.

The state is exact, because its shapes and placements are those of the run. Activations are those that each
rematerialisation policy keeps (Chen et al. 2016, Korthikanti et al. 2022). Collectives are those that each axis needs
(Rajbhandari et al. 2020, Shoeybi et al. 2019). `benchmarks/plans.py` compares these numbers with the TPU compiler's.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from flax import traverse_util
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from llmjax import config
from llmjax.config.model_checks import ATTENTION
from llmjax.data.ramp import Stage
from llmjax.model import adapters, blockwise
from llmjax.model.block import REMAT_NAMES
from llmjax.model.count import active_matrices, flops_per_token, param_count, parameter_shapes
from llmjax.model.layers import GATED, mlp_width
from llmjax.model.moe import expert_width
from llmjax.model.stacks import layer_slots, layer_stacks
from llmjax.parallel import pipeline
from llmjax.parallel.mesh import ROWS
from llmjax.scaling import compiler
from llmjax.scaling.topology import Topology
from llmjax.train.frozen import combine, is_trained
from llmjax.train.step import trained_dtype

NEVER_HOLD_SCORES = ("splash", "cudnn")  # attention kernels that never hold all scores
BYTES = {"float32": 4, "bfloat16": 2}
EXPERTS = "/moe/"  # in the paths of experts, whose grouped products have no names
WITHOUT_LOGITS = ("reward", "classify")  # objectives that read a head of their own


@dataclass(frozen=True)
class Flow:
    """The bytes that one device sends along an axis in a step, for one reason."""

    kind: str
    axes: tuple[str, ...]
    bytes: float  # sent by each device
    hidden: bool  # may run beside products, so that only the time beyond theirs is exposed
    why: str


@dataclass
class Paper:
    """A step of one device, by formula."""

    memory: dict[str, float]  # parts in bytes, and "peak"
    flows: list[Flow]
    flops: float  # executed
    bubble: float  # share of the time that a pipeline stage waits
    seconds: dict[str, float] = field(default_factory=dict)  # compute, update, exposed, step


@dataclass(frozen=True)
class Sizes:
    """Sizes of the work of one device at a time."""

    tokens: float  # of a micro-batch
    length: float  # tokens of its part of a sequence
    layers: float  # of its stage
    attending: float  # layers with attention among these
    stream: float  # bytes of the residual stream of those tokens
    inner: float  # bytes inside a layer: queries, keys, values, features
    query: float  # of these, bytes of the queries, and of what attention returns
    keys: float  # of these, bytes of keys and values
    experts: float  # of these, bytes of rows at the experts; no policy keeps their grouped products
    outer: float  # bytes of the result of a branch, which is not divided over tensor
    scores: float  # bytes of one float32 array of attention scores
    update: float  # bytes of the features of the active experts or the MLP


def sizes_of(c: ConfigDict, mesh: Mapping[str, int], stage: Stage) -> Sizes:
    """The `Sizes` of a config on a mesh."""
    m, act = c.model, BYTES[c.model.dtype]
    rows = stage.rows / stage.micro_batches / math.prod(mesh[axis] for axis in ROWS)
    length = c.train.sequence_length / mesh["context"]
    tokens, tensor = rows * length, mesh["tensor"]
    count = m.layers + m.encoder_layers
    attending = sum(s.repeats for s in layer_stacks(m) for kind, _ in s.kinds if kind in ATTENTION) + m.encoder_layers
    size = config.head_size(m)
    groups = m.kv_heads or m.heads
    if m.moe.experts:
        width = expert_width(m) * (m.moe.active + m.moe.shared)
        moved = 2 * m.moe.active * m.width  # tokens at their experts, before and after
    else:
        width, moved = mlp_width(m) if m.mlp == "dense" else 0, 0
    gates = 2 if m.activation in GATED else 1
    shared = groups / tensor if groups % tensor == 0 else groups
    heads = m.heads / tensor * size + 2 * shared * size
    return Sizes(
        tokens=tokens,
        length=length,
        layers=count / mesh["pipeline"],
        attending=attending / mesh["pipeline"],
        stream=tokens * m.width * act / (tensor if c.parallel.sequence or c.parallel.features else 1),
        inner=tokens * act * (heads + gates * width / tensor + moved),
        query=tokens * act * m.heads / tensor * size,
        keys=tokens * act * 2 * shared * size,
        experts=tokens * act * (gates * width / tensor + moved) if m.moe.experts else 0.0,
        outer=tokens * m.width * act,
        scores=4 * rows * m.heads / tensor * length * c.train.sequence_length,
        update=tokens * act * width / tensor,
    )


def memory(c: ConfigDict, mesh: AbstractMesh, stage: Stage) -> dict[str, float]:
    """Bytes of one device by purpose, and their sum ("peak")."""
    m, act = c.model, BYTES[c.model.dtype]
    state = compiler.abstract_state(c, mesh)
    found = compiler.state_bytes(state)
    trained = found["parameters"]
    s, shape = sizes_of(c, mesh.shape, stage), mesh.shape
    stored = BYTES[trained_dtype(c)]
    divided = trained / (shape["fsdp"] if c.parallel.zero != 3 else 1)
    gradients = (trained if c.parallel.zero != 2 else divided) * BYTES["float32"] / stored
    found["gradients"] = gradients * (2 if stage.micro_batches > 1 else 1)  # the sum so far, and the new ones
    # The compiler casts the whole stack before the loop over layers, and gathers each layer just before its use.
    found["cast parameters"] = (trained * act / stored if act < stored else 0.0) + _cast_frozen(c, found["frozen"])
    gathers = shape["fsdp"] > 1 and c.parallel.zero == 3
    layer_bytes = numbers(combine(state.params, state.frozen)) * act / max(len(layer_slots(m)) / shape["pipeline"], 1)
    unpacked = m.adapter.base_format != "stored"  # kernels in few bits become whole before their use
    found["gathered parameters"] = 2 * layer_bytes * (shape["fsdp"] if gathers else 1) * (gathers or unpacked)
    kept, at_once = _activations(c, s)
    if shape["pipeline"] > 1:
        at_once /= _parts(c, shape, stage)
    found["activations kept"] = kept * s.layers
    found["activations of a layer"] = at_once
    chunks = c.objective.loss_chunks
    vocabulary = m.vocab_size / (shape["tensor"] * shape["pipeline"])
    # float32: logits and their gradient
    found["logits"] = 0.0 if c.objective.name in WITHOUT_LOGITS else 2 * 4 * s.tokens * vocabulary / chunks
    found["peak"] = sum(found.values())
    return found


def numbers(params: Any) -> float:
    """Numbers of a tree of parameters on one device, however few bits they are kept in."""
    found = 0.0
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        if not path.endswith(f"/{blockwise.SCALE}"):
            each = 2 if leaf.dtype == "uint8" else 1  # nf4 has two codes in a byte
            found += each * math.prod(leaf.sharding.shard_shape(leaf.shape))
    return found


def _cast_frozen(c: ConfigDict, frozen: float) -> float:
    """Bytes of the frozen parameters in the type of products, if that is another one."""
    act, stored = BYTES[c.model.dtype], BYTES[c.model.param_dtype]
    return frozen * act / stored if act < stored and c.model.adapter.base_format == "stored" else 0.0


def _activations(c: ConfigDict, s: Sizes) -> tuple[float, float]:
    """(bytes that each layer keeps for its backward pass, bytes of the layer that is computed)."""
    flash = c.model.attention in NEVER_HOLD_SCORES
    act = BYTES[c.model.dtype]
    # Beside the results of products: those of norms, rotations, attention and activation.
    everything = 2 * (s.inner + s.outer + s.stream) + s.update
    attention = 0.0 if flash else s.scores * (1 + act / 4)  # scores, and the weights in the type of the products
    products = s.stream + s.inner - s.experts + s.outer
    kept = {
        "none": s.stream + everything + attention,
        "selective": products,
        "minimal_with_context": products + s.query,
        "full": s.stream,
    }
    # Of a sum's last term ("down") the backward pass needs nothing.
    sizes = {"query": s.query, "key": s.keys / 2, "value": s.keys / 2, "context": s.query, "out": s.outer, "down": 0.0}
    kept |= {name: s.stream + sum(sizes[one] for one in names) for name, names in REMAT_NAMES.items()}
    mine = kept[c.model.remat]
    backward = everything + (0.0 if flash else 2 * attention)  # the layer again, and gradients
    return mine, backward + (attention if c.model.remat != "none" else 0.0)


def _parts(c: ConfigDict, mesh: Mapping[str, int], stage: Stage) -> int:
    rows = stage.rows // stage.micro_batches // math.prod(mesh[axis] for axis in ROWS)
    return pipeline.parts(c, stages=mesh["pipeline"], rows=rows)


def parameter_count(c: ConfigDict) -> int:
    """Numbers of the model with its adapters, however few bits they are kept in."""
    return param_count(adapters.plain(c.model)) + _adapter_numbers(c.model)


def _adapter_numbers(model: ConfigDict) -> int:
    shapes = parameter_shapes(model) if model.adapter.kind != "none" else {}
    return sum(math.prod(shape) for path, shape in shapes.items() if adapters.is_adapter(path))


class Flops(NamedTuple):
    """FLOPs of a token."""

    model: float  # forward and backward
    products: float  # of these, those of the forward pass with parameters, without the head
    attention: float  # of the forward pass
    head: float  # of the forward pass

    @property
    def forward(self) -> float:
        return self.products + self.attention + self.head


_COSTS: dict[str, Flops] = {}


def token_flops(c: ConfigDict) -> Flops:
    """The FLOPs of a token in training. A frozen matrix costs 4 a number: it has no gradient of its own."""
    o = c.optimizer
    key = json.dumps([compiler.shapes_key(c.model), c.train.sequence_length, c.objective.name, o.train, o.freeze])
    if key not in _COSTS:
        plain, trained = adapters.plain(c.model), is_trained(c)
        matrices = active_matrices(plain)
        attention = flops_per_token(plain, sequence_length=c.train.sequence_length) - 6.0 * matrices
        head = float(plain.vocab_size * (plain.embedding_width or plain.width))
        matrices -= head
        frozen = active_matrices(plain, chosen=lambda path: not trained(path))
        own = _adapter_numbers(c.model)
        if c.objective.name in WITHOUT_LOGITS:
            frozen -= 0.0 if trained("embedding" if plain.tie_embeddings else "head/kernel") else head
            head = 0.0
        model = 6.0 * (matrices + head + own) - 2.0 * frozen + attention
        _COSTS[key] = Flops(model, 2.0 * (matrices + own), attention / 3, 2.0 * head)
    return _COSTS[key]


def is_layer(path: str) -> bool:
    """Whether a parameter belongs to a layer, and not to the embeddings or the head."""
    return re.match(r"(encoder/)?(first|layers|last)/", path) is not None


def recomputed(c: ConfigDict) -> float:
    """FLOPs that the backward pass computes again, as a share of the model's."""
    flops, remat, kept = token_flops(c), c.model.remat, REMAT_NAMES.get(c.model.remat)
    if remat == "none":
        return 0.0
    again = flops.products if remat == "full" else 0.0
    if kept is not None:
        again = 2.0 * active_matrices(
            adapters.plain(c.model),
            chosen=lambda path: is_layer(path) and (EXPERTS in path or path.split("/")[-2] not in kept),
        )
    with_context = remat == "minimal_with_context" or "context" in (kept or ())
    attention = 0.0 if with_context and c.model.attention in NEVER_HOLD_SCORES else flops.attention
    return (again + attention) / flops.model


def flows(c: ConfigDict, mesh: AbstractMesh, stage: Stage) -> list[Flow]:
    """The bytes that one device sends in a step, by reason."""
    m, act, shape, turns = c.model, BYTES[c.model.dtype], mesh.shape, stage.micro_batches
    s = sizes_of(c, shape, stage)
    held = compiler.state_bytes(compiler.abstract_state(c, mesh))
    mine = held["parameters"] / BYTES[trained_dtype(c)]  # numbers
    read = mine * act + (_cast_frozen(c, held["frozen"]) or held["frozen"])  # bytes of the parameters that are gathered
    found = []

    def ring(axis: str) -> float:
        return (shape[axis] - 1) / shape[axis]

    # A pipeline stage gathers the parameters of a layer for every part of the micro-batch.
    uses = turns * (_parts(c, shape, stage) * c.parallel.rounds if shape["pipeline"] > 1 else 1)
    if (n := shape["fsdp"]) > 1:
        if c.parallel.zero == 3:
            found.append(Flow("all-gather", ("fsdp",), 2 * read * n * ring("fsdp") * uses, True,
                              "parameters, forward and backward"))  # fmt: skip
            found.append(Flow("reduce-scatter", ("fsdp",), mine * n * act * ring("fsdp") * uses, True, "gradients"))
        else:
            found.append(Flow("all-reduce", ("fsdp",), 2 * mine * 4 * ring("fsdp") * (1 if c.parallel.zero == 1 else turns),
                              True, "gradients"))  # fmt: skip
            found.append(Flow("all-gather", ("fsdp",), mine * 4 * ring("fsdp"), False, "updated parameters"))
    if shape["data"] > 1:
        found.append(Flow("all-reduce", ("data",), 2 * mine * 4 * ring("data"), True, "gradients"))
    stream = s.tokens * m.width * act
    if shape["tensor"] > 1:
        times = (1 if m.block == "parallel" else 2) * (3 if m.remat == "full" else 2)
        found.append(
            Flow(
                "all-reduce", ("tensor",), 2 * times * stream * ring("tensor") * s.layers * turns, False, "activations"
            )
        )
    if shape["context"] > 1:
        groups = (m.kv_heads or m.heads) * config.head_size(m) * 2
        keys = s.tokens * shape["context"] * groups * act / shape["tensor"]
        found.append(
            Flow("all-gather", ("context",), 3 * keys * ring("context") * s.attending * turns, False, "keys and values")
        )
    if shape["expert"] > 1 and m.moe.experts:
        found.append(
            Flow(
                "all-to-all",
                ("expert",),
                6 * m.moe.active * stream * ring("expert") * s.layers * turns,
                False,
                "tokens",
            )
        )
    if shape["pipeline"] > 1:
        crossings = c.parallel.rounds * 2 * turns
        found.append(Flow("collective-permute", ("pipeline",), crossings * stream, True, "activations between stages"))
    return found


def link_speed(topology: Topology, mesh: Mapping[str, int], axes: tuple[str, ...]) -> float:
    """Bytes/s that one device sends along an axis. Neighbours along the last axes are closest.

    Between nodes or slices, the members of a group in one node share the network of the node.
    """
    chip = topology.chip
    names = list(mesh)
    apart = math.prod(mesh[name] for name in names[names.index(axes[0]) + 1 :])  # distance of neighbours along the axis
    joined = chip.node if chip.node else topology.devices // topology.slices
    fast = (
        chip.link if chip.node else 2 * chip.link
    ) / chip.devices  # a switch, or a ring along a dimension of a torus
    if apart * mesh[axes[0]] <= joined:
        return fast
    return min(fast, chip.network / chip.devices * max(1, joined // apart))


def _elementwise(c: ConfigDict, mesh: Mapping[str, int], stage: Stage) -> float:
    """An estimate of bytes to and from HBM in a step beside the products. In a pass over a layer, norms and sums read and
    write the stream eight times, and the arrays inside twice. The loss reads and writes its float32 logits six times."""
    s = sizes_of(c, mesh, stage)
    passes = 4 if c.model.remat == "full" else 3  # forward, backward for inputs, backward for weights, recomputation
    logits = 6 * 4 * s.tokens * c.model.vocab_size / (mesh["tensor"] * mesh["pipeline"])
    return stage.micro_batches * (passes * s.layers * (8 * s.stream + 2 * s.inner) + logits)


def plan(c: ConfigDict, topology: Topology, stage: Stage) -> Paper:
    """Memory, bytes and seconds of a step by formula.

    Gradients and gathered parameters travel beside products, and only the time beyond theirs is exposed. Activations are
    waited for. Products run at the peak, the rest at the bandwidth of HBM, so the time is a lower bound.

    Raises UserError for a mesh that does not fit the devices, the model or the batch.
    """
    mesh = compiler.abstract_mesh(c, devices=topology.devices)
    compiler.check_rows(c, stage, dict(mesh.shape))
    chip, shape = topology.chip, mesh.shape
    held = memory(c, mesh, stage)
    sent = flows(c, mesh, stage)
    tokens = stage.rows * c.train.sequence_length
    model = token_flops(c).model * tokens / topology.devices
    flops = model * (1 + recomputed(c))
    idle = 0.0
    if shape["pipeline"] > 1:
        idle = pipeline.bubble(stages=shape["pipeline"], parts=_parts(c, shape, stage), rounds=c.parallel.rounds)
    compute = flops / (chip.flops / chip.devices)
    elementwise = _elementwise(c, shape, stage) / (chip.bandwidth / chip.devices)
    update = 2 * (held["parameters"] + held["optimizer"]) / (chip.bandwidth / chip.devices)
    hidden: dict[tuple[str, ...], float] = {}
    waited = 0.0
    for flow in sent:
        took = flow.bytes / link_speed(topology, shape, flow.axes)
        if flow.hidden:
            hidden[flow.axes] = hidden.get(flow.axes, 0.0) + took
        else:
            waited += took
    exposed = waited + max(0.0, max(hidden.values(), default=0.0) - compute)
    step = (compute + elementwise) / (1 - idle) + update + exposed
    seconds = {"compute": compute, "elementwise": elementwise, "update": update, "exposed": exposed, "step": step}
    return Paper(held, sent, flops, idle, seconds)
