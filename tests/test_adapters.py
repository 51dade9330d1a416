"""Adapters: small matrices beside a frozen model, which alone are trained, kept and merged."""

import dataclasses
import functools
import shutil

import jax
import numpy as np
import pytest
from flax import traverse_util
from helpers import few, mesh_of, prepare_steps, tiny_config, train

import llmjax
from llmjax.errors import UserError
from llmjax.model import adapters, transformer
from llmjax.parallel import mesh as meshes
from llmjax.train import checkpoint, initial

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
    _, abstract, _ = prepare_steps(_config(kind, trained), mesh_of("data=1"))
    return checkpoint.restore_step(run / "checkpoints" / "2", abstract).state


@pytest.mark.parametrize("kind", few(KINDS))
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
