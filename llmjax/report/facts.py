"""The content of a report: sentence, tiles, tables and plots of a run, as plain data for the templates."""

import hashlib
import importlib.metadata
import platform
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmjax import human
from llmjax.config import base, flatten
from llmjax.report import rollouts
from llmjax.report.collect import Run
from llmjax.report.curves import ALONG, against
from llmjax.report.plots import Line, draw

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "sentencepiece", "numpy")
CHECKOUT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Tile:
    """A key number."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class FunnelStep:
    """A line of the data funnel."""

    label: str
    documents: int
    bytes: int
    share: float  # of the bytes read, 0..1
    kind: str  # read, lost, kept, split


@dataclass(frozen=True)
class Setting:
    """A config key. `changed`: whether it differs from base()."""

    key: str
    value: str
    default: str
    changed: bool


def show(name: str, value: Any) -> str:
    """A number of a results.json as text. Its name decides the unit."""
    if value is None:
        return "not known"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    stem = name.partition("/")[0]
    if stem.endswith("seconds"):
        return human.duration(value)
    if stem.endswith("bytes") and "per_byte" not in stem:
        return human.size(value)
    if stem == "mfu":
        return f"{value:.1%}"
    if stem == "flops" or (isinstance(value, float) and abs(value) >= 1e6):
        return human.count(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"


def number(run: Run, stage: str, name: str) -> Any:
    """A number of a stage's results, or None."""
    return run.stages.get(stage, {}).get(name)


def train_number(run: Run, name: str) -> Any:
    """A number of training: of the stage's results, else the last one of the metrics."""
    value = number(run, "train", name)
    if value is None and run.curves:
        value = run.curves.last.get({"steps": "step"}.get(name, name))
    return value


def source_names(run: Run) -> list[str]:
    """The names of the data sources."""
    if isinstance(run.manifest.get("sources"), dict):
        return list(run.manifest["sources"])
    return [str(source) for source in run.config.data.sources] if run.config else []


def sentence(run: Run) -> str:
    """A sentence about the model, its data, its device and its training time."""
    parts = []
    if (parameters := number(run, "train", "parameters")) is not None:
        parts.append(f"{human.count(parameters)} parameters")
    if (tokens := train_number(run, "tokens")) is not None:
        parts.append(f"trained on {human.count(tokens)} tokens")
    if sources := source_names(run):
        parts.append(f"of {', '.join(sources)}")
    if (seconds := train_number(run, "train_seconds")) is not None:
        parts.append(f"in {human.duration(seconds)}")
    device = number(run, "train", "device") or number(run, "train", "devices")
    if device is not None:
        parts.append(f"on {device}" + (" device(s)" if isinstance(device, int) else ""))
    if (options := number(run, "train", "compiler_options")) not in (None, "none"):
        parts.append(f"with the compiler's options {options}")
    return " ".join(parts)


def tiles(run: Run) -> list[Tile]:
    """The key numbers that exist."""
    found = []
    bits, xz = number(run, "eval", "bits_per_byte"), number(run, "eval", "xz_bits_per_byte")
    if bits is None and run.curves and (bits := run.curves.last.get("heldout_bits_per_byte")) is not None:
        found.append(Tile("bits per byte", f"{bits:.3f}", "last held-out sample in training"))
    elif bits is not None:
        note = "held-out text"
        if xz:
            note = f"{abs(1 - bits / xz):.0%} {'below' if bits < xz else 'above'} xz -9e ({xz:.3f})"
        found.append(Tile("bits per byte", f"{bits:.3f}", note))
    if (perplexity := number(run, "eval", "perplexity")) is not None:
        found.append(Tile("perplexity", f"{perplexity:.2f}", "per token, held-out text"))
    if (loss := train_number(run, "loss")) is not None:
        steps = train_number(run, "steps")
        found.append(Tile("training loss", f"{loss:.3f}", f"nats per token, step {steps:,.0f}" if steps else "nats"))
    if (speed := train_number(run, "tokens_per_second")) is not None:
        found.append(Tile("tokens per second", human.count(speed), "training, all devices"))
    if (mfu := train_number(run, "mfu")) is not None:
        found.append(Tile("MFU", f"{mfu:.1%}", "model FLOPs over peak FLOPs"))
    if (goodput := train_number(run, "goodput")) is not None:
        found.append(Tile("goodput", f"{goodput:.0%}", "of the time since the first start was spent in training"))
    if (seconds := train_number(run, "train_seconds")) is not None:
        flops = train_number(run, "flops")
        found.append(
            Tile("training time", human.duration(seconds), f"{human.count(flops)} model FLOPs" if flops else "")
        )
    return found


def plots(run: Run, *, prefix: str = "") -> list[dict[str, Any]]:
    """The run's curves: dicts with title, svg and wide."""
    if run.curves is None:
        return []
    curves, marks, drawn = run.curves.by_name, run.curves.bad_steps, []
    found = run.curves

    def add(name: str, title: str, lines: list[tuple[str, str]], *, x: str = "step", **options: Any) -> None:
        present = [
            Line(label, curve, i, points=key.startswith("heldout"))
            for i, (label, key) in enumerate(lines)
            if (curve := against(found, key, x)) is not None
        ]
        if present:
            svg = draw(prefix + name, present, **options)
            drawn.append({"title": title, "svg": svg, "wide": options.get("wide", False)})

    both = [("training", "loss"), ("held out", "heldout_loss")]
    add("loss", "Loss", both, y_label="nats per token", wide=True, robust=True, marks=marks)
    for x, unit, x_label in ALONG:
        add(f"loss-{x}", f"Loss by {unit}", both, x=x, y_label="nats per token", robust=True, x_label=x_label)
    per_source = [(key.partition("/")[2], key) for key in sorted(curves) if key.startswith("heldout_bits_per_byte/")]
    bits = [("all", "heldout_bits_per_byte")] + (per_source if len(per_source) > 1 else [])
    add("bits", "Held-out bits per byte", bits, y_label="bits per byte")
    add("rate", "Learning rate", [("learning rate", "learning_rate")], y_label="learning rate", from_zero=True)
    norms = [("gradient", "grad_norm"), ("update", "update_norm"), ("parameters", "param_norm")]
    add("norms", "Norms", norms, y_label="global L2 norm", log_y=True, marks=marks)
    scale = [("noise scale", "noise_scale"), ("batch", "batch_size")] if "noise_scale" in curves else []
    add("noise", "Gradient noise scale", scale, y_label="sequences", log_y=True)
    drawn += rollouts.plots(curves, prefix=prefix)
    load = [("busiest expert", "expert_load_max")]
    add("experts", "Load of the busiest expert", load, y_label="relative to the mean", from_zero=True)
    dropped = [("dropped", "expert_dropped")]
    add("dropped", "Choices that found no place", dropped, y_label="share", percent=True, from_zero=True)
    speed = [("tokens per second", "tokens_per_second")]
    add("speed", "Throughput", speed, y_label="tokens per second", from_zero=True)
    add("mfu", "Model FLOPs utilisation", [("MFU", "mfu")], y_label="MFU", percent=True, from_zero=True)
    return drawn


def funnel(run: Run) -> list[FunnelStep]:
    """Documents and bytes of all sources, from those read to those for training."""
    sources = [row for row in _sources(run).values() if isinstance(row, dict)]
    read = _sum([_count(row.get("read")) for row in sources])
    if not sources or not read[0]:
        return []
    lost: dict[str, list[tuple[int, int]]] = {}
    for row in sources:
        for reason, node in (row.get("rejected") or {}).items():
            lost.setdefault(reason, []).append(_count(node))
    train = _sum([_count(row.get("train")) for row in sources])
    heldout = _sum([_count(row.get("heldout")) for row in sources])
    steps = [("read", read, "read")]
    totals = {reason: _sum(counts) for reason, counts in lost.items()}
    by_size = sorted(totals.items(), key=lambda item: (item[0] == "duplicate", -item[1][1]))
    steps += [("exact duplicates" if reason == "duplicate" else reason, total, "lost") for reason, total in by_size]
    kept = _sum([train, heldout])
    steps += [("kept", kept, "kept"), ("to train on", train, "split"), ("held out", heldout, "split")]
    return [FunnelStep(label, n, size, size / max(read[1], 1), kind) for label, (n, size), kind in steps]


def source_table(run: Run) -> list[dict[str, Any]]:
    """Documents and bytes of each source: read, rejected, for training, held out."""
    rows = []
    for name, row in _sources(run).items():
        ends = {end: _count(row.get(end)) for end in ("read", "train", "heldout")}
        rejected = _sum([_count(node) for node in (row.get("rejected") or {}).values()])
        groups = [str(group) for group in row.get("heldout_groups") or []]
        rows.append({"name": name, "rejected": rejected, "groups": groups, **ends})
    return rows


def _sources(run: Run) -> dict[str, Any]:
    sources = run.manifest.get("sources")
    return sources if isinstance(sources, dict) else {}


def _count(node: Any) -> tuple[int, int]:
    """(documents, bytes) of a node of the manifest: a dict of both, or only the documents."""
    if isinstance(node, dict):
        return int(node.get("documents", 0)), int(node.get("bytes", 0))
    return (int(node), 0) if isinstance(node, (int, float)) else (0, 0)


def _sum(counts: list[tuple[int, int]]) -> tuple[int, int]:
    return sum(n for n, _ in counts), sum(size for _, size in counts)


def tokenizer_facts(run: Run) -> list[tuple[str, str]]:
    """The kind of the tokenizer, its vocabulary and its compression."""
    facts = []
    if run.config and (run.stages.get("tokenizer") or run.token_index):
        facts.append(("kind", str(run.config.tokenizer.kind)))
    if vocab_size := run.token_index.get("vocab_size"):
        facts.append(("vocabulary", f"{vocab_size:,} pieces"))
    splits = run.token_index.get("splits", run.token_index)
    for split, label in (("train", "training"), ("heldout", "held-out")):
        sources = splits.get(split)
        nodes = [node for node in sources.values() if isinstance(node, dict)] if isinstance(sources, dict) else []
        tokens = sum(node.get("tokens", 0) for node in nodes)
        size = sum(node.get("text_bytes", 0) for node in nodes)
        if tokens:
            facts.append((f"{label} text", f"{human.count(tokens)} tokens, {size / tokens:.2f} bytes per token"))
    shown = {"vocab_size"} if vocab_size else set()
    results = run.stages.get("tokenizer", {})
    return facts + [(name, show(name, value)) for name, value in results.items() if name not in shown]


def evaluation(run: Run) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """(names of the columns, rows): a row for all text, and one for each source."""
    results = run.stages.get("eval", {})
    order = ["bits_per_byte", "bits_per_character", "xz_bits_per_byte", "perplexity", "loss", "tokens", "bytes"]
    split = [name.partition("/") for name in results if "/" in name]
    sources = list(dict.fromkeys(source for name, _, source in split if name in order))  # not TASK/METRIC
    present = {name.partition("/")[0] for name in results}
    columns = [name for name in order if name in present]
    rows = [("all", [show(name, results[name]) if name in results else "" for name in columns])]
    for source in sources:
        keys = [f"{name}/{source}" for name in columns]
        rows.append((source, [show(key, results[key]) if key in results else "" for key in keys]))
    return columns, rows if columns else []


def settings(run: Run) -> list[Setting]:
    """Every key of the config."""
    if run.config is None:
        return []
    defaults = flatten(base().to_dict())
    given = flatten(run.config.to_dict())
    return [Setting(key, show_setting(v), show_setting(defaults[key]), v != defaults[key]) for key, v in given.items()]


def show_setting(value: Any) -> str:
    """A setting as a config file has it."""
    return str(list(value)) if isinstance(value, tuple) else repr(value) if isinstance(value, str) else str(value)


def command(run: Run) -> str:
    """The command that repeats the run."""
    again = run.workdir.with_name(run.workdir.name + "-again")
    parts = ["llmjax", "run", "--config", str(run.workdir / "config.json"), "--workdir", str(again)]
    return " ".join(shlex.quote(part) for part in parts)


def versions() -> list[tuple[str, str]]:
    """Versions in this environment: Python, the packages that affect the numbers of a run, and the code."""
    found = [("python", platform.python_version())]
    for package in PACKAGES:
        try:
            found.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            found.append((package, "not installed"))
    if commit := _commit():
        found.append(("git commit", commit))
    for lock in sorted(CHECKOUT.glob("requirements*.lock")) + sorted(CHECKOUT.glob("requirements*.txt")):
        found.append((lock.name, "sha256 " + hashlib.sha256(lock.read_bytes()).hexdigest()[:16]))
    return found


def _commit() -> str:
    """The commit of the checkout, and whether files differ from it; "" outside a checkout or without git."""
    if not (CHECKOUT / ".git").exists():
        return ""
    git = ["git", "-C", str(CHECKOUT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    if head.returncode:
        return ""
    return head.stdout.strip()[:12] + (" with uncommitted changes" if status.stdout.strip() else "")
