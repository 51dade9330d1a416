"""The loss by chunks of tokens equals the plain one, gradients too, on any mesh, and takes less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import few, first_params, make_batch, mesh_of, prepare_steps, tiny_config
from networks import close
from test_objectives_network import CASES, make_rows, setting

from llmjax.model import transformer
from llmjax.model.head import Head
from llmjax.objectives import OBJECTIVES, losses
from llmjax.parallel import placement
from llmjax.train.optimizer import make_optimizer
from llmjax.train.step import batch_shardings, init_state, make_eval_step, make_heldout_step, make_train_step

TOLERANCE = 3e-6  # of the largest number of an array, after the float32 products of a whole network


def both(chunks, make):
    """A config with the loss at once and by chunks."""
    return [make(objective__loss_chunks=n) for n in (1, chunks)]


def head_and_loss(c, dtype="float32"):
    """(sums, gradients for hidden states and head) of random hidden states of two rows of 16 tokens."""
    head = Head(c.model)
    rng = np.random.default_rng(0)
    hidden_BLD = jnp.asarray(rng.normal(size=(4, 16, c.model.width)), dtype)
    params = jax.eval_shape(lambda: head.init(jax.random.key(0), hidden_BLD)["params"])
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype), params)
    targets_BL, weights_BL = rng.integers(0, c.model.vocab_size, (4, 16)), rng.integers(0, 3, (4, 16))

    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def loss(hidden_BLD, params):
        asked = jnp.asarray(targets_BL), jnp.asarray(weights_BL, jnp.float32)
        sums = losses.add_up(losses.Predictions(hidden_BLD, head, params, *asked), c.objective)
        return sums.objective, sums

    return jax.jit(loss)(hidden_BLD, params)[::-1]


@pytest.mark.parametrize(
    "changes",
    [
        {"model__tie_embeddings": False},
        {"objective__label_smoothing": 0.1, "objective__z_loss": 1e-2, "objective__focal": 2.0},
        {"model__logit_soft_cap": 5.0, "model__bias": ("head",), "model__init": "mup", "model__mup_base_width": 16},
        {"model__head_transform": True, "model__embedding_width": 16, "model__norm": "layer", "model__bias": ("norm",)},
    ],
)
def test_loss_and_gradients_by_chunks_equal_the_plain_ones_for_every_kind_of_loss_and_head(changes):
    plain, made = (head_and_loss(c) for c in both(5, functools.partial(tiny_config, **changes)))  # 5 does not divide 16
    close(made, plain, 1e-6)


@pytest.mark.parametrize(
    ("line", "tied"),
    few([("data=2 fsdp=2 tensor=2", True), ("tensor=4", False), ("fsdp=4", False), ("data=2 context=2", True)], 2),
)
def test_loss_and_gradients_by_chunks_are_the_same_on_every_mesh(line, tied):
    plain, c = both(4, functools.partial(tiny_config, model__tie_embeddings=tied))
    with placement.active(mesh_of(line), c):
        made = head_and_loss(c)
    close(made, head_and_loss(plain), 1e-6)


@pytest.mark.slow
def test_a_step_by_chunks_is_the_plain_step_of_one_device():
    after = []
    for mesh, c in zip(("data=1", "fsdp=2 tensor=2"), both(4, tiny_config), strict=True):
        state, _, run = prepare_steps(c, mesh_of(mesh))
        _, values = run(state, make_batch(c, 0))
        after.append([values[name] for name in ("objective", "loss", "grad_norm", "update_norm")])
    close(after[1], after[0], 1e-6)


def test_bfloat16_gradients_by_chunks_are_added_up_in_float32():
    at_once, by_chunks = (
        head_and_loss(c, "bfloat16")[1][1]["embedding"]
        for c in both(16, functools.partial(tiny_config, model__dtype="bfloat16"))
    )
    exact = head_and_loss(tiny_config())[1][1]["embedding"]
    far = [float(jnp.linalg.norm(made - exact) / jnp.linalg.norm(exact)) for made in (at_once, by_chunks)]
    assert far[1] < 1.5 * far[0]


def sums_and_gradients(c, batch):
    """The sums of the objective over a batch, for a model all of whose parameters are random, and its gradient."""
    module = transformer.build(c.model)
    shapes = transformer.param_shapes(module)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype), shapes)
    objective = OBJECTIVES[c.objective.name]

    def loss(params):
        sums = objective(module, params, batch, jax.random.key(2), c.objective)
        return sums.objective, sums

    return jax.jit(jax.grad(loss, has_aux=True))(params)[::-1]


@pytest.mark.slow  # above are the gradients of every kind of loss and head, below the numbers of a whole network
@pytest.mark.parametrize("case", [case for case in CASES if case != "causal"])
def test_every_objective_is_the_same_by_chunks(case):
    make = functools.partial(setting, case, model__layers=1)
    plain, made = (sums_and_gradients(c, make_rows(c, 0, rows=4)) for c in both(3, make))
    close(made, plain, TOLERANCE)


def test_held_out_numbers_and_nats_of_tokens_are_the_same_by_chunks():
    found = []
    for c in both(3, functools.partial(tiny_config, model__layers=1)):
        module = transformer.build(c.model)
        params = first_params(module)
        batch = make_batch(c, 0)
        measures = make_eval_step(module, c), make_heldout_step(module, OBJECTIVES[c.objective.name], c)
        found.append([jax.jit(measure)(params, batch) for measure in measures])
    close(found[1], found[0], TOLERANCE)


def temporaries(c, mesh):
    """Bytes that the compiled step needs on each device beside what it is given."""
    module = placement.on_mesh(transformer.build(c.model), mesh, c)
    optimizer = make_optimizer(c.optimizer, lambda step: 1.0, model=c.model)
    _, abstract = init_state(module, optimizer, c, mesh)
    batch = jax.device_put(make_batch(c, 0), batch_shardings(mesh))
    with placement.active(mesh, c):
        step = jax.jit(make_train_step(module, OBJECTIVES["causal"], optimizer, lambda step: 1.0, c), donate_argnums=0)
        return step.lower(abstract, batch, jax.random.key(0)).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("line", ["data=1", pytest.param("fsdp=2 tensor=2", marks=pytest.mark.slow)])
def test_by_chunks_the_logits_of_all_tokens_never_exist_at_once(line):
    rows, length, vocab, mesh = 4, 256, 16384, mesh_of(line)
    changes = {"model__vocab_size": vocab, "train__sequence_length": length, "train__batch_size": rows}
    at_once, by_chunks = (temporaries(c, mesh) for c in both(8, functools.partial(tiny_config, **changes)))
    logits = 4 * rows * length * vocab // mesh.size
    assert at_once > logits
    assert by_chunks < at_once - logits / 2
