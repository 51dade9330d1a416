"""Every family of configs/models/: complete at every size, of the published size, and as a tiny model true to its promises."""

import functools
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import parameter_counts
import published_models
import pytest
from helpers import assert_same_bits, first_params, mesh_of, prepare_steps

from llmjax import config
from llmjax.config.objective_checks import ANSWERS
from llmjax.data.batches import TrainBatches
from llmjax.data.tokenizer import byte_tokenizer
from llmjax.model import transformer
from llmjax.model.cache import init_cache
from llmjax.model.count import param_count
from llmjax.objectives import OBJECTIVES, corruption
from llmjax.train import checkpoint, pretrain
from llmjax.train.schedule import make_schedule

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "configs" / "models"
GOLDEN = Path(__file__).parent / "golden" / "model-configs.json"

FAMILIES = parameter_counts.families()
SPECS = [f"{family}:{size}" for family, module in FAMILIES.items() for size in module.SIZES]
TINY = [spec for spec in SPECS if ":tiny" in spec]
COUNTS = json.loads((ROOT / "results" / "parameter_counts.json").read_text())["rows"]
# Compiling takes seconds a family: this one, which has the most parts, is always tested. Two-stream models and those
# with an encoder are in test_network.py and test_objectives_network.py.
ALWAYS = ("deepseek:tiny-v3",)
# These are slow. The parts of the other families, which are exhaustive, are in these, in test_model.py or test_moe.py.
SLOW = ("bert:tiny", "gemma2:tiny", "griffin:tiny", "lstm:tiny", "mamba2:tiny", "mixtral:tiny", "t5:tiny",
        "transformer:tiny", "unilm:tiny", "xlnet:tiny")  # fmt: skip
# Training compiles twice as much, and meshes half a minute a family. The others are exhaustive: every objective is learnt
# and spread over meshes in test_objectives_network.py, every kind of layer is on meshes in test_parallel.py.
ON_MESHES = ("deepseek:tiny-v3",)


def often(spec: str, always: tuple[str, ...], slow: tuple[str, ...]) -> Any:
    """A family of a test, marked by how often it runs."""
    return pytest.param(
        spec, marks=() if spec in always else pytest.mark.slow if spec in slow else pytest.mark.exhaustive
    )


EACH = [often(spec, ALWAYS, SLOW) for spec in TINY]
LENGTH = 32


def load(spec: str, *overrides: str) -> config.ConfigDict:
    family, size = spec.split(":")
    return config.load(f"{MODELS / family}.py:{size}", overrides=overrides)


@functools.cache
def tiny(spec: str) -> config.ConfigDict:
    """A tiny config as its training resolves it, with 8 rows of 32 tokens and the plain attention."""
    short = (f"train.sequence_length={LENGTH}", "train.batch_size=8", "train.duration=20", "model.attention=reference")
    return pretrain.resolve(load(spec, *short), byte_tokenizer())


def batches(c: config.ConfigDict, run: Path) -> TrainBatches:
    """The batches of the config's own objective, of the prepared run's text."""
    return TrainBatches(c, run / "tokenizer" / "tokens", total_steps=20, corruption=corruption(c, byte_tokenizer()))


@functools.cache
def trained(spec: str, run: Path, line: str, steps: int) -> tuple[np.ndarray, Any]:
    """The losses of the first steps on a mesh, and (the state after them, its abstract form, the step's function)."""
    c, data = tiny(spec), batches(tiny(spec), run)
    state, abstract, step = prepare_steps(c, mesh_of(line))
    losses = []
    for k in range(steps):
        state, values = step(state, data.batch(k))
        losses.append(float(values["loss"]))
    return np.array(losses), (state, abstract, step)


# ---------------------------------------------------------------------- files and sizes


@pytest.mark.parametrize("family", FAMILIES)
def test_every_size_loads_complete_and_locked_with_its_golden_values(family):
    found = {}
    for size in FAMILIES[family].SIZES:
        c = load(f"{family}:{size}")
        assert c.is_locked
        assert ("tiny" in size) == (c.model.vocab_size == 0), "published sizes have the published vocabulary"
        found[size] = {key: new for key, (_, new) in config.differences(config.base(), c).items()}
    found = json.loads(json.dumps(found))
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {}
    if os.environ.get("UPDATE_GOLDEN"):
        golden = dict(sorted({**golden, family: found}.items()))
        GOLDEN.write_text(json.dumps(golden, indent=0) + "\n")
    changed = {
        size: (golden.get(family, {}).get(size), found[size])
        for size in found
        if golden.get(family, {}).get(size) != found[size]
    }
    assert not changed, "if that is meant, run UPDATE_GOLDEN=1 pytest tests/test_model_configs.py"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_file_says_how_to_run_it_what_it_is_and_what_was_run(family):
    doc = FAMILIES[family].__doc__
    assert len(doc.splitlines()[0]) < 120
    assert f"llmjax run --config configs/models/{family}.py:tiny\n" in doc
    for word in ("Paper", "Hardware:", "Run here:"):
        assert word in " ".join(doc.split())
    arguments = FAMILIES[family].get_config.__doc__
    assert "see SIZES" in arguments or all(f"`{size}`" in arguments for size in FAMILIES[family].SIZES)
    assert load(f"{family}:tiny").to_dict() == config.load(str(MODELS / f"{family}.py")).to_dict(), (
        "tiny is the default"
    )


@pytest.mark.parametrize("spec", TINY)
def test_every_tiny_model_inits_and_runs(spec):
    c = tiny(spec)
    module = transformer.build(c.model)
    assert param_count(c.model) < 500_000

    def forward(key: jax.Array) -> jax.Array:
        tokens_BL = jnp.zeros((2, 8), jnp.int32)
        source = {"tokens": tokens_BL} if c.model.encoder_layers else None
        return module.apply({"params": transformer.init_params(module, key)}, tokens_BL, source=source)

    assert jax.eval_shape(forward, jax.random.key(0)).shape == (2, 8, c.model.vocab_size)


# ---------------------------------------------------------------------- counts


def test_every_published_size_is_counted_and_every_difference_explained():
    counted = [f"{row['family']}:{row['size']}" for row in COUNTS]
    assert counted == [spec for spec in SPECS if spec not in TINY], "run python benchmarks/parameter_counts.py"
    for row in COUNTS:
        if row["published"] is None or abs(row["difference"]) > row["rounded_to"] / 2:
            assert row["why"], row
        if row["source"].startswith("transformers") and row["family"] != "bert":
            assert row["difference"] == 0, row


def _sizes_counted() -> list[Any]:
    """Families and sizes; all but one of each family are slow."""
    smallest = {(family, parameter_counts.published_sizes(module)[0]) for family, module in FAMILIES.items()}
    pairs = [(row["family"], row["size"]) for row in COUNTS]
    return [pytest.param(*pair, marks=() if pair in smallest else pytest.mark.slow) for pair in pairs]


@pytest.mark.parametrize(("family", "size"), _sizes_counted())
def test_parameters_are_as_many_as_the_table_says(family, size):
    row = next(row for row in COUNTS if (row["family"], row["size"]) == (family, size))
    assert parameter_counts.ours(family, size) == row["ours"]


@pytest.mark.slow
@pytest.mark.parametrize("key", published_models.MODELS)
def test_the_published_counts_are_those_of_transformers(key):
    pytest.importorskip("transformers")
    for size in published_models.MODELS[key][3]:
        row = next(row for row in COUNTS if (row["family"], row["size"]) == (key.split()[0], size))
        assert published_models.count(key, size) == row["published"], size


# ---------------------------------------------------------------------- the tables of configs/README.md

README = ROOT / "configs" / "README.md"


def family_table() -> str:
    """What stands between the markers of configs/README.md."""
    rows = ["| file | what makes it itself | sizes besides `tiny` | objective |", "|---|---|---|---|"]
    for family, module in FAMILIES.items():
        title, _, what = module.__doc__.splitlines()[0].partition(": ")
        sizes = ", ".join(f"`{size}`" for size in module.SIZES if size != "tiny")
        objectives = dict.fromkeys(load(f"{family}:{size}").objective.name for size in module.SIZES)
        rows.append(
            f"| [{family}](models/{family}.py) | {title}: {what.rstrip('.')} | {sizes} | {', '.join(objectives)} |"
        )
    return "\n" + "\n".join(rows) + "\n"


def test_the_table_of_families_is_what_the_files_say():
    before, start, rest = re.split(r"(<!-- families: .*?-->\n)", README.read_text())
    _, end, after = rest.partition("<!-- end -->")
    if os.environ.get("UPDATE_GOLDEN"):
        README.write_text(f"{before}{start}{family_table()[1:]}{end}{after}")
    assert f"{start}{family_table()[1:]}{end}" in README.read_text(), (
        "run UPDATE_GOLDEN=1 pytest tests/test_model_configs.py"
    )


def axes() -> dict[str, list[str]]:
    """Axis -> its lines of flags, as the table of ablations has them."""
    table = README.read_text().partition("## The axes of an ablation")[2]
    rows = [line.split(" | ", 1) for line in table.splitlines() if line.startswith("| ") and "`--" in line]
    return {name.strip("| "): re.findall(r"`(--config[^`]*)`", lines) for name, lines in rows}


@functools.cache
def count(model: str) -> int:
    return param_count(config.from_json(model).model)


@pytest.mark.parametrize("axis", axes())
def test_every_line_of_an_ablation_is_accepted_and_makes_a_model(axis):
    start = config.load(str(ROOT / "configs" / "quickstart.py"))
    for line in axes()[axis]:
        c = config.load(str(ROOT / "configs" / "quickstart.py"), overrides=["train.duration=640 steps", *flags(line)])
        assert c.to_dict().keys() == start.to_dict().keys()
        plain = config.base()
        plain.model = c.model
        plain.model.vocab_size = 4224
        assert count(config.to_json(plain)) > 0, line


def flags(line: str) -> list[str]:
    return [word.removeprefix("--config.") for word in shlex.split(line)]


# Choices of post-training, which configs/post/ and docs/fine-tune.md tell of.
POST = (
    "data.format",
    "data.turns",
    "objective.preference.",
    "objective.unpaired.",
    "objective.classify.",
    "objective.distill.",
    "model.adapter.",
    "objective.policy.",
    "rollout.",
)


def test_every_choice_there_is_stands_in_the_table_of_ablations():
    lines = {flag for axis in axes().values() for line in axis for flag in flags(line)}
    # What is no axis of an ablation, or is what the other choice is compared with. The factors of longrope come with a model.
    elsewhere = {
        "tokenizer.kind", "model.mlp", "model.direction", "model.remat", "model.attention", "schedule.by", "parallel.context",
    }  # fmt: skip
    defaults = config.flatten(config.base().to_dict())
    for key, choices in config.CHOICES.items():
        if key not in elsewhere and not key.startswith(POST) and not key.startswith(("prepare.", "eval.", "infer.")):
            missing = [
                v
                for v in choices
                if f"{key}={v}" not in lines and v not in (defaults[key], "classify", "longrope", *ANSWERS)
            ]
            assert not missing, f"{key}: {missing}"


# ---------------------------------------------------------------------- promises of the architectures


def influence(c: config.ConfigDict, tokens_L: np.ndarray, ids: np.ndarray, **arguments: Any) -> np.ndarray:
    """seen[l, m]: whether the hidden state of row 0's place l has a gradient to the embedding of token ids[m]."""
    module = transformer.build(c.model)
    params = first_params(module)
    direction_D = jax.random.normal(jax.random.key(1), (c.model.width,))

    def of_embedding(embedding_VE: jax.Array) -> jax.Array:
        changed = {"params": {**params, "embedding": embedding_VE}}
        return module.apply(changed, jnp.asarray(tokens_L)[None], output="hidden", **arguments)[0] @ direction_D

    @jax.jit
    def jacobian(embedding_VE: jax.Array) -> jax.Array:
        hidden_L, pull = jax.vjp(of_embedding, embedding_VE)
        return jax.lax.map(
            lambda one_L: pull(one_L)[0], jnp.eye(len(hidden_L))
        )  # not vmap: experts have no rule for it

    return np.abs(np.asarray(jacobian(params["embedding"]))).max(-1)[:, ids] > 0


def arrays(**rows: np.ndarray) -> dict[str, jax.Array]:
    return {name: jnp.asarray(row)[None] for name, row in rows.items()}


# What a token sees is fast in test_model.py, of each kernel, and in test_network.py, of each kind of mask.
@pytest.mark.parametrize("spec", [often(spec, (), (*ALWAYS, *SLOW)) for spec in TINY])
def test_every_token_depends_on_what_its_objective_shows_it_and_nothing_else(spec):
    c = tiny(spec)
    objective, index, tokens_L = c.objective.name, np.arange(12), np.arange(10, 22)
    causal = index[None, :] <= index[:, None]
    if objective in ("masked", "translation"):
        np.testing.assert_array_equal(influence(c, tokens_L, tokens_L), np.ones((12, 12), bool))
    elif objective == "permutation":
        orders, at = np.random.default_rng(0).permutation(12), np.array([7, 2, 11])
        queries = arrays(positions=at, orders=orders[at], segments=np.ones(3, np.int32))
        seen = influence(c, tokens_L, tokens_L, queries=queries, **arrays(orders_BL=orders))
        np.testing.assert_array_equal(seen, orders[None, :] < orders[at][:, None])
    elif objective == "unilm":
        row = {"tokens": tokens_L, "segments": np.ones(12, np.int32)}
        for i, shown in enumerate((np.ones((12, 12), bool), causal, causal.T, None)):
            modes = tuple(float(i == j) for j in range(4))
            changed = config.from_json(config.to_json(c))
            changed.objective.modes = modes
            new = corruption(changed, byte_tokenizer()).transform(row, np.random.default_rng(0))
            if shown is None:
                first = new["types"] == 4  # the source of a sequence-to-sequence row sees itself
                shown = first[None, :] | (causal & ~first[:, None])
            given = arrays(orders_BL=new["orders"], types_BL=new["types"], segments_BL=new["segments"])
            np.testing.assert_array_equal(influence(c, tokens_L, tokens_L, **given), shown, err_msg=str(modes))
    elif c.model.encoder_layers:
        source_M = np.arange(30, 37)
        seen = influence(c, tokens_L, np.concatenate([tokens_L, source_M]), source=arrays(tokens=source_M))
        np.testing.assert_array_equal(seen[:, :12], causal)
        assert seen[:, 12:].all(), "every token of the decoder sees the whole source"
    else:
        np.testing.assert_array_equal(influence(c, tokens_L, tokens_L), causal)


def decodes(spec: str) -> bool:
    c = load(spec)
    return OBJECTIVES[c.objective.name].reads_left_to_right or c.model.encoder_layers > 0


@pytest.mark.parametrize("spec", [param for param in EACH if decodes(param.values[0])])
def test_decoding_with_the_cache_gives_the_logits_of_the_plain_pass(spec):
    m = config.from_json(config.to_json(tiny(spec))).model
    if m.moe.experts:  # what a full expert drops depends on how many tokens come at once
        m.moe.capacity_factor = float(m.moe.experts)
    module = transformer.build(m)
    params = first_params(module)
    apply = jax.jit(functools.partial(module.apply, {"params": params}))
    tokens_BL = jax.random.randint(jax.random.key(1), (2, 10), 4, 260)
    source = {"source": {"tokens": tokens_BL[:, :6]}} if m.encoder_layers else {}
    cache = init_cache(m, batch=2, length=10, **({"source_length": 6} if source else {}))
    logits_BLV, cache = apply(tokens_BL[:, :6], cache=cache, **source)
    found = [logits_BLV]
    for at in range(6, 10):
        positions_BL = jnp.full((2, 1), at)
        logits_BLV, cache = apply(tokens_BL[:, at : at + 1], positions_BL=positions_BL, cache=cache)
        found.append(logits_BLV)
    plain = apply(tokens_BL, **source)
    np.testing.assert_allclose(jnp.concatenate(found, 1), plain, rtol=0, atol=2e-5 * float(jnp.abs(plain).max()))


@pytest.mark.parametrize("spec", [often(spec, (), ON_MESHES) for spec in TINY])
def test_20_steps_of_the_own_objective_lower_the_loss_and_what_is_saved_goes_on_the_same(spec, prepared_run, tmp_path):
    losses, (state, abstract, step) = trained(spec, prepared_run, "data=1", 20)
    print(f"{spec}: {losses[0]:.3f} to {losses[-4:].mean():.3f}")  # pytest -rP shows it
    assert np.isfinite(losses).all()
    assert losses[-4:].mean() < losses[0] - 0.3
    with checkpoint.manager(tmp_path, keep=1) as checkpoints:
        checkpoint.save(checkpoints, state, step=20, meta={"step": 20})
        checkpoints.wait_until_finished()
    restored = checkpoint.restore(tmp_path, abstract).state
    assert_same_bits(restored, state)
    batch = batches(tiny(spec), prepared_run).batch(20)
    assert_same_bits(step(restored, batch), step(state, batch))


@pytest.mark.parametrize("spec", [often(spec, (), ON_MESHES) for spec in TINY])
def test_losses_are_the_same_on_every_mesh(spec, prepared_run):
    alone, _ = trained(spec, prepared_run, "data=1", 20)
    for line in ("data=8", "data=2 fsdp=2 tensor=2"):
        here, _ = trained(spec, prepared_run, line, 4)
        print(f"{spec} {line}: {np.abs(here - alone[:4]).max():.1e}")
        np.testing.assert_allclose(here, alone[:4], rtol=0, atol=1e-5)


def test_the_inverse_square_root_falls_from_the_peak_that_the_warm_up_reaches():
    c = load("transformer:base").schedule
    rate = make_schedule(c, total_steps=100_000)
    assert [float(rate(step)) for step in (0, 3999, 4000, 16_000, 36_000)] == pytest.approx(
        [1 / 4000, 1, 1, 1 / 2, 1 / 3]
    )
