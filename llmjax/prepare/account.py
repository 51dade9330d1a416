"""The account of a preparation: the funnel by source and step, the checks of what came out, manifest and data card."""

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from ml_collections import ConfigDict

from llmjax import human, storage
from llmjax.errors import UserError
from llmjax.prepare.parts import Part
from llmjax.prepare.sources import Source
from llmjax.prepare.summary import Summary, add_counts, total

WITHOUT_TEXT = ("empty", "html", "mail", "empty line")  # kinds of rejects that were read, and held no text
DATA_KEYS = ("text_field", "min_bytes", "holdout_percent", "holdout_max_bytes", "holdout_tail_percent", "shard_bytes")


@dataclass(frozen=True)
class Written:
    """The descriptions of the shards that the last tasks wrote, in order."""

    shards: list[tuple[str, str, dict[str, Any]]]  # split, source, description
    rejected: list[tuple[str, dict[str, Any]]]  # source of each part, description
    heldout_groups: dict[str, list[str]]


@dataclass
class Count:
    """Documents and their UTF-8 bytes."""

    documents: int = 0
    bytes: int = 0

    def add(self, documents: int, size: int) -> None:
        """Count some documents."""
        self.documents += documents
        self.bytes += size


@dataclass
class Funnel:
    """The documents of one source: read = rejected + train + heldout.

    Documents add up unless data.holdout_tail_percent cuts them in two; bytes add up unless a step changed texts.
    """

    read: Count = field(default_factory=Count)
    rejected: dict[str, Count] = field(default_factory=dict)
    train: Count = field(default_factory=Count)
    heldout: Count = field(default_factory=Count)
    heldout_groups: list[str] = field(default_factory=list)
    summary: Summary = field(default_factory=Summary)


def funnels(
    sources: Sequence[Source], parts: Sequence[Part], passes: Sequence[Sequence[dict[str, Any]]], written: Written
) -> dict[str, Funnel]:
    """The funnel of each source, by name."""
    found: dict[str, Funnel] = {}
    for source in sources:
        own = [n for n, part in enumerate(parts) if part.name == source.name]
        summary = total(
            # Facts count after the last pass only: documents keep them from pass to pass.
            {**given[n], **({} if number == len(passes) - 1 else {"facts": {}})}
            for number, given in enumerate(passes)
            for n in own
        )
        for name, description in written.rejected:
            if name == source.name:
                for row in description["removed"]:
                    summary.add_one("overall", row["reason"], row["size"], row["path"], row["text"])
        funnel = Funnel(Count(summary.read_documents, summary.read_bytes), summary=summary)
        funnel.rejected = {kind: Count(*pair) for kind, pair in sorted(summary.rejected.items())}
        funnel.heldout_groups = written.heldout_groups.get(source.name, [])
        for split, name, description in written.shards:
            if name == source.name:
                (funnel.train if split == "train" else funnel.heldout).add(
                    description["documents"], description["bytes"]
                )
        found[source.name] = funnel
    return found


def check_result(data: ConfigDict, found: dict[str, Funnel], folder: Path) -> None:
    """Raise UserError if nothing is left to train on, or nothing was held out although a share was asked for.

    Args:
        folder: of the output, for the message.
    """
    whole = add_up(found)
    if whole.train.documents == 0:
        reasons = ", ".join(f"{count.documents:,} {kind}" for kind, count in whole.rejected.items()) or "none"
        raise UserError(
            f"no document is left to train on: {whole.read.documents:,} read, {whole.heldout.documents:,} held out, "
            f"rejected: {reasons}. {folder / 'rejected'} has them with their reasons; give other data.sources, or lower "
            "data.min_bytes or data.holdout_percent"
        )
    if whole.heldout.documents or not (data.holdout_percent or data.holdout_tail_percent):
        return
    if data.holdout_tail_percent:
        raise UserError(
            f"data.holdout_tail_percent={data.holdout_tail_percent} held out nothing: all tails are shorter than "
            f"data.min_bytes={data.min_bytes}. Raise the one or lower the other"
        )
    raise UserError(
        f"none of {whole.train.documents:,} documents was held out for evaluation: data.holdout_percent="
        f"{data.holdout_percent} chooses whole files (or rows) by a hash, and these are too few (or all are larger "
        "than data.holdout_max_bytes). Set data.holdout_tail_percent=10 to hold out the last 10% of every document, "
        "raise data.holdout_percent, or set it to 0 to train on everything"
    )


def add_up(found: dict[str, Funnel]) -> Funnel:
    """The funnel of all sources."""
    whole = Funnel(summary=total(funnel.summary.to_json() for funnel in found.values()))
    groups: set[str] = set()
    for funnel in found.values():
        pairs = [(whole.read, funnel.read), (whole.train, funnel.train), (whole.heldout, funnel.heldout)]
        pairs += [(whole.rejected.setdefault(kind, Count()), count) for kind, count in funnel.rejected.items()]
        for into, count in pairs:
            into.add(count.documents, count.bytes)
        groups |= set(funnel.heldout_groups)
    whole.heldout_groups = sorted(groups)
    return whole


def numbers(found: dict[str, Funnel]) -> dict[str, float | int | str]:
    """The stage's results: documents and bytes read, rejected, duplicate, and kept by source."""
    whole = add_up(found)
    rejected = list(whole.rejected.values())
    result: dict[str, float | int | str] = {
        "documents": whole.read.documents,
        "bytes": whole.read.bytes,
        "rejected": sum(count.documents for count in rejected),
        "rejected_bytes": sum(count.bytes for count in rejected),
        "duplicates": whole.rejected.get("duplicate", Count()).documents,
        "duplicate_bytes": whole.rejected.get("duplicate", Count()).bytes,
        "heldout_groups": len(whole.heldout_groups),
        "unreadable": sum(
            documents
            for step in ("read", "extract")
            for kind, (documents, _) in whole.summary.rejected_by.get(step, {}).items()
            if kind not in WITHOUT_TEXT
        ),
    }
    for name, funnel in {"": whole, **found}.items():
        end = f"/{name}" if name else ""
        for split, count in (("train", funnel.train), ("heldout", funnel.heldout)):
            result[f"{split}_documents{end}"], result[f"{split}_bytes{end}"] = count.documents, count.bytes
    return result


def manifest(
    c: ConfigDict, sources: Sequence[Source], found: dict[str, Funnel], written: Written,
    overall: dict[str, dict[str, float]],
) -> dict[str, Any]:  # fmt: skip
    """What prepare/manifest.json says: settings, sources, funnel by step, kinds of rejects with examples, shards."""
    shards: dict[str, dict[str, list[dict[str, Any]]]] = {
        split: {source.name: [] for source in sources} for split in ("train", "heldout", "rejected")
    }
    lengths = ("name", "documents", "bytes", "sha256")
    for split, name, described in written.shards:
        shards[split][name].append({key: described[key] for key in lengths})
    for name, described in written.rejected:
        if described["documents"]:
            shards["rejected"][name].append({key: described[key] for key in lengths})
    rows = {}
    for source in sources:
        funnel = found[source.name]
        parts = [described for _, name, described in written.shards if name == source.name]
        rows[source.name] = {
            "spec": source.spec,
            "files": len(source.files),
            "skipped_files": source.skipped,
            "languages": source.languages or (source.name,),
            "read": asdict(funnel.read),
            "rejected": {kind: asdict(count) for kind, count in funnel.rejected.items()},
            "train": asdict(funnel.train),
            "heldout": asdict(funnel.heldout),
            "heldout_groups": funnel.heldout_groups,
            "steps": funnel.summary.steps,
            "facts": _facts(funnel.summary),
            "kept": _kept(parts),
        }
    whole = add_up(found)
    return {
        **_bias(c, whole, written),
        "settings": {
            "sources": list(c.data.sources),
            **{key: c.data[key] for key in DATA_KEYS},
            "prepare": {key: value for key, value in c.prepare.to_dict().items() if key not in ("workers", "memory_bytes", "engine", "spark_master", "keep_work")},
        },
        "python": platform.python_version(),
        "total": numbers(found),
        "steps": whole.summary.steps,
        "rejected_by": whole.summary.rejected_by,
        "examples": whole.summary.examples,
        "overall": overall,
        "sources": rows,
        "shards": shards,
    }  # fmt: skip


def _bias(c: ConfigDict, whole: Funnel, written: Written) -> dict[str, Any]:
    """{"bias": identity terms near words of sentiment, before and after} if prepare.bias is set, else {}."""
    if not c.prepare.bias:
        return {}
    from llmjax.prepare import bias

    after: list[list[int]] = []
    for _, _, described in written.shards:
        after = add_counts(after, described["about"]["bias"])
    return {"bias": bias.report(bias.from_counts(whole.summary.bias), bias.from_counts(after))}


def _facts(summary: Summary) -> dict[str, dict[str, float]]:
    return {
        name: {"sum": round(value, 6), "documents": count, "mean": round(value / count, 6)}
        for name, (value, count) in sorted(summary.facts.items())
    }


def _kept(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Languages, licences, lengths and repetition of the documents that were written, and a few of them."""
    kept: dict[str, Any] = {"language": {}, "licence": {}, "length": {}, "words": 0, "compressed": 0, "samples": []}
    for described in parts:
        about = described["about"]
        for name in ("language", "licence", "length"):
            for value, count in about[name].items():
                kept[name][value] = kept[name].get(value, 0) + count
        kept["words"] += about["words"]
        kept["compressed"] += about["compressed"]
        kept["samples"] = (kept["samples"] + about["samples"])[:3]
    return kept


def table(found: dict[str, Funnel], sources: Sequence[Source]) -> str:
    """The funnel as a few lines of text."""
    lines = [f"{'prepare':<32}{'documents':>12}{'MB':>10}"]

    def line(label: str, count: Count, note: str = "") -> None:
        lines.append(f"  {label:<30}{count.documents:>12,}{count.bytes / 1e6:>10.2f}{note}")

    for source in sources:
        funnel = found[source.name]
        line(f"{source.name}: read", funnel.read)
        for kind, count in sorted(funnel.rejected.items()):
            line(f"- {kind}", count)
        line("= train", funnel.train)
        groups = funnel.heldout_groups
        named = ", ".join(groups[:6]) + (f" and {len(groups) - 6} more" if len(groups) > 6 else "")
        line("= held out", funnel.heldout, f"  {named}" if groups else "")
        if source.skipped:
            order = sorted(source.skipped.items(), key=lambda pair: (-pair[1], pair[0]))
            skipped = ", ".join(f"{count:,} {suffix}" for suffix, count in order[:8])
            skipped += f" and {len(order) - 8} other kinds" if len(order) > 8 else ""
            lines.append(f"  skipped files: {skipped}")
    seconds = add_up(found).summary.seconds
    if sum(seconds.values()) > 5:
        slowest = sorted(seconds.items(), key=lambda pair: -pair[1])
        lines.append("  processor time: " + ", ".join(f"{name} {human.duration(spent)}" for name, spent in slowest))
    return "\n".join(lines)


def write_card(found: dict[str, Any], path: Path) -> None:
    """The data card: the manifest as a page to read, one file without links to anything outside."""
    pages = jinja2.Environment(
        loader=jinja2.PackageLoader("llmjax.prepare"),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    pages.filters |= {
        "size": human.size,
        "most_frequent": _most_frequent,
        "by_length": lambda counts: sorted(counts.items(), key=lambda pair: float(pair[0].replace("more", "inf"))),
        "sum_of_kind": lambda rows, kind: sum(row["rejected"].get(kind, {}).get("documents", 0) for row in rows),
    }
    told = dict(found)
    if "bias" in found:
        from llmjax.prepare import bias

        told["bias_table"] = Markup(bias.to_html(found["bias"]))
    page = pages.get_template("card.html").render(told)
    storage.write_bytes(path, page.encode("utf-8", "replace"))  # names of files may be no UTF-8


def _most_frequent(counts: dict[str, int]) -> str:
    order = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{name or 'unknown'} {count:,}" for name, count in order[:6])
