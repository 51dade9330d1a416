"""The tokenizer stage: train a tokenizer or take one over, and encode the prepared documents as token shards."""

import shlex
import time
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from llmjax import config, storage
from llmjax.data import extendable, replay
from llmjax.data.documents import SPLITS, languages_of, read_texts, shard_files
from llmjax.data.tokenizer import Tokenizer
from llmjax.data.tokenizer_extension import extend
from llmjax.data.tokenizer_files import load_tokenizer
from llmjax.data.tokenizer_training import train_tokenizer
from llmjax.data.tokens import token_dtype, write_stream
from llmjax.errors import UserError

ADDING = ("add_tokens", "add_learnt")  # settings that add to the tokenizer that is taken over


def run(c: ConfigDict, workdir: Path) -> dict[str, float | int | str]:
    """Make WORKDIR/tokenizer afresh from WORKDIR/prepare: the tokenizer, and tokens/ with index.json.

    Returns vocab_size, train_tokens, heldout_tokens, bytes_per_token, train_seconds (of the tokenizer),
    encode_seconds, encode_megabytes_per_second and seconds.

    Raises:
        UserError: if prepare has not run, if tokenizer.path is no usable tokenizer, or for a vocabulary size that the
            text does not allow.
        OSError: if a shard cannot be written.
    """
    began = time.perf_counter()
    prepared = workdir / "prepare"
    if not shard_files(prepared / "train"):
        raise UserError(f"there are no documents in {prepared / 'train'}: run `llmjax prepare` first")
    path = chosen(c)
    tokenizer = load_tokenizer(path) if path else _train(c, prepared)
    folder = workdir / "tokenizer"
    storage.remove(folder)
    if extends(c):
        tokenizer = _extend(c, tokenizer, prepared, folder)
    else:
        tokenizer.save(folder)
    trained = time.perf_counter()
    splits = {}
    for split in SPLITS:
        splits[split] = {
            source: write_stream(
                read_texts(prepared, split, source),
                tokenizer,
                folder=folder / "tokens" / split / source,
                record_tokens=c.data.record_tokens,
                languages=languages_of(prepared, source),
                label=f"encoding {split}/{source}",
            )
            for source in shard_files(prepared / split)
        }
    index = {
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "record_tokens": c.data.record_tokens,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer.fingerprint,
        "start_id": tokenizer.start_id,
        "end_id": tokenizer.end_id,
        "splits": splits,
    }
    storage.write_json(folder / "tokens" / "index.json", index)
    ended = time.perf_counter()
    total = {key: {s: sum(x[key] for x in splits[s].values()) for s in SPLITS} for key in ("tokens", "text_bytes")}
    text_bytes, tokens = (sum(total[key].values()) for key in ("text_bytes", "tokens"))
    results = {
        "vocab_size": tokenizer.vocab_size,
        "train_tokens": total["tokens"]["train"],
        "heldout_tokens": total["tokens"]["heldout"],
        "bytes_per_token": round(text_bytes / tokens, 4),
        "train_seconds": round(trained - began, 3),
        "encode_seconds": round(ended - trained, 3),
        "encode_megabytes_per_second": round(text_bytes / 1e6 / (ended - trained), 3),
        "seconds": round(ended - began, 3),
    }
    origin = f"from {path}" if path else f"trained in {results['train_seconds']:.1f} s"
    kind = tokenizer.kind if path else c.tokenizer.kind
    print(f"tokenizer: {kind}, {tokenizer.vocab_size:,} pieces, {origin}")
    print(
        f"tokens: {results['train_tokens']:,} train, {results['heldout_tokens']:,} held out, "
        f"{results['bytes_per_token']:.2f} bytes a token, {results['encode_megabytes_per_second']:.1f} MB/s"
    )
    return results


def check(c: ConfigDict, workdir: Path | None, *, fresh: bool) -> None:
    """Raise UserError for a tokenizer that cannot be read, or that is not the one of `train.init_from`."""
    path = chosen(c)
    if not path:
        return
    tokenizer, theirs = load_tokenizer(path), _of_initial(c)
    if extends(c):
        extendable.open_pieces(tokenizer)
    if theirs is not None and load_tokenizer(theirs).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"tokenizer.path={path} is another tokenizer than that of train.init_from={c.train.init_from}, so every id "
            f"would mean something else: set --config.tokenizer.path={shlex.quote(str(theirs))}"
        )


def chosen(c: ConfigDict) -> str:
    """The tokenizer that the stage takes over; "": it trains one.

    It is `tokenizer.path`; or else, with `train.init_from`, that run's tokenizer, without which its weights mean
    nothing. The other settings under `tokenizer` then have no effect, and must not ask for another tokenizer: they are
    those of that run, or have their defaults.

    Raises:
        UserError: for settings that ask for another one.
    """
    theirs = _of_initial(c)
    if c.tokenizer.path or theirs is None:
        return c.tokenizer.path
    file = theirs.parent / "config.json"
    run = config.from_json(file.read_text(encoding="utf-8")) if file.is_file() else config.base()
    for key, value in c.tokenizer.items():
        if key not in ADDING and value not in (run.tokenizer[key], config.base().tokenizer[key]):
            raise UserError(
                f"train.init_from={c.train.init_from} needs the tokenizer that it was trained with, and tokenizer.{key}="
                f"{value} asks for another: set --config.tokenizer.path={shlex.quote(str(theirs))}"
            )
    return str(theirs)


def extends(c: ConfigDict) -> bool:
    """Whether the stage adds tokens to the tokenizer that it takes over."""
    return bool(c.tokenizer.add_tokens or c.tokenizer.add_learnt)


def _extend(c: ConfigDict, base: Tokenizer, prepared: Path, folder: Path) -> Tokenizer:
    """The tokenizer with `tokenizer.add_tokens` and tokens learnt from the sources that are not `data.replay`."""
    sources = [source for source in shard_files(prepared / "train") if not replay.is_general(c, source)]
    texts = (text for source in sources for text in read_texts(prepared, "train", source))
    named, learnt = c.tokenizer.add_tokens, c.tokenizer.add_learnt
    made = extend(base, texts, folder, named=named, learnt=learnt, split_digits=c.tokenizer.split_digits)
    print(f"tokenizer: {made.vocab_size - base.vocab_size:,} tokens were added to {base.vocab_size:,}")
    return made


def _of_initial(c: ConfigDict) -> Path | None:
    """The tokenizer of the run `train.init_from`, or of the run around that checkpoint; None where there is none."""
    if not c.train.init_from:
        return None
    given = config.run_of(Path(c.train.init_from))
    run = given.parent.parent if given.parent.name == "checkpoints" else given
    return run / "tokenizer" if (run / "tokenizer").is_dir() else None


def _train(c: ConfigDict, prepared: Path) -> Tokenizer:
    def texts() -> Iterator[str]:
        for source in shard_files(prepared / "train"):
            yield from read_texts(prepared, "train", source)

    text_bytes = 0
    if c.tokenizer.kind in ("bpe", "unigram"):  # a first pass, to know what share of the text to train on
        text_bytes = sum(len(text.encode()) for text in texts())
    return train_tokenizer(
        texts(),
        kind=c.tokenizer.kind,
        vocab_size=c.tokenizer.vocab_size,
        split_digits=c.tokenizer.split_digits,
        text_bytes=text_bytes,
        train_bytes=c.tokenizer.train_bytes,
    )
