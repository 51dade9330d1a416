"""Tokenizers give back exactly what they were given, and say what is wrong when they cannot be trained or read."""

import functools
import inspect
import json
import re
import signal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmjax.config import base
from llmjax.data import tokenizer_stage, tokens
from llmjax.data.tokenizer import PROBE, Tokenizer
from llmjax.data.tokenizer_files import load_tokenizer
from llmjax.data.tokenizer_training import train_tokenizer
from llmjax.errors import UserError

KINDS = ("bpe", "unigram", "char", "byte")
TEXTS = (
    "def f(x):\n    if x:\n        return x + 1\n\n\n# caf\u00e9 \u2581 x\t1\r\n" * 50,
    "the quick brown fox jumps over the lazy dog\n" * 40,
    "\u4e2d\u6587 <bos> <0x41>\n" * 9,
    inspect.getsource(json),
)
AWKWARD = st.sampled_from(
    [
        "\u2581",
        "\u2585",
        "\x00",
        "\r",
        "\t",
        "\n    ",
        "\n  ",
        "   ",
        "e\u0301",
        "\ufeff",
        "\ufffd",
        "\U0001f600",
        "<bos>",
        "<pad>",
        "<unk>",
        "<0x41>",
    ]
)
ANY_TEXT = st.lists(st.one_of(AWKWARD, st.text(st.characters(exclude_categories=("Cs",))))).map("".join)


@functools.cache
def trained(kind: str) -> Tokenizer:
    return train_tokenizer(TEXTS, kind=kind, vocab_size=400)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=ANY_TEXT)
def test_any_text_comes_back_exactly_and_no_special_id_comes_out(kind, text):
    tokenizer = trained(kind)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(4 <= i < tokenizer.vocab_size for i in ids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_encodes_as_its_texts_do_one_by_one(kind):
    texts = [*TEXTS, "", PROBE, "\u2581"]
    assert trained(kind).encode_batch(texts) == [trained(kind).encode(text) for text in texts]


@pytest.mark.parametrize("kind", KINDS)
def test_training_twice_gives_the_same_file_and_a_saved_tokenizer_loads_as_it_was(kind, tmp_path):
    again = train_tokenizer(TEXTS, kind=kind, vocab_size=400)
    assert again.fingerprint == trained(kind).fingerprint
    file = again.save(tmp_path)
    for path in (file, tmp_path):
        loaded = load_tokenizer(path)
        assert loaded.piece_bytes == again.piece_bytes
        assert loaded.encode(PROBE) == again.encode(PROBE)


def test_newlines_and_indentation_are_one_token():
    assert len(trained("bpe").encode("\n        ")) == 1


def test_char_has_a_piece_for_every_character_that_occurs():
    tokenizer = trained("char")
    for character in set("".join(TEXTS)) - {"\u2581", "\t"}:  # the two that SentencePiece keeps for itself
        assert len(tokenizer.encode(character)) == 1


@pytest.mark.parametrize("split_digits", [True, False])
def test_split_digits_decides_whether_digits_join(split_digits):
    tokenizer = train_tokenizer(["2024 " * 200 + "abc"], kind="bpe", vocab_size=276, split_digits=split_digits)
    joined = [piece for piece in tokenizer.piece_bytes if len(piece.strip()) > 1 and piece.strip().isdigit()]
    assert bool(joined) != split_digits


@pytest.mark.parametrize("kind", KINDS)
def test_a_lone_surrogate_is_a_clear_error(kind):
    with pytest.raises(ValueError, match=r"lone surrogate, U\+D800, at character 1"):
        trained(kind).encode("a\ud800")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("vocab_size", [-5, 0, 3, 20, 50_000])
def test_the_vocabulary_size_that_an_error_names_works(kind, vocab_size):
    with pytest.raises(ValueError, match=r"set tokenizer.vocab_size=\d+ or") as caught:
        train_tokenizer(TEXTS, kind=kind, vocab_size=vocab_size)
    size = int(str(caught.value).partition("set tokenizer.vocab_size=")[2].split()[0])
    assert train_tokenizer(TEXTS, kind=kind, vocab_size=size).vocab_size == size


def test_no_text_at_all_is_a_clear_error():
    with pytest.raises(ValueError, match="no text to train a tokenizer on"):
        train_tokenizer(["", "\0"], kind="bpe", vocab_size=400)


def test_a_file_that_is_no_tokenizer_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer at"):
        load_tokenizer(tmp_path)
    file = tmp_path / "broken.model"
    file.write_bytes(trained("bpe").model[:100])
    with pytest.raises(ValueError, match=r"broken.model cannot be used"):
        load_tokenizer(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pad_id": -1}, "special ids"),
        ({"byte_fallback": False}, "byte_fallback"),
        ({"add_dummy_prefix": True}, "changes the text"),
    ],
)
def test_an_incompatible_model_is_refused_with_the_option_that_mends_it(tmp_path, change, message):
    import sentencepiece

    options = {
        "pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "byte_fallback": True, "add_dummy_prefix": False,
        "remove_extra_whitespaces": False, "normalization_rule_name": "identity", "minloglevel": 2,
        "hard_vocab_limit": False,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(tmp_path / "m"), vocab_size=400, **{**options, **change}
    )
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path / "m.model")


def write_prepared(workdir, texts_by_split):
    for split, sources in texts_by_split.items():
        (workdir / "prepare" / split).mkdir(parents=True)
        for source, texts in sources.items():
            rows = [{"id": str(i), "source": source, "group": "g", "path": "p", "text": t} for i, t in enumerate(texts)]
            (workdir / "prepare" / split / f"{source}-00000.jsonl").write_bytes(
                b"".join(json.dumps(r).encode() + b"\n" for r in rows)
            )


def stage_config(**keys):
    c = base()
    c.data.record_tokens = 64
    c.tokenizer.vocab_size = 400
    for key, value in keys.items():
        c.tokenizer[key] = value
    return c


@pytest.mark.parametrize("kind", KINDS)
def test_the_stage_writes_each_document_between_bos_and_eos(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(tokens, "FILE_TOKENS", 640)  # several files
    monkeypatch.setattr(tokens, "BATCH_BYTES", 2000)  # several batches
    write_prepared(tmp_path, {"train": {"code": TEXTS, "notes": [PROBE, ""]}, "heldout": {"code": ["held out"]}})
    results = tokenizer_stage.run(stage_config(kind=kind), tmp_path)
    folder = tmp_path / "tokenizer" / "tokens"
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    for split, source, texts in [
        ("train", "code", TEXTS),
        ("train", "notes", [PROBE, ""]),
        ("heldout", "code", ["held out"]),
    ]:
        expected = [i for text in texts for i in (1, *tokenizer.encode(text), 2)]
        stream = tokens.read_stream(folder, split, source)
        assert stream.tolist() == expected
        assert stream.dtype == np.uint16
    assert len(tokens.load_index(folder).splits["train"]["code"]["files"]) > 1
    assert results["train_tokens"] == len(tokens.read_stream(folder, "train", "code")) + len(
        tokens.read_stream(folder, "train", "notes")
    )
    assert results["vocab_size"] == tokenizer.vocab_size


def test_an_existing_model_is_used_and_gives_the_same_shards(tmp_path):
    model = trained("bpe").save(tmp_path)
    write_prepared(tmp_path, {"train": {"code": TEXTS}, "heldout": {}})
    tokenizer_stage.run(stage_config(path=str(model)), tmp_path)
    assert load_tokenizer(tmp_path / "tokenizer").fingerprint == trained("bpe").fingerprint
    first = {p.name: p.read_bytes() for p in (tmp_path / "tokenizer").rglob("*") if p.is_file()}
    tokenizer_stage.run(stage_config(path=str(model)), tmp_path)
    assert {p.name: p.read_bytes() for p in (tmp_path / "tokenizer").rglob("*") if p.is_file()} == first


def test_train_bytes_limits_what_is_trained_on_evenly():
    texts = [f"{letter * 900}\n" for letter in "abcdefgh"] * 20
    from llmjax.data.tokenizer_training import _chunks, _sample

    taken = list(_sample(_chunks(texts), share=0.25))
    assert abs(sum(map(len, taken)) - 0.25 * sum(map(len, texts))) < 1000
    assert len({chunk[0] for chunk in taken[:20]}) > 1
    positions = [texts.index(chunk) for chunk in taken]
    assert positions == [p % 8 for p in range(positions[0], positions[0] + 4 * len(taken), 4)]


def test_the_stage_before_prepare_says_so(tmp_path):
    with pytest.raises(ValueError, match="run `llmjax prepare` first"):
        tokenizer_stage.run(stage_config(), tmp_path)


@pytest.mark.parametrize("damage", ["half", "last bytes", "missing", "flipped"])
def test_a_damaged_shard_is_named(tmp_path, damage):
    write_prepared(tmp_path, {"train": {"code": TEXTS}, "heldout": {}})
    tokenizer_stage.run(stage_config(kind="byte"), tmp_path)
    file = tmp_path / "tokenizer" / "tokens" / "train" / "code" / "00000.array_record"
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "flipped":
        # Past the file's own header of 64 bytes, in the first records; further on there is padding.
        file.write_bytes(data[:200] + bytes(byte ^ 255 for byte in data[200:264]) + data[264:])
    else:
        file.write_bytes(data[: len(data) // 2] if damage == "half" else data[:-5])
    with pytest.raises(ValueError, match=r"00000.array_record is .*run `llmjax tokenizer` again"):
        tokens.read_stream(tmp_path / "tokenizer" / "tokens", "train", "code")


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    resource = pytest.importorskip("resource")  # a limit on the size of files stands for the full disk
    ignored, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    text = "".join(map(chr, np.random.default_rng(0).integers(32, 1000, size=200_000)))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*00000.array_record"):
            tokens.write_stream([text], trained("byte"), folder=tmp_path / "s", record_tokens=4096)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_missing_index_or_source_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="run `llmjax tokenizer` first"):
        tokens.load_index(tmp_path)
    write_prepared(tmp_path, {"train": {"code": TEXTS}, "heldout": {}})
    tokenizer_stage.run(stage_config(kind="byte"), tmp_path)
    with pytest.raises(ValueError, match=r"no train stream of source 'other' .* there are: code"):
        tokens.read_stream(tmp_path / "tokenizer" / "tokens", "train", "other")


def test_the_size_that_an_error_names_can_be_trained():
    texts = ["the quick brown fox jumps over the lazy dog\n" * 20]
    for size, says in ((-5, "small"), (2**40, "large")):
        with pytest.raises(UserError, match=f"vocab_size={size} is too {says}: .* set tokenizer.vocab_size=") as caught:
            train_tokenizer(texts, kind="bpe", vocab_size=size)
        named = int(re.search(r"set tokenizer.vocab_size=(\d+)", str(caught.value))[1])
        assert train_tokenizer(texts, kind="bpe", vocab_size=named).vocab_size == named
    with pytest.raises(UserError, match="nothing but line feeds"):
        train_tokenizer(["\n\n"], kind="bpe", vocab_size=300)
