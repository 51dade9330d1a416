"""A model goes on learning text: of a domain beside replayed general text, with more tokens, at greater length."""

import json
import math
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import few, mesh_of, tiny_config
from jax.sharding import NamedSharding, PartitionSpec

import llmjax
from llmjax import cli, config, recipe
from llmjax.data import replay
from llmjax.data.batches import TrainBatches
from llmjax.data.tokenizer import Tokenizer
from llmjax.data.tokenizer_extension import Extension, extend, read_extension
from llmjax.data.tokenizer_files import load_tokenizer
from llmjax.data.tokenizer_training import train_tokenizer
from llmjax.errors import UserError
from llmjax.train import vocabulary

GENERAL = ["the model reads a line and writes another one\n" * 3, "def f(x): return x + 1  # a line\n" * 3]
DOMAIN = ["phosphoglycerate kinase binds ADP; kinase ++ ΔG° 1234 phosphoglycerate 🙂 naïve\n" * 9]
TEXT = "  phosphoglycerate kinase, <sep> ΔG° 1234\n\n\tnaïve \u2581 🙂 kinases phosphoglycerates ++"


def of_json(folder: Path, kind: str) -> Tokenizer:
    """A tokenizer.json of the `tokenizers` package, as an imported model has one."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    specials = ["<unk>", "<|end|>"]
    if kind == "BPE":
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        made.train_from_iterator(GENERAL, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
        made.add_special_tokens(specials)  # behind the vocabulary, as Llama 3's
    else:
        made = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")]
        made = tokenizers.Tokenizer(
            models.WordPiece({t: i for i, t in enumerate([*specials, *letters])}, unk_token="<unk>")
        )
        made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        made.add_special_tokens(specials)
    made.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def base_tokenizer(folder: Path, kind: str) -> Tokenizer:
    folder.mkdir()
    if kind in ("BPE", "WordPiece"):
        return of_json(folder, kind)
    return train_tokenizer(GENERAL, kind=kind, vocab_size=290)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "BPE", "WordPiece"])
def test_new_tokens_follow_the_old_ones_and_texts_come_back(tmp_path, kind):
    base = base_tokenizer(tmp_path / "base", kind)
    named = ("<sep>",)
    made = extend(base, DOMAIN, tmp_path / "made", named=named, learnt=12)
    size = base.vocab_size
    assert made.vocab_size == size + 13 and made.piece_bytes[:size] == base.piece_bytes
    assert dict(made.control_ids) == dict(base.control_ids) and made.eos_ids == base.eos_ids
    before, after = base.encode(TEXT), made.encode(TEXT)
    assert size in after and max(after) > size and len(after) < len(before) - 15
    assert after == made.encode(TEXT)
    if base.exact:
        assert made.exact and made.decode(after) == TEXT
        old = "def f(x): 12 = y"  # nothing new in it
        assert made.encode(old) == base.encode(old)
    extension = read_extension(tmp_path / "made")
    assert extension is not None and extension.base == base.fingerprint and extension.base_size == size
    assert extension.parts[0] == tuple(base.encode("<sep>"))
    for i, parts in enumerate(extension.parts[1:], size + 1):  # a token stands for the bytes of its parts
        assert made.piece_bytes[i] == b"".join(base.piece_bytes[p] for p in parts)
    assert not any(
        any(48 <= byte < 58 for byte in piece) for piece in made.piece_bytes[size + 1 :]
    )  # digits stay alone
    again = extend(base, DOMAIN, tmp_path / "again", named=named, learnt=12)
    assert again.model == made.model
    second = extend(made, DOMAIN, tmp_path / "second", named=("<two>",), learnt=0)
    assert second.vocab_size == made.vocab_size + 1 and second.encode("<two>")[-1] == made.vocab_size


def test_what_cannot_be_added_is_refused_by_name(tmp_path):
    base = base_tokenizer(tmp_path / "base", "bpe")
    for named, told in ((("a",), "one token already"), ((" ",), "visible"), (("a\u2581b",), "U\\+2581")):
        with pytest.raises(UserError, match=told):
            extend(base, DOMAIN, tmp_path / "no", named=named, learnt=0)
    with pytest.raises(UserError, match="add_learnt=999 is more .*: set it to ") as refused:
        extend(base, DOMAIN, tmp_path / "no", named=(), learnt=999)
    advised = int(str(refused.value).partition("set it to ")[2].partition(",")[0])
    assert extend(base, DOMAIN, tmp_path / "some", named=(), learnt=advised).vocab_size == base.vocab_size + advised
    for kind in ("byte", "char"):
        with pytest.raises(UserError, match="no tokens can be added to this tokenizer"):
            extend(
                train_tokenizer(GENERAL, kind=kind, vocab_size=300), DOMAIN, tmp_path / "no", named=("<x>",), learnt=0
            )
    assert not (tmp_path / "no").exists()
    with pytest.raises(UserError, match="give train.init_from or tokenizer.path"):
        tiny_config(tokenizer__add_learnt=3)


@pytest.mark.parametrize("mesh", few(["data=1", "fsdp=4"]))
def test_new_rows_are_the_mean_of_their_parts_in_the_embedding_and_in_a_head_of_its_own(mesh):
    devices = mesh_of(mesh)
    place = NamedSharding(devices, PartitionSpec("fsdp" if "fsdp" in mesh else None))
    rng = np.random.default_rng(0)
    old = {
        "embedding": rng.normal(size=(6, 4)), "head": {"kernel": rng.normal(size=(4, 6))},
        "head_bias": rng.normal(size=6), "final_norm": {"scale": rng.normal(size=4)},
    }  # fmt: skip
    shapes = {"embedding": (8, 4), "head": {"kernel": (4, 8)}, "head_bias": (8,), "final_norm": {"scale": (4,)}}
    like = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place),
        shapes,
        is_leaf=lambda x: type(x) is tuple,
    )
    stored = vocabulary.stored(like, rows=6)
    assert stored["embedding"].shape == (6, 4) and stored["head"]["kernel"].shape == (4, 6)
    params = jax.tree.map(lambda x, s: jax.device_put(jnp.asarray(x, jnp.float32), s.sharding), old, stored)
    made = vocabulary.extended(params, like, Extension("", 5, ((0, 1, 1), (4,))))  # row 5 was padding
    assert jax.tree.map(lambda x: (x.shape, x.sharding), made) == jax.tree.map(lambda x: (x.shape, x.sharding), like)
    for rows, before in (
        (made["embedding"], old["embedding"]), (made["head"]["kernel"].T, old["head"]["kernel"].T),
        (made["head_bias"], old["head_bias"]),
    ):  # fmt: skip
        new = [(before[0] + 2 * before[1]) / 3, before[4], before[:5].mean(axis=0)]
        np.testing.assert_allclose(rows, [*before[:5], *new], rtol=1e-6)


@pytest.fixture
def base_run(tiny_sources, tmp_path, one_device):
    """A run with a tokenizer of pieces, and text of a domain."""
    c = tiny_config(tiny_sources, tokenizer__kind="bpe", tokenizer__vocab_size=300, train__duration="2 steps")
    recipe.run(c, tmp_path / "base", ("prepare", "tokenizer", "train"))
    for i in range(12):
        folder = tmp_path / "domain"
        folder.mkdir(exist_ok=True)
        (folder / f"{i}.txt").write_text(f"Entry {i}: phosphoglycerate kinase binds another kinase.\n" * 4)
    return tmp_path / "base"


def cpt(base: Path, sources: Path, *more: str, name: str = "cpt") -> int:
    given = [f"domain={base.parent / 'domain'}", f"general={sources}"]
    return cli.main([
        "cpt", "--config", "configs/post/cpt.py", "--workdir", str(base.parent / name), f"--config.data.sources={given}",
        f"--config.train.init_from={base}", "--config.data.replay=['general']", "--config.data.holdout_percent=25",
        "--config.data.min_bytes=1", "--config.prepare.workers=1", "--config.train.sequence_length=16",
        "--config.train.batch_size=8", "--config.train.eval_batches=1", "--config.train.eval_every=0 steps", *more,
    ])  # fmt: skip


def test_a_run_goes_on_with_more_tokens_and_measures_domain_and_general_text(base_run, tiny_sources):
    more = (
        "--config.tokenizer.add_learnt=12",
        "--config.tokenizer.add_tokens=['<sep>']",
        "--config.train.duration=6 steps",
    )
    assert cpt(base_run, tiny_sources, *more, "--config.optimizer.learning_rate=0.02") == 0
    base, made = llmjax.load(base_run), llmjax.load(base_run.parent / "cpt")
    assert made.tokenizer.vocab_size == 313 and made.config.model.vocab_size == 320
    assert made.tokenizer.encode("kinase<sep>") != base.tokenizer.encode("kinase<sep>")
    results = json.loads((base_run.parent / "cpt" / "results.json").read_text())
    for group in replay.DOMAIN, replay.GENERAL:
        for name in f"heldout_loss/{group}", f"heldout_bits_per_byte/{group}":
            assert math.isfinite(results[f"train/{name}"]) and math.isfinite(results[f"train/before/{name}"])
        assert results[f"bits_per_byte/{group}"] > 0
    # Rows of new tokens begin where their parts are: the text costs no more than a uniform guess.
    assert results["train/before/heldout_loss/domain"] < 1.05 * math.log(320)
    assert results["train/heldout_bits_per_byte/domain"] < 0.9 * results["train/before/heldout_bits_per_byte/domain"]


@pytest.mark.slow
def test_a_run_that_starts_from_an_extended_one_has_its_tokenizer_and_adds_none(base_run, tiny_sources):
    step = "--config.train.duration=1 step"
    assert cpt(base_run, tiny_sources, "--config.tokenizer.add_learnt=12", step) == 0
    assert cpt(base_run.parent / "cpt", tiny_sources, step, name="next") == 0
    made, after = (llmjax.load(base_run.parent / name).tokenizer for name in ("cpt", "next"))
    assert made.vocab_size == 312 and after.fingerprint == made.fingerprint


def test_a_share_of_the_rows_is_general_text(tiny_sources, tmp_path):
    (tmp_path / "domain.txt").write_text("kinase binds another kinase\n" * 40)
    run, given = tmp_path / "run", (f"domain={tmp_path / 'domain.txt'}", f"general={tiny_sources}")
    c = tiny_config(
        data__sources=given, data__holdout_percent=0.0, data__replay=("general",), data__replay_percent=25.0
    )
    recipe.run(c, run, ("prepare", "tokenizer"))
    batches = TrainBatches(c, run / "tokenizer" / "tokens", total_steps=64)
    seen = batches.epochs(64)
    rows = Counter({name: round(epochs * batches._counts[name]) for name, epochs in seen.items()})
    assert rows["general"] == 64 * 8 / 4 and rows.total() == 64 * 8
    with pytest.raises(UserError, match="data.replay=.* must name some of the sources .* domain, general"):
        TrainBatches(config.override(c.copy_and_resolve_references().unlock(), ["data.replay=['other']"]),
                     run / "tokenizer" / "tokens", total_steps=64)  # fmt: skip
    with pytest.raises(UserError, match="leave one of them empty"):
        config.override(c.copy_and_resolve_references().unlock(), ["data.mixture=['0%: general=1']"])


@pytest.mark.slow
def test_a_longer_context_is_trained_with_stretched_positions(base_run, tiny_sources):
    longer = ("--config.model.rotary_scaling=yarn", "--config.model.rotary_factor=4.0",
              "--config.model.rotary_original_length=16", "--config.model.max_length=64")  # fmt: skip
    assert (
        cpt(base_run, tiny_sources, *longer, "--config.train.sequence_length=64", "--config.train.duration=1 step") == 0
    )
    made = llmjax.load(base_run.parent / "cpt")
    assert made.config.model.rotary_scaling == "yarn" and made.config.model.width == 32


def test_a_config_that_continues_nothing_is_refused(tiny_sources, tmp_path, capsys):
    assert cli.main(["cpt", "--config", "configs/quickstart.py", "--workdir", str(tmp_path / "no")]) == 2
    assert "begin with configs/post/cpt.py, and give --config.train.init_from=RUN" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
