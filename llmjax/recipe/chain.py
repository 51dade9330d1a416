"""A chain: recipes that start from each other, such as base -> sft -> dpo -> grpo. Each link is a run in WORKDIR/LINK.

A config file with `get_chain(arg="")` returns the configs by name, in order. A link whose `train.init_from` names an
earlier link starts from that run, with its settings under `model`. All links are checked before the first one begins. A
link that is done is skipped; one that was killed goes on. When what a link starts from has changed, its own training is
another one, which only `again` replaces.

WORKDIR/chain.json has the links and their settings; WORKDIR/results.json has the results of each under LINK/NAME. The
folder of a chain stands for its last finished link (config/chains.py: run_of).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from llmjax import config, recipe, storage
from llmjax.config import changes
from llmjax.config.chains import CHAIN, is_finished
from llmjax.errors import UserError
from llmjax.parallel import processes


def run(links: Mapping[str, ConfigDict], workdir: Path, *, given: Mapping[str, Sequence[str]], again: bool) -> None:
    """Run the links in order.

    Args:
        given: the settings (dotted keys) of each link that the command line gave.
        again: changed settings may replace trainings, which are moved to WORKDIR/LINK/before-N.

    Raises UserError before the first link begins, for what any of them would refuse.
    """
    from llmjax.train import pretrain

    pretrain.start_devices(next((c for c in links.values() if "train" in c.stages), next(iter(links.values()))))
    placed = _placed(links, workdir, given)
    starts = _check(links, placed, workdir, again=again)
    with ExitStack() as held:
        processes.broadcast_from_first(lambda: recipe.claim(workdir, held))
        entries = {name: json.loads(config.to_json(c)) for name, c in links.items()}
        processes.broadcast_from_first(lambda: storage.write_json(workdir / CHAIN, {"links": entries}))
        for number, (name, c) in enumerate(placed.items(), start=1):
            processes.say(f"\n#### {name}: link {number} of {len(placed)} ({workdir / name})")
            recipe.run(c, workdir / name, c.stages, start=starts[name], again=again)
            processes.broadcast_from_first(lambda: _merge(list(placed), workdir))
        if len(placed) > 1:
            processes.broadcast_from_first(lambda: report(workdir))
    processes.say(table(workdir))


def read(workdir: Path) -> dict[str, ConfigDict]:
    """The links of the chain in a folder. Raises UserError when chain.json is damaged."""
    path = workdir / CHAIN
    entries = storage.read_json(path, mend="delete it, and run the chain again with its --config")["links"]
    return {name: config.from_json(json.dumps(entry)) for name, entry in entries.items()}


def report(workdir: Path) -> None:
    """Write WORKDIR/report: the links that have begun, side by side."""
    from llmjax import report as reports

    begun = [workdir / name for name in read(workdir) if (workdir / name / "config.json").is_file()]
    if len(begun) > 1:
        print(f"report: {reports.compare(begun, out=workdir / 'report')}", flush=True)


def table(workdir: Path) -> str:
    """The main results of the links, one a line."""
    results = json.loads((workdir / "results.json").read_text()) if (workdir / "results.json").exists() else {}
    columns = ("exact_match", "reward", "heldout_loss", "accuracy")
    shown = [name for name in columns if any(f"{link}/{name}" in results for link in read(workdir))]
    lines = [["", *shown]] if shown else []
    for link in read(workdir) if shown else ():
        values = [results.get(f"{link}/{name}") for name in shown]
        lines.append([link, *("" if value is None else f"{value:.3f}" for value in values)])
    return "\n".join("  ".join(f"{cell:>14}" for cell in line) for line in lines)


def _placed(
    links: Mapping[str, ConfigDict], workdir: Path, given: Mapping[str, Sequence[str]]
) -> dict[str, ConfigDict]:
    """The configs as they run: names of links in `train.init_from` are paths, and models are inherited."""
    from llmjax.train import initial

    placed: dict[str, ConfigDict] = {}
    for name, link in links.items():
        c, parent = config.from_json(config.to_json(link)), link.train.init_from
        if parent in links and parent not in placed:
            raise UserError(f"{name} starts from {parent}, which comes later in the chain: give the links in order")
        if parent in placed:  # a link that does not train stands for what it starts from
            trains = "train" in placed[parent].stages
            c.train.init_from = str(workdir / parent) if trains else placed[parent].train.init_from
        if c.train.inherit_model and parent:
            theirs = placed[parent].model if parent in placed else None  # it may be yet to be trained
            c = initial.inherited(c, given=given.get(name, ()), model=theirs)
        config.check(c)
        placed[name] = c.lock()
    return placed


def _check(
    links: Mapping[str, ConfigDict], placed: Mapping[str, ConfigDict], workdir: Path, *, again: bool
) -> dict[str, str]:
    """Check all links; for each a digest of the training that it starts from, "" if that is no link."""
    starts: dict[str, str] = {}
    digests: dict[str, str] = {}
    stand_ins: dict[str, str] = {}  # the runs that links are checked against while their own start is yet to be trained
    for name, c in placed.items():
        parent = links[name].train.init_from
        starts[name] = digests.get(parent, "")
        stand_in = stand_ins.get(parent, c.train.init_from)
        try:
            task = recipe.check(c, workdir / name, c.stages, start=starts[name], again=again, stand_in=stand_in)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        if "train" not in c.stages:
            digests[name], stand_ins[name] = starts[name], stand_in
            continue
        digests[name] = _digest(task.wanted("train"))
        stand_ins[name] = str(workdir / name) if is_finished(workdir / name) else stand_in
    return starts


def _digest(settings: Mapping[str, Any]) -> str:
    """What tells a training from others: its settings that matter, without those that have their defaults."""
    defaults = json.loads(json.dumps(config.flatten(config.base().to_dict())))
    told = {
        key: value
        for key, value in settings.items()
        if value != defaults.get(key) and changes.class_of(key) != changes.IRRELEVANT
    }
    return hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=16).hexdigest()


def _merge(names: Sequence[str], workdir: Path) -> None:
    merged: dict[str, Any] = {}
    for name in names:
        path = workdir / name / "results.json"
        if path.exists():
            merged |= {f"{name}/{key}": value for key, value in json.loads(path.read_text()).items()}
    storage.write_json(workdir / "results.json", merged)
