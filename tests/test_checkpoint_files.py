"""A damaged checkpoint is found by its files' sizes and checksums before orbax or tensorstore reads any of it."""

import gc
import json
import os
import re
import shutil

import jax
import numpy as np
import pytest
from helpers import assert_same_bits

from llmjax import storage
from llmjax.interop import stacked
from llmjax.train import checkpoint, files, folders
from llmjax.train.step import State


def state_of(step):
    params = {"layers": {"kernel": jax.device_put(np.random.default_rng(step).standard_normal((64, 64), np.float32))}}
    zero = jax.device_put(np.int32(0))
    return State(
        step=zero, params=params, frozen={}, opt_state={"mu": params}, ema=None, skipped=zero, bad_in_a_row=zero
    )


ABSTRACT = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state_of(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of steps 4 and 8, and frozen parameters."""
    folder = tmp_path_factory.mktemp("files") / "checkpoints"
    checkpoint.save_frozen(folder, {"embedding": state_of(0).params["layers"]["kernel"]})
    with checkpoint.manager(folder, keep=2) as checkpoints:
        for step in (4, 8):
            checkpoint.save(checkpoints, state_of(step), step=step, meta={"step": step}, source={"seen": np.arange(3)})
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


@pytest.fixture
def nothing_is_read(monkeypatch):
    """Orbax and tensorstore end the test if they are asked for anything."""
    monkeypatch.setattr(checkpoint, "ocp", None)
    monkeypatch.setattr(stacked, "ts", None)


def largest(folder):
    kept = [path for path in folder.rglob("*") if path.is_file() and path.name != files.FILE]
    return max(kept, key=lambda path: path.stat().st_size)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def read_frozen(folder):
    return checkpoint.stored(folder, folders.FROZEN)


DAMAGES = {
    cut: "{path} has {half} bytes, and had {size} when it was saved",
    lengthen: "{path} has {longer} bytes, and had {size} when it was saved",
    os.unlink: "{path} is missing ({size} bytes when it was saved)",
    flip: "{path} has other content than when it was saved",
}
READERS = {
    "restore": ("rest", lambda folder: checkpoint.restore_step(folder / "8", ABSTRACT)),
    "source": ("source", lambda folder: checkpoint.restore_step(folder / "8", ABSTRACT)),
    "load": ("params", lambda folder: checkpoint.read_params(folder / "8", ABSTRACT.params)),
    "names": ("params", lambda folder: checkpoint.stored(folder / "8", "params")),
    "export": ("params", lambda folder: stacked.StackedReader(folder / "8")),
    "frozen": ("../frozen", lambda folder: checkpoint.read_params(folder / "8", ABSTRACT.params)),
}


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("reader", READERS)
def test_damage_is_named_with_the_file_and_its_sizes_before_anything_is_read(reader, damage, copied):
    item, read = READERS[reader]
    path = largest((copied / "8" / item).resolve())
    size = path.stat().st_size
    damage(path)
    message = DAMAGES[damage].format(path=path, size=f"{size:,}", half=f"{size // 2:,}", longer=f"{size + 1:,}")
    message = f"the checkpoint {copied / '8'} cannot be read: {message}. Copy it again from where it is whole, or use"
    with pytest.raises(folders.CheckpointError, match=re.escape(message)):
        read(copied)


@pytest.mark.parametrize("item", ["params", "rest", "meta"])
def test_a_checkpoint_with_a_damaged_item_is_put_aside_and_the_one_before_it_is_used(item, copied, capsys):
    cut(copied / "8" / "meta" / "metadata" if item == "meta" else largest(copied / "8" / item))
    assert_same_bits(checkpoint.restore(copied, ABSTRACT).state.params, state_of(4).params)
    assert f"WARNING: the checkpoint {copied / '8'} cannot be read" in capsys.readouterr().out
    assert sorted(path.name for path in copied.iterdir()) == ["4", "8.damaged", "frozen"]


def test_garbage_is_collected_after_what_cannot_be_read_alone(copied, monkeypatch):
    """It takes half a second where much has been traced."""
    collected = []
    monkeypatch.setattr(gc, "collect", lambda: collected.append(True))
    checkpoint.restore(copied, ABSTRACT)
    assert not collected
    with pytest.raises(folders.CheckpointMismatch):
        checkpoint.restore(copied, ABSTRACT.replace(opt_state={}))
    assert collected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"params": {"layers": {"kernel": np.zeros((64, 64), "bfloat16")}}},
            "float32 .* in the checkpoint and bfloat16",
        ),
        ({"opt_state": {}}, "in the checkpoint and missing in the model or optimizer"),
        ({"opt_state": {"mu": ABSTRACT.params, "nu": ABSTRACT.params}}, "nu/.* missing in the checkpoint and"),
    ],
    ids=["type", "fewer arrays", "more arrays"],
)
def test_a_sound_checkpoint_of_another_state_is_no_damage(changes, message, copied):
    with pytest.raises(folders.CheckpointMismatch, match=message):
        checkpoint.restore(copied, ABSTRACT.replace(**changes))
    assert folders.steps_in(copied) == [8, 4]


def test_a_checkpoint_that_is_copied_again_opens_and_the_one_before_the_damaged_one_is_used(saved, copied):
    flip(largest(copied / "8" / "params"))
    assert_same_bits(checkpoint.restore(copied, ABSTRACT).state.params, state_of(4).params)
    shutil.copytree(saved / "8", copied / "8")
    assert_same_bits(checkpoint.restore(copied, ABSTRACT).state.params, state_of(8).params)


def test_what_is_written_down_is_every_file_of_every_item_and_other_files_beside_them_are_no_damage(copied):
    for item in [*(copied / "8" / name for name in ("params", "rest", "source")), copied / "frozen"]:
        told = json.loads((item / files.FILE).read_text())
        there = storage.sizes(item)
        assert told.keys() == there.keys() - {files.FILE}
        assert {name: kept["bytes"] for name, kept in told.items()}.items() <= there.items()
    (copied / "8" / "params" / ".DS_Store").write_text("of a file manager")
    checkpoint.restore_step(copied / "8", ABSTRACT)


def test_checkpoints_of_earlier_versions_open_as_before(copied):
    for path in copied.rglob(files.FILE):
        path.unlink()
    assert_same_bits(checkpoint.restore(copied, ABSTRACT).state.params, state_of(8).params)


def test_a_checkpoint_whose_files_cannot_be_written_down_gets_no_name(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "write_json", full)
    with pytest.raises(OSError, match="No space left"), checkpoint.manager(tmp_path, keep=1) as checkpoints:
        checkpoint.save(checkpoints, state_of(4), step=4, meta={})
    assert folders.steps_in(tmp_path) == []
