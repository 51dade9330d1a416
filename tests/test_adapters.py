"""Adapters: small matrices beside a frozen model, which alone are trained, kept and merged."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from helpers import abstract_state, assert_same_bits, few, losses_of, mesh_of, stopping_at, tiny_config, train

import llmjax
from llmjax.errors import UserError
from llmjax.interop.merged import MergedReader, _same_in_16_bits
from llmjax.model import adapters, blockwise, transformer
from llmjax.parallel import mesh as meshes
from llmjax.post import reference
from llmjax.train import base, checkpoint, initial
from llmjax.train.frozen import combine, is_trained
from llmjax.train.optimizer import own_rate

LORA = {"model__adapter__kind": "lora", "model__adapter__rank": 4, "model__adapter__alpha": 8.0}
SHORT = {"train__duration": "2 steps", "checkpoint__every": "1 step"}
KINDS = {
    "lora": {},
    "nf4": {"model__adapter__base_format": "nf4", "model__adapter__kind": "dora"},
    "rslora": {"model__adapter__scale": "root"},
    "dora": {"model__adapter__kind": "dora"},
    "int8": {"model__adapter__base_format": "int8"},
}


def flat(tree):
    return {name: np.asarray(leaf) for name, leaf in traverse_util.flatten_dict(tree, sep="/").items()}


def on_one_device(patch):
    patch.setattr(meshes, "make_mesh", functools.partial(meshes.make_mesh, devices=jax.devices()[:1]))


def started(c, workdir, prepared_run, **settings):
    """A training from `train.init_from`, as the stage starts it."""
    train(c, workdir, initial_params=functools.partial(initial.read, c), **settings)
    shutil.copytree(prepared_run / "tokenizer", workdir / "tokenizer", dirs_exist_ok=True)
    return workdir


@pytest.fixture(scope="module")
def trained(tmp_path_factory, prepared_run):
    """The base, a run of all parameters."""
    workdir, c = tmp_path_factory.mktemp("adapters") / "base", tiny_config(**SHORT)
    with pytest.MonkeyPatch.context() as patch:
        on_one_device(patch)
        train(c, workdir)
    shutil.copytree(prepared_run / "tokenizer", workdir / "tokenizer")
    return workdir


@pytest.fixture(scope="module")
def runs(trained, prepared_run):
    """kind -> a run that trained adapters of this kind, made when it is first asked for."""
    made = {}

    def run(kind):
        if kind not in made:
            c = tiny_config(**{**LORA, **SHORT, **KINDS[kind]}, train__init_from=str(trained))
            with pytest.MonkeyPatch.context() as patch:
                on_one_device(patch)
                made[kind] = started(c, trained.parent / kind, prepared_run)
        return made[kind]

    return run


def test_a_run_of_adapters_keeps_them_alone_and_opens_on_its_base(runs, trained):
    run = runs("lora")
    assert not (run / "checkpoints" / "frozen").exists()
    names = checkpoint.stored(run / "checkpoints" / "2", "params")
    assert names and all(name.endswith(("/lora_a", "/lora_b")) for name in names)
    model, under = llmjax.load(run), flat(llmjax.load(trained).params)
    loaded = flat(model.params)
    assert names | under.keys() == loaded.keys()
    for name, array in under.items():
        np.testing.assert_array_equal(loaded[name], array, err_msg=name)
    assert all(loaded[name].any() for name in names)
    moments = sum(x.size for x in jax.tree.leaves(_state(run, "lora", trained).opt_state) if x.ndim)
    assert moments == 2 * sum(loaded[name].size for name in names)


def _config(kind, trained, **more):
    return tiny_config(**{**LORA, **SHORT, **KINDS[kind], **more}, train__init_from=str(trained))


def _state(run, kind, trained):
    abstract = abstract_state(_config(kind, trained), mesh_of("data=1"))
    return checkpoint.restore_step(run / "checkpoints" / "2", abstract).state


@pytest.mark.parametrize("kind", few(KINDS, slow=2))
def test_A1_A2_merged_computes_what_the_adapters_compute_and_writes_the_same_text(kind, runs, one_device):
    model = llmjax.load(runs(kind))
    ids = jax.random.randint(jax.random.key(1), (2, 12), 4, 300)
    plain = transformer.build(adapters.plain(model.config.model))
    merged = adapters.merged(model.config.model.adapter, model.params)
    assert not any(map(adapters.is_adapter, flat(merged)))
    np.testing.assert_allclose(plain.apply({"params": merged}, ids), model.logits(ids), atol=2e-5)
    whole = dataclasses.replace(model, module=plain, params=merged)
    greedy = {"temperature": 0.0, "max_new_tokens": 6}
    texts = [m.generate(["the model", "x"], **greedy) for m in (model, whole)]
    assert [one.tokens for one in texts[0]] == [one.tokens for one in texts[1]]
    nats = [np.concatenate([one.log_probabilities for one in text]) for text in texts]
    np.testing.assert_allclose(*nats, atol=2e-5)


@pytest.mark.slow
def test_requests_of_several_adapters_are_answered_in_one_batch_as_each_alone(runs, trained, one_device):
    """Also with DoRA, on tiles, with a common prefix; another adapter of the same rank compiles nothing."""
    names = {"one": runs("lora"), "two": runs("dora")}
    model = llmjax.load(trained, adapters=names)
    prompt = tuple(range(10, 60))
    greedy = {"ids": prompt, "max_new_tokens": 5, "temperature": 0.0}
    alone = {
        name: llmjax.load(run).generate([prompt], max_new_tokens=5, temperature=0.0)[0] for name, run in names.items()
    }
    alone[""] = llmjax.load(trained).generate([prompt], max_new_tokens=5, temperature=0.0)[0]
    engine = model.engine(slots=3, length=128, adapter_slots=3)
    engine.warm_up()
    compiled = engine.programs.compiled()

    def answers(order):
        numbers = {engine.submit({**greedy, "adapter": name}): name for name in order}
        return {numbers[number]: one for number, one in engine.run()}

    for order in (("one", "", "two"), ("two", "one", "")):  # the second time with what is in the prefix cache
        for name, one in answers(order).items():
            np.testing.assert_allclose(one.log_probabilities, alone[name].log_probabilities, atol=2e-5)
            assert one.tokens == alone[name].tokens, name
    assert len({one.log_probabilities for one in alone.values()}) == 3  # the adapters do something
    engine.load_adapter("three", model.adapters["two"])
    np.testing.assert_allclose(
        answers(("three",))["three"].log_probabilities, alone["two"].log_probabilities, atol=2e-5
    )
    assert engine.programs.compiled() == compiled
    with pytest.raises(UserError, match="no adapter is called 'four'; there are one, three, two"):
        engine.submit({**greedy, "adapter": "four"})
    engine.submit({**greedy, "adapter": "one"})
    with pytest.raises(UserError, match="requests are being answered with the adapter one"):
        engine.unload_adapter("one")


def test_a_base_that_is_gone_or_changed_is_named_and_can_be_mended(runs, trained, tmp_path, one_device):
    folder, run = tmp_path / "kept", tmp_path / "kept" / "lora"
    shutil.copytree(runs("lora"), run)
    shutil.copytree(trained, folder / "base")  # moved together: the path from the run is right
    llmjax.load(run)
    file = run / "checkpoints" / "base.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps({**told, "absolute": str(folder / "nowhere")}))
    shutil.move(folder / "base", folder / "elsewhere")
    with pytest.raises(
        UserError, match=r"its base, the checkpoint .*nowhere, is not there: .* as \"absolute\" into .*base.json"
    ):
        llmjax.load(run)
    elsewhere = folder / "elsewhere" / "checkpoints" / "2"
    with pytest.raises(UserError, match="is not there"):
        base.follow(file.parent, run / "checkpoints" / "none")
    base.follow(file.parent, elsewhere)  # as a training that goes on from a start by its new path
    assert json.loads(file.read_text())["absolute"] == str(elsewhere)
    llmjax.load(run)
    other = next(
        path for path in (folder / "elsewhere" / "checkpoints" / "2" / "params").rglob("*") if path.stat().st_size > 99
    )
    other.write_bytes(other.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match="has changed since they were trained"):
        llmjax.load(run)


@pytest.mark.slow
def test_A3_a_merge_is_onto_the_kernels_that_were_trained_on_and_others_are_refused(runs, trained):
    reader, own = MergedReader(runs("nf4") / "checkpoints" / "2"), MergedReader(trained / "checkpoints" / "2")
    kernel = own.read("layers/mlp/up/kernel", 1)
    rounded = blockwise.dequantize(*blockwise.quantize(kernel, "nf4", -2), -2)
    np.testing.assert_array_equal(reader._kernel("layers/mlp/up", 1), rounded)
    assert np.abs(kernel - rounded).max() > 1e-3
    merged = reader.read("layers/mlp/up/kernel", 1)
    np.testing.assert_array_equal(merged, reader.read("layers/mlp/up/kernel", 1))  # A2: twice gives the same bits
    with pytest.raises(UserError, match="were trained on kernels in nf4, and would compute something else here"):
        llmjax.load(trained, adapters={"a": runs("nf4")})


def test_A5_small_steps_count_and_what_16_bits_lose_is_counted():
    settings = tiny_config(**LORA, train__init_from="run").model.adapter
    kernel, ones = np.full((4, 4), 1.0, np.float32), np.ones((4, 1), np.float32)
    own = {"kernel": kernel.astype(jnp.bfloat16), "lora_a": ones, "lora_b": ones.T * 2.0**-11}
    merged = adapters.merged_kernel(settings, "head", own)  # times the scale, 2
    assert merged.dtype == jnp.float32 and np.all(merged == 1 + 2.0**-10)
    assert np.all(_same_in_16_bits(np.asarray(merged), own["kernel"]))
    module = transformer.build(tiny_config(**LORA, train__init_from="run", model__param_dtype="bfloat16").model)
    shapes = traverse_util.flatten_dict(transformer.param_shapes(module), sep="/")
    assert all((leaf.dtype == jnp.float32) == adapters.is_adapter(name) for name, leaf in shapes.items())


def test_rates_fall_from_layer_to_layer_and_by_pattern_and_what_is_frozen_stays():
    c = tiny_config(optimizer__layer_decay=0.5, optimizer__rates=("mlp/up=0.1",), optimizer__freeze="attention")
    trained = is_trained(c)
    assert trained("layers/mlp/up/kernel") and not trained("layers/attention/out/kernel")
    factors = {
        name: own_rate(c.optimizer, c.model)((jax.tree_util.DictKey(name),), jnp.ones((2, 3)))[:, 0].tolist()
        for name in ("layers/mlp/down/kernel", "layers/mlp/up/kernel", "embedding", "final_norm/scale")
    }
    expected = {"layers/mlp/down/kernel": [0.5, 1], "layers/mlp/up/kernel": [0.05, 0.1], "embedding": [0.25] * 2, "final_norm/scale": [1] * 2}  # fmt: skip
    for name, values in expected.items():
        np.testing.assert_allclose(factors[name], values, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("form", blockwise.FORMATS)
def test_kernels_in_few_bits_are_near_and_their_codes_are_exact(form):
    kernel = jax.random.normal(jax.random.key(0), (2, 128, 6))
    codes, scale = blockwise.quantize(kernel, form, -2)
    assert codes.nbytes == kernel.nbytes // (4 if form == "int8" else 8) and scale.shape == (2, 2, 6)
    made = blockwise.dequantize(codes, scale, -2)
    step = 1 / 254 if form == "int8" else 0.16
    assert np.all(np.abs(made - kernel) <= step * np.repeat(scale, 64, axis=1))
    again = blockwise.quantize(made, form, -2)
    np.testing.assert_array_equal(again[0], codes)
    np.testing.assert_allclose(again[1], scale, rtol=1e-6)


@pytest.mark.slow
def test_stopped_and_continued_adapters_end_in_the_same_bits(runs, trained, tmp_path, prepared_run, one_device):
    c, run = _config("lora", trained, model__adapter__dropout=0.1), tmp_path / "stopped"
    with pytest.raises(KeyError, match="stop here"):
        started(c, run, prepared_run, batch=stopping_at(c, 1))
    started(c, run, prepared_run)
    started(c, tmp_path / "whole", prepared_run)
    abstract = abstract_state(c, mesh_of("data=1"))
    ends = (checkpoint.restore_step(w / "checkpoints" / "2", abstract)[0] for w in (run, tmp_path / "whole"))
    assert_same_bits(*ends)


@pytest.mark.parametrize("kind", few(["dora", "int8"], 0, 1))
def test_adapters_learn_the_same_on_meshes(kind, trained):
    c = _config(kind, trained)
    one, _ = losses_of(c, mesh_of("data=1"), steps=3)
    for line in ("fsdp=2 tensor=2", "data=2 fsdp=2"):
        np.testing.assert_allclose(losses_of(c, mesh_of(line), steps=3)[0], one, rtol=1e-5, err_msg=line)


@pytest.mark.slow
def test_P8_a_stage_that_goes_on_with_adapters_starts_at_its_reference(runs, trained):
    """Its reference is base and adapter, and its base is the first one; other adapters stand on the merged model."""
    lora = runs("lora")
    abstract = abstract_state(_config("lora", trained), mesh_of("data=1"))
    whole = combine(abstract.params, abstract.frozen)
    c = _config("lora", lora)
    assert_same_bits(
        initial.read(c, whole), jax.device_put(llmjax.load(lora).params, jax.tree.map(lambda x: x.sharding, whole))
    )
    assert initial.base_of(c, lora.parent / "next", abstract.frozen).absolute == str(trained / "checkpoints" / "2")
    other = _config("lora", lora, model__adapter__rank=2)
    abstract = abstract_state(other, mesh_of("data=1"))
    found = initial.read(other, combine(abstract.params, abstract.frozen))
    model = llmjax.load(lora)
    merged = flat(adapters.merged(model.config.model.adapter, model.params))
    for name, array in flat(found).items():
        np.testing.assert_allclose(array, merged[name], atol=1e-6, err_msg=name)
    assert initial.base_of(other, lora.parent / "next", abstract.frozen) is None


def test_the_reference_of_a_policy_has_its_adapters_alone_and_is_the_model_that_the_training_starts_from(
    trained, runs, one_device
):
    """Where the run begins with new ones they add nothing; where it goes on with a run's they are that run's."""
    ids, mesh = jax.random.randint(jax.random.key(1), (2, 12), 4, 300), mesh_of("data=1")
    for kind, start in (("lora", trained), ("dora", trained), ("lora", runs("lora"))):
        c = _config(kind, start)
        module = transformer.build(c.model)
        own, abstract = reference.own_params(c, module, mesh), reference.abstract_params(c, module, mesh)
        assert set(flat(own)) == set(filter(adapters.is_adapter, traverse_util.flatten_dict(abstract, sep="/")))
        if (kind, start) == ("lora", trained):
            assert not any(leaf.any() for leaf in flat(own).values())
            continue
        model = llmjax.load(start)
        moved = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), abstract)
        whole = combine(combine(moved, model.params), own)  # a policy whose adapters were trained
        found = jax.jit(module.apply)({"params": whole}, ids)
        np.testing.assert_allclose(found, model.logits(ids), atol=1e-5, err_msg=kind)
