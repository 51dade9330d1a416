"""Settings of post-training that cannot work together are refused before anything is read; all others are accepted."""

import re

import pytest
from helpers import tiny_config

from llmjax.config import check
from llmjax.errors import UserError
from llmjax.parallel import processes
from llmjax.post import train
from llmjax.scaling import compiler

MOE = {"model__moe__experts": 4, "model__moe__active": 2}
LORA = {"model__adapter__kind": "lora", "model__adapter__rank": 4}
COMMON = {"data__format": "conversations", "train__init_from": "a run", "rollout__samples": 2, "rollout__tokens": 8}
ADDED = {"data__format": "text", "tokenizer__add_tokens": ("<x>",)}
OWN = {"objective__distill__on_policy": 0.5}


def settings(objective, **changes):
    return tiny_config(**COMMON | {"objective__name": objective} | changes)


@pytest.mark.parametrize(
    ("objective", "changes", "words"),
    [
        ("causal", {"train__batch_ramp": "4 steps"}, "train.batch_ramp='4 steps' is for text"),
        ("policy", {"train__rewind__factor": 2.0}, "train.rewind.factor skips batches"),
        ("distill", {"train__rewind__factor": 2.0, **OWN}, "train.rewind.factor skips batches"),
        ("distill", {"train__rewind__factor": 2.0}, ""),
        ("policy", {"train__duration": "60 seconds"}, "the time of a step cannot be measured where answers are sampled"),
        ("distill", {"train__duration": "60 seconds", **OWN}, "the time of a step cannot be measured"),
        ("distill", {"train__duration": "60 seconds"}, ""),
        ("causal", {**ADDED, **LORA}, "which adapters leave as they are: set optimizer.train='embedding'"),
        ("causal", {**ADDED, **LORA, "optimizer__train": "embedding"}, ""),
        ("causal", {**ADDED, "model__tie_embeddings": False, "optimizer__train": "embedding"}, "set optimizer.train='embedding|head/kernel'"),
        ("causal", {**ADDED, "optimizer__freeze": "embed"}, "optimizer.train or optimizer.freeze leaves as they are"),
        ("causal", ADDED, ""),
        ("policy", {"rollout__samples": 3}, "no multiple of rollout.samples=3"),
        ("policy", {"rollout__samples": 3, "rollout__updates": 3}, ""),
        ("policy", {"rollout__pack": 3}, "set train.micro_batches to 2 or more"),
        ("policy", {"rollout__pack": 3, "train__micro_batches": 2, "train__noise_scale": True}, "set one of them off"),
        ("policy", {"rollout__pack": 3, "train__micro_batches": 2}, ""),
        ("policy", {**MOE, "model__moe__dispatch": "capacity"}, "set it to dropless"),
        ("policy", {**MOE, "parallel__mesh": "expert=2"}, ""),
        ("causal", {**MOE, "model__moe__dispatch": "capacity"}, ""),
        ("policy", {"model__norm": "batch"}, "choose another norm"),
        ("policy", {"model__dropout": 0.1}, "dropout makes it another"),
        ("policy", {"rollout__advantage": "gae"}, "rollout.advantage=gae needs a critic"),
        ("policy", {"parallel__mesh": "pipeline=2"}, ""),
        ("policy", {"parallel__mesh": "context=2", "parallel__context": "ring"}, ""),
        ("policy", LORA, ""),
        ("unpaired", {"train__micro_batches": 2}, "set train.micro_batches=1"),
        ("preference", {"objective__preference__loss": "aot"}, "aot sorts the whole batch"),
        ("preference", {"objective__preference__loss": "sigmoid=much"}, "a weight that is a number"),
        ("preference", {"objective__preference__loss": "sft=nan"}, "a weight that is a number"),
        ("preference", {"objective__preference__loss": "sigmoid sft sigmoid=2"}, "must name each loss once"),
        ("preference", {"objective__preference__loss": "sigmoid=.5 sft=1e-2"}, ""),
        ("preference", {"objective__preference__loss": "nca", "objective__preference__divergence": "js"}, "nca is none: set it to reverse_kl"),
        ("preference", {"objective__preference__loss": "ipo=1 sft=1", "objective__preference__divergence": "js"}, ""),
        ("causal", {"model__adapter__base_format": "nf4"}, "set model.adapter.kind=lora"),
        ("causal", {**LORA, "model__adapter__base_format": "nf4"}, ""),
        ("causal", {**LORA, "train__init_from": ""}, "needs a trained model"),
        ("reward", {}, "set model.value_head=true"),
    ],
)  # fmt: skip
def test_combinations_of_settings(objective, changes, words):
    if not words:
        check(settings(objective, **changes))
        return
    with pytest.raises(UserError, match=re.escape(words)):
        check(settings(objective, **changes))


@pytest.mark.parametrize(
    ("objective", "changes", "count", "words"),
    [
        ("policy", {}, 2, "the answers of a policy are sampled by one process"),
        ("distill", OWN, 2, "or set objective.distill.on_policy=0"),
        ("distill", {}, 2, "needs a teacher"),  # the rest is accepted
        ("causal", {"eval__texts": ("bleu",)}, 2, "the texts of eval.texts are written by one process"),
        ("policy", {"rollout__tokens": 10_000}, 1, "rollout.tokens=10000 leaves no room for a prompt"),
        ("distill", {"rollout__tokens": 10_000, **OWN}, 1, "rollout.tokens=10000 leaves no room for a prompt"),
        ("distill", {"rollout__tokens": 10_000}, 1, "needs a teacher"),  # the rest is accepted
        ("causal", {"parallel__mesh": "data=3 tensor=-1"}, 1, "cannot be spread over 3 devices"),
        ("causal", {"parallel__mesh": "fsdp=16"}, 1, "cannot be spread over 16 devices"),
        ("causal", {"train__init_from": "nowhere"}, 2, "there is no run or checkpoint nowhere"),  # the rest is accepted
        ("causal", {"train__init_from": "nowhere", "parallel__mesh": "pipeline=2"}, 1, "there is no run"),
    ],
)
def test_combinations_with_processes_and_meshes_are_refused_before_anything_is_read(
    objective, changes, count, words, monkeypatch
):
    monkeypatch.setattr(processes, "count", lambda: count)
    with pytest.raises(UserError, match=re.escape(words)):
        train.check(settings(objective, **changes), None, fresh=True)


@pytest.mark.parametrize("form", ["stored", "int8", "nf4"])
@pytest.mark.parametrize("mesh", ["data=2", "fsdp=2 tensor=2", "pipeline=2", "context=2"])
def test_adapters_beside_a_model_in_few_bits_have_a_place_on_every_mesh(form, mesh):
    c = settings("causal", **LORA, model__adapter__base_format=form, parallel__mesh=mesh)
    devices = 4 if "tensor" in mesh else 2
    state = compiler.abstract_state(compiler.resolve(c, platform="gpu"), compiler.abstract_mesh(c, devices=devices))
    held = compiler.state_bytes(state)
    assert 0 < held["parameters"] < held["frozen"]


def test_a_cpu_is_divided_into_devices_where_the_state_is_smaller_than_the_work_of_a_step():
    given = {
        "data__format": "conversations",
        "train__init_from": "a run",
        "train__batch_size": 64,
        "train__sequence_length": 64,
    }
    assert train.most_devices(tiny_config(**given)) == 0
    assert train.most_devices(tiny_config(**given | {"train__batch_size": 1})) == 1
    assert train.most_devices(tiny_config(**given, objective__name="policy")) == 1
