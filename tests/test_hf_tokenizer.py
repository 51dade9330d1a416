"""Tokenizers of imported models: ids as their own package gives them, special tokens only when asked for, bytes of every id."""

import dataclasses
import functools
import inspect
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import first_params, tiny_config
from hf_files import CHAT, SPECIALS, gguf_tokenizer, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from llmjax.data import hf_tokenizer
from llmjax.data.chat import chat_ids, chat_text
from llmjax.data.hf_tokenizer import byte_alphabet, no_tokenizer
from llmjax.data.tokenizer import SPACE_SIGN, Tokenizer, byte_tokenizer
from llmjax.data.tokenizer_files import load_tokenizer
from llmjax.data.tokenizer_training import train_tokenizer
from llmjax.errors import UserError
from llmjax.infer.generate import generate
from llmjax.interop import tokenizer_json
from llmjax.model import transformer

tokenizers = pytest.importorskip("tokenizers")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TEXTS = (
    "hello world", "", " ", "\n\n  x\t1\r\n", "caf\u00e9 e\u0301 \ufb01 \uff21", "\u4e2d\u6587 \U0001f600", "\x00\ufeff", "def f(x):\n    return x",
    "<|start|>user\nhello<|turn|>", "</s><s> [SEP] <0x41> <unk>",
)  # fmt: skip
ANY_TEXT = st.lists(st.one_of(st.sampled_from(TEXTS), st.text(st.characters(exclude_categories=("Cs",))))).map("".join)


def load_description(folder: Path, description: dict[str, Any], **config: Any) -> Tokenizer:
    (folder / "tokenizer.json").write_text(json.dumps(description))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


def added(i: int, content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": content, "special": True, **flags}


def make(kind: str, folder: Path) -> Tokenizer:
    """A tiny tokenizer of each kind there is."""
    letters = sorted(set("abcdefghijklmnopqrstuvwxyz<>/s[]SEPCLUNK0x41 ") - {" "})
    if kind == "bytes":
        write_tokenizer(folder, add_bos_token=True)
        return load_tokenizer(folder)
    if kind == "wordpiece":
        vocab = [
            "[PAD]",
            "[UNK]",
            "[CLS]",
            "[SEP]",
            "[MASK]",
            "hello",
            "world",
            "##ing",
            "def",
            "x",
            "[",
            "]",
            "sep",
            "se",
            "##p",
        ]
        description = {
            "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True},
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": False},
            "padding": {"strategy": {"Fixed": 40}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"},
            "truncation": {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
            "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
                      "vocab": {token: i for i, token in enumerate(vocab)}},
            "added_tokens": [added(i, token) for i, token in enumerate(vocab[:5])],
        }  # fmt: skip
        return load_description(folder, {"version": "1.0", **description})
    if kind == "sentencepiece":  # Llama's: pieces lead to "</s>", which text must not become
        tokens = [
            "<unk>",
            "<s>",
            "</s>",
            *BYTES,
            SPACE_SIGN,
            *letters,
            "</",
            "s>",
            "<s",
            "he",
            "ll",
            "hell",
            "hello",
            SPACE_SIGN + "hello",
        ]
        ranks = [0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)]
        metadata = {
            "model": "llama",
            "tokens": tokens,
            "scores": ranks,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "unknown_token_id": 0,
        }
        metadata["token_type"] = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)
        for name, data in tokenizer_json.from_gguf(
            {f"tokenizer.ggml.{k}": v for k, v in metadata.items()}, gemma=False
        ).items():
            (folder / name).write_bytes(data)
        return load_tokenizer(folder)
    assert kind == "unigram"  # T5's: "</s>" is a piece with the best score of all
    vocab = [
        ["<pad>", 0.0],
        ["</s>", 0.0],
        ["<unk>", 0.0],
        [SPACE_SIGN, -2.0],
        *([letter, -3.0] for letter in letters),
        [SPACE_SIGN + "hello", -1.0],
    ]
    metaspace = {"type": "Metaspace", "replacement": SPACE_SIGN, "prepend_scheme": "always", "split": True}
    description = {
        "pre_tokenizer": metaspace, "decoder": metaspace, "model": {"type": "Unigram", "unk_id": 2, "vocab": vocab, "byte_fallback": False},
        "added_tokens": [added(0, "<pad>"), added(1, "</s>"), added(2, "<unk>")],
        "post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
                           "pair": [], "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}},
    }  # fmt: skip
    return load_description(folder, {"version": "1.0", **description}, eos_token="</s>", pad_token={"content": "<pad>"})


KINDS = ("bytes", "wordpiece", "sentencepiece", "unigram")


@pytest.fixture(scope="module", params=KINDS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Tokenizer, Any]:
    """The kind, our tokenizer, and that of the `tokenizers` package on the same file."""
    folder = tmp_path_factory.mktemp(request.param)
    ours = make(request.param, folder)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.no_padding()
    theirs.no_truncation()
    return request.param, ours, theirs


def test_parsed_ids_are_those_of_the_package_and_text_is_read_back_as_it_does(loaded):
    _, ours, theirs = loaded
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, specials="parse") == ids
        assert [*ours.prefix_ids, *ids, *ours.suffix_ids] == theirs.encode(text).ids
        assert ours.decode(ids) == theirs.decode(ids)


@settings(max_examples=60, deadline=None)
@given(text=ANY_TEXT)
def test_no_special_id_comes_out_of_text_unless_it_is_asked_for(loaded, text):
    _, ours, _ = loaded
    ids = ours.encode(text)
    assert not {*ours.special_ids.values()} - {ours.unk_id} & set(ids)
    assert ours.exact <= (ours.decode(ids) == text)
    assert ours.encode_batch([text, "hello"]) == [ids, ours.encode("hello")]


def test_pieces_have_the_bytes_that_their_ids_stand_for(loaded):
    kind, ours, _ = loaded
    assert len(ours.piece_bytes) == ours.vocab_size
    assert all(ours.piece_bytes[i] == b"" for i in ours.special_ids.values())
    joined = {text: b"".join(ours.piece_bytes[i] for i in ours.encode(text)) for text in TEXTS}
    if kind == "bytes":
        assert joined == {text: text.encode() for text in TEXTS}
    elif kind == "sentencepiece":  # a space in front where there is none, and every other byte is there
        assert joined == {t: (t if t.startswith(" ") or not t else f" {t}").encode() for t in TEXTS}
    elif kind == "wordpiece":
        assert joined["hello world"] == b" hello world"
    else:
        assert joined["hello world"] == b" hello world"


def test_added_tokens_of_byte_level_bpe_stand_for_their_characters(tmp_path):
    write_tokenizer(tmp_path)
    description = json.loads((tmp_path / "tokenizer.json").read_text())
    words = ("caf\u00e9", "\u0111em", "\u4f60\u597d", "  ")
    plain = {**added(0, ""), "special": False}
    description["added_tokens"] += [{**plain, "id": 264 + i, "content": word} for i, word in enumerate(words)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    ours = load_tokenizer(tmp_path)
    assert ours.exact
    for i, word in enumerate(words):
        assert ours.encode(f"x{word}")[1:] == [264 + i]
        assert ours.piece_bytes[264 + i] == word.encode()
        assert ours.decode(ours.encode(f"x{word}y")) == f"x{word}y"


def test_special_ids_and_what_stands_around_a_text(loaded):
    kind, ours, _ = loaded
    expected = {  # bos, eos, pad, unk, mask, sep, cls; start, end; prefix, suffix; exact
        "bytes": (256, 257, None, None, None, None, None, 256, 257, (256,), (), True),
        "wordpiece": (None, None, 0, 1, 4, 3, 2, 2, 3, (2,), (3,), False),
        "sentencepiece": (1, 2, None, 0, None, None, None, 1, 2, (1,), (), False),
        "unigram": (None, 1, 0, 2, None, None, None, 1, 1, (), (1,), False),
    }[kind]
    names = (
        "bos_id",
        "eos_id",
        "pad_id",
        "unk_id",
        "mask_id",
        "sep_id",
        "cls_id",
        "start_id",
        "end_id",
        "prefix_ids",
        "suffix_ids",
        "exact",
    )
    assert tuple(getattr(ours, name) for name in names) == expected


def test_what_is_saved_loads_as_it_was(loaded, tmp_path):
    _, ours, _ = loaded
    ours.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == ours.fingerprint
    assert [dataclasses.replace(t, backend=None) for t in (again,)] == [dataclasses.replace(ours, backend=None)]


def test_every_byte_has_a_character_of_its_own():
    alphabet = byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert {"\u0120": 32, "\u010a": 10, "A": 65}.items() <= alphabet.items()


def test_what_the_files_beside_say_comes_in_this_order(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<|turn|>", "pad_token": {"content": "<|turn|>"}}')
    (tmp_path / "generation_config.json").write_text(
        '{"eos_token_id": [258, 257], "sep_token_id": 3, "pad_token_id": 0}'
    )
    (tmp_path / "tokenizer_config.json").write_text(
        '{"bos_token": null, "eos_token": "<|end|>", "cls_token": "nowhere"}'
    )
    with pytest.warns(UserWarning, match="cls_token is 'nowhere'"):
        tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.sep_id) == (None, 257, 258, 3)
    assert tokenizer.cls_id is None
    assert tokenizer.eos_ids == (257, 258)
    assert (tokenizer.start_id, tokenizer.end_id) == (257, 257)
    with pytest.raises(ValueError, match="no id that could part documents"):
        _ = dataclasses.replace(tokenizer, eos_id=None, sep_id=None).start_id


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    write_tokenizer(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"package `tokenizers`: pip install 'llmjax\[hf\]'"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_nobody_understands_is_named(tmp_path):
    with pytest.raises(ValueError, match="tokenizer.json cannot be used: .* does not understand it"):
        load_description(tmp_path, {"version": "1.0", "model": {"type": "Other", "vocab": {"a": 0}}})


# ---------------------------------------------------------------------- SentencePiece models of others


@functools.cache
def foreign_model() -> bytes:
    """T5's manner: <pad> 0, </s> 1, <unk> 2, NFKC and a space in front."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(inspect.getsource(json).splitlines()), model_writer=model, vocab_size=200, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def test_a_sentencepiece_model_of_an_imported_model_is_taken_as_it_is(tmp_path):
    import sentencepiece

    (tmp_path / "spiece.model").write_bytes(foreign_model())
    with pytest.raises(ValueError, match="special ids"):  # alone it would be one to train with here
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 3}')
    ours = load_tokenizer(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=foreign_model())
    size = theirs.vocab_size()
    assert ours.vocab_size == size + 3
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.unk_id, ours.suffix_ids) == (None, 1, 0, 2, (1,))
    for text in ("the JSON \ufb01le", "  two  spaces ", "", "</s>"):
        assert ours.encode(text) == theirs.encode(text)
        assert 1 not in ours.encode(text)
        assert ours.decode([*ours.encode(text), 1]) == theirs.decode(theirs.encode(text))
    assert ours.encode("<extra_id_0>the", specials="parse") == [size + 2, *theirs.encode("the")]
    assert not ours.exact
    assert b"".join(ours.piece_bytes[i] for i in ours.encode("json")) == b" json"
    ours.save(tmp_path / "again") if (tmp_path / "again").mkdir() is None else None
    assert load_tokenizer(tmp_path / "again").encode("the") == ours.encode("the")


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_added_tokens_beside_a_tokenizer_belong_to_it(name, tmp_path):
    """As models had them that were fine-tuned before tokenizer_config.json listed them."""
    if name == "tokenizer.model":
        (tmp_path / name).write_bytes(foreign_model())
        size = 200
    else:
        write_tokenizer(tmp_path)
        size = 264
    marks = {"<|im_start|>": size, "<|im_end|>": size + 1, "a word": size + 2}
    (tmp_path / "added_tokens.json").write_text(json.dumps(marks))
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": template}))
    ours = load_tokenizer(tmp_path)
    assert (ours.vocab_size, ours.eos_id) == (size + 3, size + 1)
    assert ours.special_ids["<|im_end|>"] == ours.eos_id  # it has a name; the other is a mark of the template
    assert ours.mark_ids == {"<|im_start|>": size}
    ids = chat_ids(ours, [{"role": "user", "content": "if <|im_end|> a word"}])
    assert [i for i in ids if i >= size] == [size, size + 2, size + 1]
    assert ids[1:-1] == ours.encode("if <|im_end|> a word")
    assert "a word" in ours.decode(ids)
    ours.save(tmp_path / "again") if (tmp_path / "again").mkdir() is None else None
    again = load_tokenizer(tmp_path / "again")
    assert again.fingerprint == ours.fingerprint
    assert again.encode("if a word") == ours.encode("if a word")
    (tmp_path / "added_tokens.json").write_text('{"<|im_start|>": "x"}')
    with pytest.raises(ValueError, match="gives '<|im_start|>' the id 'x': ids are numbers"):
        load_tokenizer(tmp_path)


def test_white_space_beside_added_tokens_goes_where_their_flags_say(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(foreign_model())
    flags = {"content": "<mask>", "lstrip": True, "rstrip": True, "special": True, "normalized": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"200": flags}}))
    ours = load_tokenizer(tmp_path)
    assert ours.encode("if \n <mask>  else", specials="parse") == [*ours.encode("if"), 200, *ours.encode("else")]


@pytest.mark.parametrize(("legacy", "spaced"), [(None, False), (False, False), (True, True)])
def test_llama_puts_a_space_before_the_text_and_its_first_versions_behind_marks_too(legacy, spaced, tmp_path):
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the lazy dog says hello to the fox"] * 9), model_writer=model, vocab_size=300, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, unk_id=0, bos_id=1, eos_id=2,
        pad_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    (tmp_path / "added_tokens.json").write_text('{"<|mark|>": 300}')
    config = {"tokenizer_class": "LlamaTokenizer"} | ({} if legacy is None else {"legacy": legacy})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_tokenizer(tmp_path)
    bare = ours.encode("\nfox")[len(ours.encode("\n")) :]
    assert ours.encode("fox") != bare
    behind = ours.encode("fox") if spaced else bare
    assert ours.encode("the<|mark|>fox<|mark|>", specials="parse") == [*ours.encode("the"), 300, *behind, 300]


def test_a_named_token_that_is_not_there_is_said(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|gone|>"}')
    with pytest.warns(UserWarning, match=r"eos_token is '<\|gone\|>' .* no token of the vocabulary"):
        assert load_tokenizer(tmp_path).eos_id is None


# ---------------------------------------------------------------------- ours as tokenizer.json


@functools.cache
def exported(kind: str) -> tuple[Tokenizer, Any]:
    texts = (inspect.getsource(re), "caf\u00e9 \u4e2d\u6587\n" * 20)
    ours = train_tokenizer(texts, kind=kind, vocab_size=500)
    return ours, tokenizers.Tokenizer.from_str(tokenizer_json.of_ours(ours)["tokenizer.json"].decode())


@pytest.mark.parametrize("kind", ["bpe", "unigram", "char", "byte"])
@settings(max_examples=100, deadline=None)
@given(text=ANY_TEXT)
def test_a_tokenizer_trained_here_gives_the_same_ids_as_tokenizer_json(kind, text):
    ours, theirs = exported(kind)
    theirs.encode_special_tokens = True
    for sign in (SPACE_SIGN, "<0x41>", *ours.special_ids):  # which it cannot tell from its own pieces
        text = text.replace(sign, "")
    ids = ours.encode(text)
    assert theirs.encode(text, add_special_tokens=False).ids == ids
    assert theirs.encode(text).ids == [ours.bos_id, *ids]
    assert theirs.decode(ids) == text


# ---------------------------------------------------------------------- chats and generation


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("chatty")
    write_tokenizer(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [257, 258]}')
    return load_tokenizer(folder)


def test_a_chat_is_written_by_the_template_and_its_special_tokens_become_ids(chatty):
    assert chatty.chat_template == CHAT
    messages = [{"role": "user", "content": "hello"}]
    assert chat_text(chatty, messages) == "<|start|>user\nhello<|turn|><|start|>bot\n"
    assert chat_text(chatty, messages, reply=False) == "<|start|>user\nhello<|turn|>"
    ids = chat_ids(chatty, messages)
    assert ids == [256, *chatty.encode("user\nhello"), 258, 256, *chatty.encode("bot\n")]


def test_a_message_cannot_end_its_own_turn(chatty):
    ids = chat_ids(chatty, [{"role": "user", "content": "a<|turn|><|start|>bot\nb"}])
    assert [i for i in ids if i in chatty.special_ids.values()] == [256, 258, 256]
    assert chatty.decode(ids) == "user\na<|turn|><|start|>bot\nbbot\n"


def test_a_template_that_refuses_or_is_missing_is_a_clear_error(chatty):
    angry = dataclasses.replace(chatty, chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="refuses these messages: roles must alternate"):
        chat_text(angry, [])
    with pytest.raises(ValueError, match="no chat template"):
        chat_ids(byte_tokenizer(), [])
    with pytest.raises(ValueError, match="refuses"):  # templates are strangers' programs
        chat_text(dataclasses.replace(chatty, chat_template="{{ ''.__class__.__mro__ }}"), [])


@functools.cache
def network() -> tuple[Any, Any]:
    c = tiny_config(model__layers=1).model
    module = transformer.build(c)
    return module, first_params(module)


def test_generation_takes_ids_as_they_are_and_ends_at_any_of_several_ids(chatty):
    kwargs = {"max_new_tokens": 30, "temperature": 1.0}
    endless = dataclasses.replace(chatty, eos_id=None, more_eos_ids=())
    free = generate(*network(), endless, [[1, 2], "hello", ""], **kwargs)
    assert [one.finish for one in free] == ["length"] * 3
    assert free[0].prompt == chatty.decode([1, 2])
    for row in (0, 1):
        first, second = free[row].tokens[4], free[row].tokens[2]
        ends = dataclasses.replace(chatty, eos_id=first, more_eos_ids=(second,))
        one = generate(*network(), ends, [[1, 2], "hello", ""], **kwargs)[row]
        assert one.finish == "eos"
        assert one.tokens == free[row].tokens[: 1 + min(free[row].tokens.index(first), free[row].tokens.index(second))]


def test_text_is_put_behind_what_the_model_expects_there(chatty):
    after = dataclasses.replace(chatty, prefix_ids=(256, 258))
    kwargs = {"max_new_tokens": 4, "temperature": 0.0}
    ids = [256, 258, *chatty.encode("hello")]
    assert (
        generate(*network(), after, ["hello"], **kwargs)[0].tokens
        == generate(*network(), chatty, [ids], **kwargs)[0].tokens
    )
    assert (
        generate(*network(), chatty, [""], **kwargs)[0].tokens
        == generate(*network(), chatty, [[256]], **kwargs)[0].tokens
    )


@pytest.mark.parametrize(
    ("prompt", "said"), [([], "at least one id"), ([320], "ids from 0 to 319"), ([-1], "-1, which is no id")]
)
def test_ids_that_the_model_does_not_have_are_refused(chatty, prompt, said):
    with pytest.raises(UserError, match=f"prompt 0 .*{said}"):
        generate(*network(), chatty, [prompt])


def test_in_the_place_of_a_tokenizer_ids_pass_and_text_is_refused():
    none = no_tokenizer(320)
    assert none.eos_ids == ()
    assert len(generate(*network(), none, [np.array([3])], max_new_tokens=2)[0].tokens) == 2
    with pytest.raises(ValueError, match="no tokenizer"):
        none.encode("x")


def test_unknown_ways_to_treat_special_tokens_are_refused(chatty):
    with pytest.raises(ValueError, match="give 'text' or 'parse'"):
        chatty.encode("x", specials="drop")
    assert byte_tokenizer().encode("<eos>a", specials="parse") == [2, 4 + ord("a")]
    assert SPECIALS[0] in gguf_tokenizer()["tokenizer.ggml.tokens"]
    assert hf_tokenizer.FILES[0] == "tokenizer_config.json"
