"""`train.init_from` brings the weights that were evaluated and the tokenizer that they mean something with."""

import json
import re
import shutil
from pathlib import Path

import pytest
from helpers import assert_same_bits, tiny_config

import llmjax
from llmjax import cli, config, recipe
from llmjax.data import tokenizer_stage
from llmjax.data.tokenizer_files import load_tokenizer
from llmjax.data.tokenizer_training import train_tokenizer
from llmjax.errors import UserError
from llmjax.train import check, initial

LORA = {"model__adapter__kind": "lora", "model__adapter__rank": 4}
OTHER = Path(__file__).parent / "fixtures" / "run_c4ef595"  # bytes, with a moving average


def settings(tiny_sources, **changes):
    """A config whose model has the shapes of the other run's."""
    same = {"model__layers": 1, "model__width": 16, "model__heads": 2, "model__mlp_width": 32, "model__max_length": 64}
    return tiny_config(tiny_sources, **same, **{"train__init_from": str(OTHER), "tokenizer__kind": "byte", **changes})


@pytest.fixture
def char_tokenizer(tmp_path):
    folder = tmp_path / "char"
    folder.mkdir()
    train_tokenizer(["the model reads a line"] * 9, kind="char", vocab_size=300).save(folder)
    return folder


def test_the_weights_that_were_evaluated_and_the_tokenizer_come_along(
    tiny_sources, tmp_path, char_tokenizer, one_device, capsys
):
    c = settings(tiny_sources, optimizer__learning_rate=0.0, train__duration="1 step", tokenizer__kind="bpe")
    recipe.run(c, tmp_path / "run", ("prepare", "tokenizer", "train"))  # bpe is the default: no choice
    assert f"tokenizer: byte, 260 pieces, from {OTHER / 'tokenizer'}" in capsys.readouterr().out
    made, other = llmjax.load(tmp_path / "run"), llmjax.load(OTHER)
    assert_same_bits(made.params, other.params)  # the moving average
    assert (OTHER / "checkpoints" / "8" / "ema").is_dir()
    meta = json.loads((tmp_path / "run" / "checkpoints" / "1" / "meta" / "metadata").read_text())
    assert meta["tokenizer"] == made.tokenizer.fingerprint == other.tokenizer.fingerprint

    shutil.copytree(char_tokenizer, tmp_path / "run" / "tokenizer", dirs_exist_ok=True)
    (tmp_path / "run" / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="was trained with another tokenizer than the one that is in"):
        llmjax.load(tmp_path / "run")


def test_a_choice_of_another_tokenizer_is_refused_with_the_mend_before_anything_is_made(
    tiny_sources, tmp_path, char_tokenizer
):
    run = tmp_path / "run"
    for change in (
        {"tokenizer__kind": "unigram"},
        {"tokenizer__vocab_size": 300},
        {"tokenizer__path": str(char_tokenizer)},
    ):
        with pytest.raises(UserError, match=f"set --config.tokenizer.path={OTHER / 'tokenizer'}"):
            recipe.run(settings(tiny_sources, **change), run, ("prepare", "tokenizer", "train"))
        assert not run.exists()
    mended = settings(tiny_sources, tokenizer__kind="unigram", tokenizer__path=str(OTHER / "tokenizer"))
    tokenizer_stage.check(mended, tmp_path, fresh=False)
    initial.check(mended, load_tokenizer(OTHER / "tokenizer"))
    with pytest.raises(UserError, match=f"another tokenizer than this run has.*tokenizer.path={OTHER / 'tokenizer'}"):
        initial.check(mended, load_tokenizer(char_tokenizer))


def test_settings_that_do_not_fit_the_weights_are_named_with_both_values(tiny_sources):
    for key, value, told in (
        ("model.width", 32, "model.width is 16 there and 32 here"),
        ("model.layers", 3, "model.layers is 1 there and 3 here"),
        ("model.qk_norm", True, "model.qk_norm is False there and True here"),
    ):
        c = settings(tiny_sources)
        config.set_key(c, key, value)
        with pytest.raises(UserError, match=f"has a model of other shapes .*{told}.*--config {OTHER / 'config.json'}"):
            check.check(c, None, fresh=False)
    advised = config.load(str(OTHER / "config.json"), overrides=[f"train.init_from={OTHER}", "model.dropout=0.1"])
    check.check(advised, None, fresh=False)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"optimizer__freeze": "."}, "optimizer.freeze='.' matches all that would be trained"),
        ({"optimizer__train": "mlp", "optimizer__freeze": "mlp"}, "optimizer.freeze='mlp' matches all"),
        ({"optimizer__train": "nothing"}, "optimizer.train='nothing' is in the path of no parameter"),
        ({**LORA, "optimizer__freeze": "lora"}, "optimizer.freeze='lora' matches all"),
        (
            {**LORA, "model__adapter__base_format": "nf4", "optimizer__train": "mlp"},
            "is in few bits and cannot be trained",
        ),
    ],
)
def test_patterns_that_leave_nothing_to_train_are_refused_before_anything_is_made(
    tiny_sources, tmp_path, changes, told
):
    with pytest.raises(UserError, match=re.escape(told)):
        recipe.run(settings(tiny_sources, **changes), tmp_path / "run", ("prepare", "tokenizer", "train"))
    assert not (tmp_path / "run").exists()


def test_a_new_classifier_may_be_trained_alone(tiny_sources):
    c = settings(tiny_sources, data__format="conversations", objective__name="classify", optimizer__train="classifier")
    initial.check(c, None)


def test_a_run_to_start_from_that_is_not_there_is_named(tiny_sources, tmp_path):
    c = settings(tiny_sources, train__init_from=str(tmp_path / "none"))
    with pytest.raises(
        UserError, match=f"there is no run or checkpoint {tmp_path / 'none'}.*set --config.train.init_from"
    ):
        check.check(c, None, fresh=False)


def test_a_start_that_was_moved_is_named_by_its_new_path_and_the_training_goes_on(
    tiny_sources, tmp_path, one_device, capsys
):
    here, there = (tmp_path / name / "start of it" for name in ("here", "there"))
    shutil.copytree(OTHER, here)
    c = settings(tiny_sources, train__init_from=str(here), train__duration="2 steps")
    recipe.run(c, tmp_path / "run", ("prepare", "tokenizer", "train"))
    here.parent.rename(there.parent)
    run = str((tmp_path / "run").rename(tmp_path / "moved"))
    longer = ["train", "--workdir", run, "--config.train.duration=3 steps"]
    assert cli.main(longer) == 2
    assert "set --config.train.init_from to its folder" in capsys.readouterr().err
    assert cli.main([*longer, f"--config.train.init_from={there}"]) == 0
    assert "train: goes on from step 2, although train.duration changed" in capsys.readouterr().out
    assert cli.main(["train", "--workdir", run]) == 0
    assert "train: done already" in capsys.readouterr().out
