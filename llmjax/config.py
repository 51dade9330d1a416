"""Settings: the one base that holds every key, and how a config file, its argument and the command line become one locked ConfigDict.

A config file is a Python file with `get_config(arg="")`. It starts from `base()`, changes what it
wants and returns the result. Keys that are not in `base()` do not exist: setting one is an error
that names the closest key that does. Nothing in the library reads a key with a default.
"""

import ast
import difflib
import importlib.util
import inspect
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict


def base() -> ConfigDict:
    """Every setting there is, with its default. `llmjax config` prints this list with the comments."""
    # fmt: off
    c = ConfigDict()
    c.name = "run"  # the run's name; it is written to runs/NAME unless --workdir says otherwise
    c.seed = 0  # the one seed: initialisation, data order, dropout and sampling are derived from it
    c.stages = ("prepare", "tokenizer", "train", "eval", "generate", "report")  # what `llmjax run` does, in this order

    c.data = ConfigDict()
    c.data.sources = ("stdlib",)  # "stdlib", "stdlib-tests" (this Python's own), or files, folders, globs; "name=path" gives a source a name
    c.data.text_field = "text"  # the field of .jsonl and .parquet rows that holds the text
    c.data.min_bytes = 16  # documents with fewer UTF-8 bytes are rejected (and kept aside)
    c.data.holdout_percent = 2.0  # share of document groups held out for evaluation, chosen by a hash of the group's name
    c.data.holdout_max_bytes = 0  # a group with more bytes stays in training, so that no giant is most of the measure; 0: no limit
    c.data.holdout_tail_percent = 0.0  # instead: hold out the last part of every document (nanoGPT's Shakespeare split)
    c.data.shard_bytes = 64_000_000  # size of one shard of clean documents, in UTF-8 bytes of text
    c.data.record_tokens = 4096  # tokens in one record of a token shard; any sequence length can be read from any record size
    c.data.mixture = ()  # weights by source over training: ("0%: stdlib=1 notes=1", "80%: notes=1"); empty: by size

    c.tokenizer = ConfigDict()
    c.tokenizer.kind = "bpe"  # bpe, unigram, char (SentencePiece) or byte
    c.tokenizer.vocab_size = 4096  # pieces, with the 256 bytes and the 4 special tokens counted in; char and byte derive theirs
    c.tokenizer.path = ""  # use this SentencePiece .model instead of training one
    c.tokenizer.train_bytes = 20_000_000  # train on at most this much text, taken evenly over the documents
    c.tokenizer.split_digits = True  # every digit is its own piece

    c.model = ConfigDict()
    c.model.layers = 4  # N, the number of blocks
    c.model.width = 256  # D, the size of the residual stream
    c.model.heads = 4  # H, query heads
    c.model.kv_heads = 0  # G, a divisor of heads; 0: the same as heads (multi-head), 1: multi-query
    c.model.head_size = 0  # K; 0: width / heads
    c.model.mlp_width = 0  # F; 0: 4 x width, or 8/3 x width rounded up to 64 for gated activations
    c.model.activation = "swiglu"  # gelu (exact), gelu_tanh, relu2, swiglu, geglu
    c.model.norm = "rms"  # rms or layer
    c.model.norm_epsilon = 1e-5  # added to the variance in every norm
    c.model.qk_norm = False  # RMS-normalise queries and keys per head before the rotation
    c.model.position = "rotary"  # rotary or learned
    c.model.rotary_base = 10_000.0  # the longest wavelength is 2 pi times this many tokens
    c.model.max_length = 1024  # rows of the learned position table, and the default size of the decoding cache
    c.model.bias = False  # biases in the linear layers and layer norms
    c.model.tie_embeddings = True  # the output head is the transposed embedding
    c.model.logit_soft_cap = 0.0  # logits = cap * tanh(logits / cap); 0: off
    c.model.dropout = 0.0  # on the embeddings and on the output of each block's two branches
    c.model.vocab_size = 0  # V; 0: the tokenizer's, rounded up to vocab_multiple
    c.model.vocab_multiple = 64  # the embedding's rows are rounded up to this, so that tensor axes divide it
    c.model.init = "gpt2"  # the table of initialisers in model/init.py: gpt2 or lecun
    c.model.init_std = 0.02  # standard deviation of the gpt2 initialisers
    c.model.dtype = "float32"  # compute in float32 or bfloat16
    c.model.param_dtype = "float32"  # store parameters in float32 (master weights) or bfloat16
    c.model.remat = "none"  # rematerialise per layer: none, full, or selective (keep the matrix products, recompute the rest)
    c.model.scan_unroll = 1  # layers per iteration of the scan over layers; model.layers or more: fully unrolled (faster steps, slower compile)
    c.model.attention = "auto"  # reference, dot_product (jax.nn), blocked (CPU), or auto: chosen once and printed

    c.objective = ConfigDict()
    c.objective.name = "causal"  # next-token cross entropy
    c.objective.z_loss = 0.0  # weight of log(Z)^2 (PaLM uses 1e-4)
    c.objective.label_smoothing = 0.0  # share of the target's probability spread evenly over the vocabulary
    c.objective.l1 = 0.0  # weight of the sum of |parameter| (matrices only)
    c.objective.l2 = 0.0  # weight of half the sum of parameter^2 (matrices only); unlike weight decay it enters the gradient

    c.parallel = ConfigDict()
    c.parallel.mesh = "data=-1"  # axes and sizes: data, fsdp, tensor; one -1 takes the devices that are left
    c.parallel.rules = ()  # rows (regex, (axis, ...)) put before the placement table in parallel/placement.py
    c.parallel.cpu_devices = 0  # CPU devices to make when there is no accelerator; 0: as many as cores the batch divides by

    c.optimizer = ConfigDict()
    c.optimizer.name = "adamw"  # adamw, muon (matrices; AdamW for the rest), adafactor, lion, sgd
    c.optimizer.learning_rate = 1e-3  # peak
    c.optimizer.muon_learning_rate = 0.02  # peak for the matrices that Muon updates
    c.optimizer.beta1 = 0.9  # AdamW and Lion; momentum for SGD
    c.optimizer.beta2 = 0.95  # AdamW and Lion
    c.optimizer.epsilon = 1e-8  # AdamW
    c.optimizer.muon_momentum = 0.95  # Muon
    c.optimizer.weight_decay = 0.1  # decoupled; times the learning rate; matrices only, see train/optimizer.py
    c.optimizer.clip_norm = 1.0  # global gradient norm; 0: off

    c.schedule = ConfigDict()
    c.schedule.name = "cosine"  # constant, step, exponential, cosine, linear, wsd (warm-up, stable, decay)
    c.schedule.warmup = "2%"  # a duration, linear from 0
    c.schedule.decay = "20%"  # wsd: the duration of the decay at the end, linear
    c.schedule.final = 0.1  # the last learning rate as a share of the peak: cosine, linear, exponential, wsd
    c.schedule.drop_at = ("60%", "85%")  # step: the durations after which the rate drops
    c.schedule.drop_factor = 0.1  # step: what it is multiplied with at each drop

    c.train = ConfigDict()
    c.train.duration = "1000 steps"  # 1000, "1000 steps", "50M tokens" or "2 epochs"
    c.train.batch_size = 16  # sequences a step, over all devices and micro-batches
    c.train.sequence_length = 256  # L, tokens
    c.train.micro_batches = 1  # gradient accumulation: the batch is cut into this many parts, one after another
    c.train.ema = 0.0  # decay of the moving average of the weights, used by evaluation; 0: off
    c.train.max_bad_steps = 10  # end the run after this many updates skipped for non-finite gradients, in a row
    c.train.eval_every = "10%"  # held-out loss during training; "0 steps": off
    c.train.eval_batches = 8  # batches of held-out text for that
    c.train.log_every = 10.0  # seconds between lines where the terminal cannot show a progress bar
    c.train.tensorboard = False  # also write TensorBoard event files (pip install llmjax[tensorboard])
    c.train.init_from = ""  # start from the weights of this run or checkpoint (a new optimizer, step 0)

    c.checkpoint = ConfigDict()
    c.checkpoint.every = "25%"  # a duration
    c.checkpoint.every_seconds = 600.0  # and whenever this much time has passed; 0: off
    c.checkpoint.keep = 2  # newest checkpoints kept
    c.checkpoint.keep_every = "0 steps"  # besides, keep those at multiples of this duration for ever; "0 steps": none

    c.eval = ConfigDict()
    c.eval.sequence_length = 0  # 0: as in training
    c.eval.stride = 0  # tokens scored by each window, the rest being context; 0: half a window
    c.eval.batch_size = 32  # windows at a time
    c.eval.max_bytes = 0  # score at most this much text of each source; 0: all of it
    c.eval.xz = True  # also compress the same bytes with xz -9e, as a yardstick

    c.generate = ConfigDict()
    c.generate.prompts = ("def ",)  # continued by the generate stage, and by `llmjax generate` when it is given none
    c.generate.max_new_tokens = 128  # per prompt
    c.generate.temperature = 0.8  # 0: greedy
    c.generate.top_k = 0  # keep the k most likely tokens; 0: all
    c.generate.top_p = 0.95  # keep the smallest set of tokens that holds this much probability; 1: all
    c.generate.min_p = 0.0  # keep tokens at least this likely relative to the likeliest; 0: all
    c.generate.stop = ()  # strings at which a text ends (they are not part of it)
    # fmt: on
    return c


def load(spec: str, *, overrides: Sequence[str] = ()) -> ConfigDict:
    """Read `FILE` or `FILE:ARG` (or a run's config.json), apply `key=value` overrides and return it locked.

    Args:
        spec: a Python file with `get_config(arg="")`, optionally followed by `:arg`; or a `config.json`.
        overrides: strings like `"train.batch_size=8"`; values are Python literals, anything else is a string.

    Raises:
        ValueError: for a file that is not there or has no `get_config`, an unknown key, a value of the wrong
            type, or settings that contradict each other; the message says how to mend it.
    """
    file, colon, arg = spec.partition(":")
    path = Path(file)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else " See the files in configs/."
        raise ValueError(f"there is no config file {file}.{hint}")
    if path.suffix == ".json":
        try:
            c = from_json(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path} is damaged ({error}): give --config with the file that it was made from"
            ) from error
    else:
        get_config = _import_file(path).__dict__.get("get_config")
        if get_config is None:
            raise ValueError(f"{file} has no function get_config(arg=''); see configs/quickstart.py for an example")
        c = get_config(arg) if colon else get_config()
        check_keys(c.to_dict())
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"--config.{key} needs a value: --config.{key}=VALUE")
        set_key(c, key, _literal(text))
    check(c)
    return c.lock()


def derivation(spec: str) -> str:
    """What a config file says about how its values came about: its `table(arg)`, or nothing if it has none."""
    file, _, arg = spec.partition(":")
    table = None if file.endswith(".json") else _import_file(Path(file)).__dict__.get("table")
    return table(arg) if table is not None else ""


def _import_file(path: Path) -> Any:
    module_spec = importlib.util.spec_from_file_location(f"llmjax_config_{path.stem}", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        pass
    if text.startswith("[") and text.endswith("]"):  # a shell strips the quotes of [a.txt,b.txt]
        return tuple(part.strip() for part in text[1:-1].split(",") if part.strip())
    return {"true": True, "false": False}.get(text.lower(), text)


def set_key(c: ConfigDict, key: str, value: Any) -> None:
    """Set one dotted key in place, with the type that `base()` gives it. Raises ValueError that names the closest key."""
    default = flatten(base().to_dict()).get(key)
    if default is None:
        raise ValueError(unknown_key(key))
    *parents, last = key.split(".")
    node = c
    for parent in parents:
        node = node[parent]
    with node.unlocked():
        node[last] = _coerce(key, value, default)


def _coerce(key: str, value: Any, default: Any) -> Any:
    if isinstance(default, tuple):
        if isinstance(value, str):
            value = (value,)
        if isinstance(value, (list, tuple)):
            return tuple(tuple(v) if isinstance(v, list) else v for v in value)
    elif isinstance(default, bool):
        if isinstance(value, bool):
            return value
    elif isinstance(default, float):
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif isinstance(default, int):
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, float) and value.is_integer():  # 1e6
            return int(value)
    elif isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{key}={value!r}: this key takes a {type(default).__name__}, such as {default!r}")


def unknown_key(key: str) -> str:
    """The message for a key that does not exist."""
    known = list(flatten(base().to_dict()))
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    last = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
    return (
        f"there is no config key {key}; the closest is {' or '.join(last or near)}. `llmjax config` lists all of them."
    )


def check_keys(tree: dict) -> None:
    """Raise ValueError unless the keys of `tree` are exactly those of `base()`."""
    known, given = flatten(base().to_dict()), flatten(tree)
    for key in given:
        if key not in known:
            raise ValueError(unknown_key(key))
    missing = sorted(set(known) - set(given))
    if missing:
        raise ValueError(f"the config lacks {', '.join(missing)}: start from llmjax.config.base(), which has every key")
    for key, value in given.items():
        _coerce(key, value, known[key])


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def to_json(c: ConfigDict) -> str:
    """The config as JSON text that `from_json` reads back unchanged."""
    return json.dumps(c.to_dict(), indent=1) + "\n"


def from_json(text: str) -> ConfigDict:
    """A config from `to_json`'s text. Raises ValueError for keys that this version does not have."""
    tree = json.loads(text)
    check_keys(tree)
    c = base()
    for key, value in flatten(tree).items():
        set_key(c, key, value)
    return c


def differences(a: ConfigDict, b: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """The keys on which two configs differ, with both values."""
    flat_a, flat_b = flatten(a.to_dict()), flatten(b.to_dict())
    return {k: (flat_a[k], flat_b[k]) for k in flat_a if flat_a[k] != flat_b[k]}


def parse_arg(arg: str, *, choices: Sequence[str] = (), **defaults: Any) -> ConfigDict:
    """The argument of a config file, `--config FILE:medium,width=64`, as a ConfigDict.

    `choices` are the bare words allowed, of which the one given (or the first) becomes `.choice`;
    `defaults` are the `key=value` pairs allowed. Raises ValueError for anything left over.
    """
    result = ConfigDict({"choice": choices[0] if choices else "", **defaults})
    for part in filter(None, arg.split(",")):
        key, equals, text = part.partition("=")
        if not equals and key in choices:
            result.choice = key
        elif equals and key in defaults:
            result[key] = type(defaults[key])(_literal(text))
        else:
            allowed = [*choices, *(f"{k}={v}" for k, v in defaults.items())]
            raise ValueError(f"config argument {part!r} is not known; this file takes: {', '.join(allowed) or 'none'}")
    return result


def duration(value: str | int, *, tokens_per_step: int, tokens_per_epoch: int = 0, total_steps: int = 0) -> int:
    """A duration in steps, rounded to the nearest.

    `value` is an integer (steps) or text: "500 steps", "30M tokens", "1.5 epochs", "10%" (of `total_steps`).
    Numbers may carry k, M, B or T. Raises ValueError for anything else.
    """
    match = re.fullmatch(r"([0-9][0-9_.]*(?:e[0-9]+)?)\s*([kMBT]?)\s*(steps?|tokens?|epochs?|%|)", str(value).strip())
    if not match:
        raise ValueError(
            f"duration {value!r} is not understood: write 500, '500 steps', '30M tokens', '1.5 epochs' or '10%'"
        )
    amount = float(match[1]) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[match[2]]
    unit = match[3].rstrip("s")
    if unit == "token":
        return round(amount / tokens_per_step)
    if unit == "epoch":
        if not tokens_per_epoch:
            raise ValueError(f"duration {value!r}: epochs are not known here; give steps or tokens")
        return round(amount * tokens_per_epoch / tokens_per_step)
    if unit == "%":
        if not total_steps:
            raise ValueError(f"duration {value!r}: a percentage needs a total; give steps, tokens or epochs here")
        return round(amount / 100 * total_steps)
    return round(amount)


DURATIONS = (
    "train.duration",
    "train.eval_every",
    "checkpoint.every",
    "checkpoint.keep_every",
    "schedule.warmup",
    "schedule.decay",
    "schedule.drop_at",
)
CHOICES: dict[str, tuple[str, ...]] = {
    "tokenizer.kind": ("bpe", "unigram", "char", "byte"),
    "model.activation": ("gelu", "gelu_tanh", "relu2", "swiglu", "geglu"),
    "model.norm": ("rms", "layer"),
    "model.position": ("rotary", "learned"),
    "model.init": ("gpt2", "lecun"),
    "model.dtype": ("float32", "bfloat16"),
    "model.param_dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "full", "selective"),
    "model.attention": ("auto", "reference", "dot_product", "blocked"),
    "objective.name": ("causal",),
    "optimizer.name": ("adamw", "muon", "adafactor", "lion", "sgd"),
    "schedule.name": ("constant", "step", "exponential", "cosine", "linear", "wsd"),
}


def check(c: ConfigDict) -> None:
    """Raise ValueError for values that are out of range or contradict each other."""
    flat = flatten(c.to_dict())
    for key, choices in CHOICES.items():
        if flat[key] not in choices:
            near = difflib.get_close_matches(str(flat[key]), choices, n=1)
            raise ValueError(
                f"{key}={flat[key]!r} is not known{f', did you mean {near[0]}?' if near else ';'} it can be {', '.join(choices)}"
            )
    m, t = c.model, c.train

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(message)

    for key in (
        "model.scan_unroll",
        "model.vocab_multiple",
        "checkpoint.keep",
        "train.max_bad_steps",
        "model.layers",
        "model.width",
        "model.heads",
        "train.batch_size",
        "train.sequence_length",
        "train.micro_batches",
        "data.record_tokens",
    ):
        require(flat[key] > 0, f"{key}={flat[key]} must be at least 1")
    for key in ("model.dropout", "objective.label_smoothing", "train.ema"):
        require(0 <= flat[key] < 1, f"{key}={flat[key]} must be at least 0 and below 1")
    for key in ("data.holdout_percent", "data.holdout_tail_percent"):
        require(0 <= flat[key] < 100, f"{key}={flat[key]} must be at least 0 and below 100")
    require(
        m.head_size > 0 or m.width % m.heads == 0,
        f"model.width={m.width} is not a multiple of model.heads={m.heads}; change one or set model.head_size",
    )
    require(m.kv_heads >= 0, f"model.kv_heads={m.kv_heads} must be at least 0")
    require(
        m.kv_heads == 0 or m.heads % m.kv_heads == 0, f"model.kv_heads={m.kv_heads} must divide model.heads={m.heads}"
    )
    require(
        m.position != "rotary" or head_size(m) % 2 == 0, f"rotary positions need an even head size, not {head_size(m)}"
    )
    require(
        t.batch_size % t.micro_batches == 0,
        f"train.micro_batches={t.micro_batches} must divide train.batch_size={t.batch_size}",
    )
    require(
        m.position != "learned" or t.sequence_length <= m.max_length,
        f"train.sequence_length={t.sequence_length} is more than the {m.max_length} learned positions; raise model.max_length",
    )
    require(c.data.shard_bytes > 0, f"data.shard_bytes={c.data.shard_bytes} must be at least 1")
    for key in DURATIONS:
        for value in flat[key] if isinstance(flat[key], tuple) else (flat[key],):
            duration(value, tokens_per_step=1, tokens_per_epoch=1, total_steps=0 if key == "train.duration" else 1)
    require(bool(c.data.sources), "data.sources is empty: give 'stdlib', files or folders")


def head_size(model: ConfigDict) -> int:
    """K, the size of one attention head."""
    return model.head_size or model.width // model.heads


def comments() -> dict[str, str]:
    """Dotted key -> the comment that follows it in `base()`."""
    found = {}
    for match in re.finditer(r"^    c\.([a-z0-9_.]+) = .*?  # (.*)$", inspect.getsource(base), re.MULTILINE):
        found[match[1]] = match[2]
    return found
