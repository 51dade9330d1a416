"""Plans of post-training: memory and time of frozen models, references, teachers and rollouts, calculated by hand."""

import json
from pathlib import Path

import pytest
from helpers import tiny_config

from llmjax import cli, config
from llmjax.errors import UserError
from llmjax.scaling import analytic, compiler, post
from llmjax.scaling.plan import make_plan
from llmjax.scaling.render import render
from llmjax.scaling.topology import parse_topology

POST = Path(__file__).parent.parent / "configs" / "post"
H100 = {"flops": 989e12, "bandwidth": 3350e9, "link": 450e9}


def paper(c, topology):
    c = compiler.resolve(c, platform="gpu")
    return post.plan(c, parse_topology(topology), compiler.stages(c).stages[-1])


def config_of(name, **changes):
    return config.load(str(POST / name), overrides=[f"{key.replace('__', '.')}={v!r}" for key, v in changes.items()])


LLAMA_8B = 8_030_261_248
MATRICES_8B = LLAMA_8B - 128_256 * 4096 - 65 * 4096  # without the embedding, which is looked up, and the norms


def test_full_fine_tuning_of_8b_keeps_four_float32_numbers_a_parameter():
    c = config_of("llama3_8b_sft.py")
    found = paper(c, "h100:8").memory
    eighth = 4 * (LLAMA_8B - 65 * 4096) / 8 + 4 * 65 * 4096  # norms are whole on every device
    assert found["parameters"] == eighth
    assert found["optimizer"] == pytest.approx(2 * eighth, rel=1e-6)  # and the counts
    assert found["gradients"] == 2 * eighth  # the sum of the micro-batches so far, and the new ones
    assert found["frozen"] == 0
    assert found["activations kept"] == 32 * 4096 * 4096 * 2  # one row: the input of each layer in bfloat16
    assert found["logits"] == 2 * 4 * 4096 * 128_256 / 8
    assert not {"reference", "teacher", "engine's weights"} & found.keys()
    flops = analytic.token_flops(compiler.resolve(c, platform="gpu"))
    assert flops.model == 6 * MATRICES_8B + 12 * 32 * 4096 * 4096


def test_adapters_of_70b_have_the_only_gradients_and_a_frozen_matrix_costs_four_flops():
    c = config_of("llama2_70b_lora.py")
    found = paper(c, "h100:8").memory
    inputs_and_outputs = 2 * (8192 + 8192) + 2 * (8192 + 1024) + 3 * (8192 + 28_672)  # q and o, k and v, the MLP
    adapters = 80 * 16 * inputs_and_outputs
    assert adapters == 207_093_760
    # What is as long as the width is divided: A of all maps but out and down, and B of these two.
    divided = 80 * 16 * 8192 * 7
    each = 4 * (adapters - divided + divided / 8)
    assert found["parameters"] == each
    assert found["optimizer"] == pytest.approx(2 * each, rel=1e-6)
    norms = 161 * 8192
    assert found["frozen"] == 2 * ((68_976_648_192 - norms) / 8 + norms)
    matrices = 68_976_648_192 - 32_000 * 8192 - norms
    flops = analytic.token_flops(compiler.resolve(c, platform="gpu"))
    assert flops.model == 4 * matrices + 6 * adapters + 12 * 80 * 4096 * 8192


def test_a_frozen_model_in_few_bits_has_a_byte_for_two_numbers_and_a_scale_a_block():
    c = config_of("llama2_70b_lora.py:nf4")
    found = paper(c, "h100:1").memory
    kernels = 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28_672)
    others = 2 * 32_000 * 8192 + 161 * 8192
    assert found["frozen"] == kernels / 2 + 4 * kernels / 64 + 2 * others
    assert found["parameters"] == 4 * 207_093_760
    made = make_plan(c, parse_topology("h100:1"))
    assert made["parameters"] == 68_976_648_192 + 207_093_760
    assert made["fits"]


def test_a_policy_of_8b_holds_the_weights_twice_and_the_cache_of_its_slots():
    c = config_of("llama3_8b_grpo.py")
    made = paper(c, "h100:8")
    found = made.memory
    assert found["engine's weights"] == found["parameters"]
    keys_and_values = 128 * 2048 * 32 * 2 * (8 // 8) * 128 * 2  # slots, places, layers, one of 8 heads, bfloat16
    of_ids = 128 * 128_256 * (4 + 4 + 1)  # bias, counts and what was seen, of each slot
    assert found["engine's cache"] == pytest.approx(keys_and_values + of_ids, rel=1e-3)
    assert found["peak"] == sum(v for k, v in found.items() if k != "peak")
    # Two updates share 128 texts of 1,024 tokens, all of them at a time.
    numbers = MATRICES_8B / 8 + 65 * 4096
    read = (2 * numbers + found["engine's cache"]) / H100["bandwidth"]
    sums = 2 * 2 * 128 * 4096 * 2 * 7 / 8 * 32 / H100["link"]
    forward = 2 * MATRICES_8B + 4 * 32 * 2048 * 4096
    prompts = 128 / 8 * 1024 * forward / 8 / H100["flops"]
    assert made.seconds["rollouts"] == pytest.approx((1024 * (read + sums) + prompts) / 2, rel=1e-6)
    assert made.seconds["forward"] == pytest.approx(64 * 2048 * forward / 8 / H100["flops"])
    said = render(make_plan(c, parse_topology("h100:8")))
    assert "cache of the engine's slots" in said
    assert "of it rollouts" in said


def test_weights_divided_over_fsdp_are_gathered_at_every_token():
    c = config_of("llama3_8b_grpo.py", parallel__mesh="fsdp=8")
    gathered = 2 * (MATRICES_8B + 8 * 65 * 4096) * 7 / 8 / H100["link"]
    assert paper(c, "h100:8").seconds["rollouts"] == pytest.approx(1024 * gathered / 2, rel=0.01)


def tiny(**changes):
    given = {"data__format": "conversations", "objective__name": "policy", "train__init_from": "a run",
             "rollout__rewards": ("exact_match",), "rollout__samples": 2, "rollout__tokens": 8}  # fmt: skip
    return tiny_config(**given | changes)


def test_a_reference_is_a_second_model_and_more_slots_are_a_larger_cache():
    plain, held = paper(tiny(), "h100:1"), paper(tiny(rollout__kl_weight=0.1), "h100:1")
    assert held.memory["reference"] == held.memory["parameters"]
    assert held.memory["peak"] - plain.memory["peak"] == held.memory["reference"]
    assert held.seconds["forward"] == 2 * plain.seconds["forward"]
    adapters = paper(tiny(rollout__kl_weight=0.1, model__adapter__kind="lora"), "h100:1").memory
    assert adapters["reference"] == adapters["parameters"] < held.memory["reference"]  # what is frozen is there once
    larger = paper(tiny(rollout__slots=32), "h100:1").memory["engine's cache"]
    assert larger == 2 * plain.memory["engine's cache"]


def test_scores_and_classes_have_no_logits():
    changes = {"objective__name": "reward", "model__value_head": True}
    c = tiny(**changes)
    found = paper(c, "h100:1")
    assert found.memory["logits"] == 0
    with_logits = analytic.token_flops(
        compiler.resolve(tiny(objective__name="causal", **{"model__value_head": True}), platform="gpu")
    )
    resolved = compiler.resolve(c, platform="gpu")
    head = 6 * resolved.model.vocab_size * resolved.model.width
    assert with_logits.model - analytic.token_flops(resolved).model == head


def test_a_teacher_is_counted_by_its_own_run(tmp_path):
    theirs = compiler.resolve(tiny_config(model__layers=5), platform="gpu")
    (tmp_path / "params").mkdir()
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "metadata").write_text(json.dumps({"config": json.loads(config.to_json(theirs))}))
    run = {"objective__name": "distill", "objective__distill__teacher": str(tmp_path)}
    found = paper(tiny(**run), "h100:1")
    assert found.memory["teacher"] == 4 * analytic.parameter_count(theirs)
    assert "rollouts" not in found.seconds
    own = paper(tiny(objective__distill__on_policy=0.5, **run), "h100:1")
    assert own.seconds["rollouts"] > 0
    assert own.memory["engine's cache"] > 0
    with pytest.raises(UserError, match="there is no run or checkpoint nowhere"):
        paper(tiny(objective__name="distill", objective__distill__teacher="nowhere"), "h100:1")


def test_tpus_are_planned_by_formula_where_the_compiler_lacks_the_rows(capsys):
    arguments = ["plan", "--config", str(POST / "llama3_8b_grpo.py"), "--topology", "v5p:2x2x2"]
    assert cli.main(arguments) == 2
    assert "plan by formula, with --paper" in capsys.readouterr().err
    assert cli.main([*arguments, "--paper"]) == 0
    assert "cache of the engine's slots" in capsys.readouterr().out
