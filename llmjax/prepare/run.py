"""The prepare stage: sources -> WORKDIR/prepare, with clean shards, rejected documents, a manifest and a data card.

Tasks read and clean the parts of the sources. Steps over all documents run between two such passes. Tasks write the
shards. Every task leaves a summary in work/, so that a stopped run goes on with the parts that are left. work/ is removed
at the end. A finished preparation, which has a manifest, stays as it is until another one is complete: that one is made
in WORKDIR/prepare.new and takes its place at the end.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from llmjax import storage
from llmjax.data.documents import SPLITS
from llmjax.errors import UserError
from llmjax.prepare import account, clean, parts, shards, split
from llmjax.prepare.dedup import corpus_steps
from llmjax.prepare.dedup.corpus_steps import OVERALL
from llmjax.prepare.documents import table_files, write_arrays
from llmjax.prepare.engine import Engine, Job, Local, workers_of
from llmjax.prepare.sources import Source, check_extras, earlier_runs, fingerprint, resolve_sources
from llmjax.prepare.state import State
from llmjax.prepare.steps import make_step
from llmjax.prepare.summary import total
from llmjax.version import __version__

OUTPUTS = (*SPLITS, "rejected")
PLACED = ("pieces", "plan", "shards", "rejected")  # in work/, about where documents go
PLACING = ("holdout_percent", "holdout_max_bytes", "holdout_tail_percent", "shard_bytes")
# Settings of how the preparation runs. They change no output, so a run may be resumed with others.
HOW = ("workers", "memory_bytes", "engine", "spark_master", "keep_work")


def run(c: ConfigDict, workdir: Path) -> dict[str, float | int | str]:
    """Make WORKDIR/prepare from `c.data.sources` by the steps of `c.prepare` and return its final numbers.

    Rows of train/SOURCE-NNNNN.jsonl and heldout/ have id, source, group, path and text, and url, licence, language and
    facts where known. Rows of rejected/ also have the reason, and the first 1,000 characters of the text. The same
    sources and settings give the same bytes in every file, for any number of workers and however often the run stopped.

    Raises:
        UserError: for sources or settings that cannot be used, if nothing is left to train on, or if nothing could be
            held out although a share was asked for.
        OSError: if a file cannot be read or the disk is full. The same command goes on from there.
    """
    began = time.perf_counter()
    earlier, sources = _check(c, workdir)
    cut = parts.cut([*earlier, *sources])
    # For the documents between the steps, and for the shards. A finished preparation keeps its space until the end.
    storage.require_space(workdir, 2 * sum(part.size for part in cut))
    folder = _begin(c, workdir, sources)
    work = folder / "work"
    state = State(make_engine(c.prepare, work), cut, work, c.prepare.to_dict(), earlier=len(earlier))
    with contextlib.closing(state.engine):
        results = _run(c, state, sources, folder)
    if folder.name != "prepare":
        storage.replace_folder(folder, workdir / "prepare")
    if not c.prepare.keep_work:
        storage.remove(workdir / "prepare" / "work")
    return {**results, "seconds": round(time.perf_counter() - began, 3)}


def check(c: ConfigDict, workdir: Path | None, *, fresh: bool = False) -> None:
    """Raise UserError for sources and settings that `run` would refuse. Nothing is changed.

    Args:
        workdir: the run's folder, None: not known.
        fresh: of no consequence here.
    """
    _check(c, workdir)


def _check(c: ConfigDict, workdir: Path | None) -> tuple[list[Source], list[Source]]:
    """The earlier runs and the sources. Raises UserError for everything that a run would refuse."""
    earlier = earlier_runs(c.prepare.earlier)
    sources = resolve_sources(c.data.sources)
    check_extras(sources)
    check_steps(c.prepare)
    if workdir is not None:
        _check_apart([*earlier, *sources], workdir)
    _models(c)
    if "caps" in c.prepare.steps:
        corpus_steps.parse_caps(c.prepare.caps, sources=[source.name for source in (*earlier, *sources)])
    make_engine(c.prepare, Path()).close()
    _make_steps(json.dumps(c.prepare.to_dict()))
    return earlier, sources


@functools.lru_cache(maxsize=1)
def _make_steps(settings: str) -> None:
    """Make every step once, as the tasks will. Raises UserError for settings that a step cannot use."""
    given = json.loads(settings)
    for name in ("extract", *given["steps"]):
        if name not in OVERALL:
            make_step(name, SimpleNamespace(**given))


def _run(c: ConfigDict, state: State, sources: Sequence[Source], folder: Path) -> dict[str, float | int | str]:
    summaries, found = _steps(c, state, sources)
    holdout = split.Holdout(
        c.data.holdout_percent, c.data.holdout_max_bytes, c.data.holdout_tail_percent, c.data.min_bytes
    )
    written = _write(c, state, holdout, folder)
    funnels = account.funnels(sources, state.parts, summaries, written)
    account.check_result(c.data, funnels, folder)
    manifest = account.manifest(c, sources, funnels, written, found)
    account.write_card(manifest, folder / "card.html")
    _sweep(folder)
    storage.write_json(folder / "manifest.json", manifest)
    print(account.table(funnels, sources), flush=True)
    return account.numbers(funnels)


def check_steps(prepare: ConfigDict) -> None:
    """Raise UserError for steps that are unknown or there twice, and for an unknown route or engine."""
    import difflib

    known = (*clean.PER_DOCUMENT[1:], *OVERALL)
    for number, name in enumerate(prepare.steps):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? They" if near else "they"
            raise UserError(f"prepare.steps: there is no step {name!r}; {hint} are {', '.join(known)}")
        if name in prepare.steps[:number]:
            raise UserError(f"prepare.steps has {name!r} twice: leave one of them out")
    if prepare.route not in ("source", "language"):
        raise UserError(f"prepare.route must be source or language, not {prepare.route!r}")
    if prepare.engine not in ("local", "spark"):
        raise UserError(f"prepare.engine must be local or spark, not {prepare.engine!r}")


def make_engine(prepare: ConfigDict, work: Path) -> Engine:
    """The engine of c.prepare.engine. UserError if Spark is asked for and not installed."""
    if prepare.engine == "spark":
        from llmjax.prepare.spark import Spark

        return Spark(prepare.spark_master)
    return Local(workers_of(prepare.workers), prepare.memory_bytes, work / "spill")


def _begin(c: ConfigDict, workdir: Path, sources: Sequence[Source]) -> Path:
    """The folder to work in. It holds what a stopped run of the same sources and settings left, or nothing.

    Settings of where documents go do not undo the cleaning. When only these change, the shards alone are made again from
    work/ of a stopped run, or of a finished run that kept it.
    """
    finished, new = workdir / "prepare", workdir / "prepare.new"
    storage.recover_folder(finished)
    folder = new if (finished / "manifest.json").exists() else finished
    cleaning = _cleaning(c, sources)
    placing = _fingerprint([*(c.data[key] for key in PLACING), c.prepare.route])
    if not _is(folder / "work" / "cleaning", cleaning):
        storage.remove(folder)
        if _is(finished / "work" / "cleaning", cleaning):
            storage.rename(finished / "work", folder / "work")
            storage.remove(folder / "work" / "placing")
    if not _is(folder / "work" / "placing", placing):
        for path in (*(folder / name for name in OUTPUTS), *(folder / "work" / name for name in PLACED)):
            storage.remove(path)
    _sweep(folder)
    storage.write_text(folder / "work" / "cleaning", cleaning)
    storage.write_text(folder / "work" / "placing", placing)
    for name in OUTPUTS:
        (folder / name).mkdir(exist_ok=True)
    return folder


def _sweep(folder: Path) -> None:
    """Remove the temporary files of processes that were killed."""
    for left in folder.rglob(".*.tmp"):
        storage.remove(left)


def _cleaning(c: ConfigDict, sources: Sequence[Source]) -> str:
    """A digest of what decides which documents there are and what they say."""
    settings = {key: value for key, value in c.prepare.to_dict().items() if key not in (*HOW, "route")}
    read = [c.data.text_field, c.data.min_bytes, list(c.data.sources), fingerprint(sources)]
    return _fingerprint([__version__, platform.python_version(), read, settings, _models(c)])


def _models(c: ConfigDict) -> dict[str, str]:
    """Digests of the files that the settings name. Raises UserError for one that is not there."""
    settings = c.prepare
    models = {key: _digest(value) for key, value in settings.items() if key.endswith("_model") and value}
    models |= {path: _digest(path) for path in settings.decontaminate}
    return models | {run: _digest(f"{run}/prepare/manifest.json") for run in settings.earlier}


def _fingerprint(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _is(path: Path, content: str) -> bool:
    return path.is_file() and storage.read_text(path) == content


def _digest(path: str) -> str:
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"prepare: there is no file {path}")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _check_apart(sources: Sequence[Source], workdir: Path) -> None:
    home = workdir.resolve()
    made = tuple(f"{home / name}{os.sep}" for name in ("prepare", "prepare.new"))
    real = functools.cache(os.path.realpath)  # of folders, which have many files each
    for source in sources:
        if source.kind in ("stdlib", "url"):
            continue
        around = source.kind == "folder" and home.is_relative_to(Path(source.root).resolve())
        places = (
            os.path.realpath(file) if os.path.islink(file) else os.path.join(real(os.path.dirname(file)), "")
            for file in source.files
        )
        if around or any(place.startswith(made) for place in places):
            raise UserError(
                f"the source {source.spec!r} takes in the run's own folder {workdir}, so the run would read what it "
                "writes: choose another --workdir, or list in data.sources the subfolders that hold text"
            )


def _steps(
    c: ConfigDict, state: State, sources: Sequence[Source]
) -> tuple[list[list[dict[str, Any]]], dict[str, dict[str, float]]]:
    """Run all steps. Returns the parts' summaries of every pass, and the numbers of the steps over all documents."""
    passes: list[list[dict[str, Any]]] = []
    found: dict[str, dict[str, float]] = {}
    waiting = ["extract"]
    for name in c.prepare.steps:
        if name not in OVERALL:
            waiting.append(name)
            continue
        _pass(c, state, waiting, passes)
        if len(passes) == 1:
            _check_fields(c, state, sources, passes[0])
        waiting = []
        found[name] = corpus_steps.run(state, name)
    _pass(c, state, waiting, passes)
    if len(passes) == 1:
        _check_fields(c, state, sources, passes[0])
    return passes, found


def _pass(c: ConfigDict, state: State, names: Sequence[str], passes: list[list[dict[str, Any]]]) -> None:
    """One pass over the parts, unless there is nothing to do."""
    if not names and not state.spans and passes:
        return
    out = state.work / f"documents-{len(passes)}"
    jobs = [
        Job(
            part.number,
            out / f"{part.number:06d}.json",
            {
                "part": part, "before": str(state.documents) if passes else "", "removed": state.removed,
                "spans": state.spans, "steps": list(names), "settings": state.settings,
                "text_field": c.data.text_field, "min_bytes": c.data.min_bytes, "out": str(out),
            },
            part.size,
        )
        for part in state.parts
    ]  # fmt: skip
    label = "cleaning" if any(name != "extract" for name in names) else ("reading" if not passes else "cutting")
    passes.append(state.engine.map(clean.clean_part, jobs, label=label))
    state.documents, state.removed, state.spans = out, "", ""


def _check_fields(c: ConfigDict, state: State, sources: Sequence[Source], summaries: Sequence[dict[str, Any]]) -> None:
    """Raise UserError if none of a source's rows has `data.text_field`."""
    import difflib

    for number, source in enumerate(sources):
        own = total(s for part, s in zip(state.parts, summaries, strict=True) if part.source == number + state.earlier)
        if not own.fields["rows"] or own.fields["with_field"]:
            continue
        names, wanted = own.fields["names"], c.data.text_field
        near = difflib.get_close_matches(wanted, names, n=1)
        mend = f"set data.text_field={near[0]}" if near else "set data.text_field to one of these"
        raise UserError(
            f"source {source.name!r}: none of its {own.fields['rows']:,} rows has the field {wanted!r}; they have "
            f"{', '.join(names) or 'no fields'}; {mend}"
        )


def _write(c: ConfigDict, state: State, holdout: split.Holdout, folder: Path) -> account.Written:
    """Decide where every document goes, and write all shards."""
    settings, names = dataclasses.asdict(holdout), _source_names(state)
    removed = table_files(Path(state.removed)) if state.removed else []
    pieces: list[str] = []
    if holdout.tail_percent:
        state.map(
            split.cut_part, "pieces", label="cutting tails", documents=str(state.documents), removed=state.removed,
            percent=holdout.tail_percent, min_bytes=holdout.min_bytes,
        )  # fmt: skip
        pieces = table_files(state.work / "pieces")
    plan, jobs, planned, seen = state.work / "plan", [], [], []
    storage.remove(plan)
    # This machine decides where documents go, from numbers alone.
    with Local(workers_of(c.prepare.workers), c.prepare.memory_bytes, state.work / "spill").database() as database:
        places = split.place(
            database,
            holdout,
            documents=state.documents,
            removed=removed,
            linked=state.linked,
            pieces=pieces,
            first=state.earlier,
            route=c.prepare.route == "language",
        )
        for number, shard in enumerate(shards.assign(places, shard_bytes=c.data.shard_bytes)):
            ordinals = np.concatenate([chunk[0] for chunk in shard.chunks])
            if shard.split == "seen":
                seen.append(ordinals)
                continue
            rows = plan / f"{number:06d}.npz"
            write_arrays(rows, ordinals=ordinals, pieces=np.concatenate([chunk[1] for chunk in shard.chunks]))
            name = names[shard.source] + (f".{shard.language or 'unknown'}" if c.prepare.route == "language" else "")
            out = folder / shard.split / f"{name}-{shard.number:05d}.jsonl"
            arguments = {"documents": str(state.documents), "rows": str(rows), "holdout": settings}
            jobs.append(Job(number, state.work / "shards" / f"{number:06d}.json",
                            {**arguments, "split_name": shard.split, "count_bias": c.prepare.bias, "out": str(out)}, shard.bytes))  # fmt: skip
            planned.append(shard)
        groups = split.heldout_groups(database, holdout)
    described = state.engine.write(jobs)
    rejects = _write_rejected(state, settings, names, seen, folder)
    return account.Written(
        shards=[(s.split, names[s.source], text) for s, text in zip(planned, described, strict=True)],
        rejected=rejects,
        heldout_groups={names[source]: _groups(state, rows) for source, rows in groups.items()},
    )


def _write_rejected(
    state: State, holdout: dict[str, Any], names: Sequence[str], seen: Sequence[np.ndarray], folder: Path
) -> list[tuple[str, dict[str, Any]]]:
    seen_file = state.work / "plan" / "seen.npz"
    if seen:
        write_arrays(seen_file, ordinals=np.concatenate(seen))
    jobs, within = [], dict.fromkeys(range(len(names)), 0)
    new = [part for part in state.parts if part.source >= state.earlier]
    for part in new:
        out = folder / "rejected" / f"{names[part.source]}-{within[part.source]:05d}.jsonl"
        within[part.source] += 1
        arguments = {
            "documents": str(state.documents), "removed": state.removed, "number": part.number, "holdout": holdout,
            "seen": str(seen_file) if seen else "", "out": str(out),
        }  # fmt: skip
        jobs.append(Job(part.number, state.work / "rejected" / f"{part.number:06d}.json", arguments, part.size))
    described = state.engine.map(shards.write_rejected, jobs, label="writing rejects")
    return [(part.name, text) for part, text in zip(new, described, strict=True)]


def _source_names(state: State) -> list[str]:
    names = dict.fromkeys(range(max((part.source for part in state.parts), default=-1) + 1), "")
    return list((names | {part.source: part.name for part in state.parts}).values())


def _groups(state: State, ordinals: Sequence[int]) -> list[str]:
    """The names of held-out groups. A row is a group of its own, whose name is an id: those are left out."""
    table = shards.fetch(state.documents, np.array(ordinals, np.int64), columns=("group", "path"))
    pairs = zip(table["group"].to_pylist(), table["path"].to_pylist(), strict=True)
    return sorted(group for group, _ in pairs if not _is_id(group))


def _is_id(group: str) -> bool:
    return len(group) == 32 and all(letter in "0123456789abcdef" for letter in group)
