"""Search for settings with which a run fits or is faster: neighbours of its config, tried with the compiler.

Neighbours differ in the rematerialisation policy, the mesh (more fsdp and less tensor, and the reverse), the placement of
the residual stream, the number of micro-batches and the level of ZeRO. The formulas of `analytic.py` rank them, and the
compiler decides. It refuses a program that does not fit in seconds.
"""

import itertools
import sys
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from llmjax import config
from llmjax.errors import UserError
from llmjax.scaling import compiler, post
from llmjax.scaling.plan import Plan, plan_locked
from llmjax.scaling.render import slowest
from llmjax.scaling.topology import Topology

Changes = dict[str, Any]
POLICIES = ("none", "selective", "save_dot_except_mlpwi", "save_qkv_proj", "full")
SLACK = 1.3  # settings that need more than this share of the memory by formula are not tried


def meshes_near(axes: dict[str, int]) -> Iterator[dict[str, int]]:
    """The mesh itself, and those with a factor of 2 or 4 moved from one axis to another."""
    yield axes
    pairs = [("data", "fsdp"), ("tensor", "fsdp"), ("fsdp", "tensor"), ("fsdp", "data")]
    for (source, target), factor in itertools.product(pairs, (2, 4)):
        if axes.get(source, 1) % factor == 0:
            yield axes | {source: axes[source] // factor, target: axes.get(target, 1) * factor}


def neighbours(c: ConfigDict, topology: Topology) -> Iterator[Changes]:
    """Changes to the config to try. The first is no change."""
    axes = {k: v for k, v in compiler.abstract_mesh(c, devices=topology.devices).shape.items() if v > 1}
    micro = c.train.micro_batches
    for mesh, remat, parts in itertools.product(
        meshes_near(axes), POLICIES, (micro, micro * 2, micro * 4, micro // 2, micro // 4)
    ):
        sequences = (False, True) if mesh.get("tensor", 1) > 1 else (c.parallel.sequence,)
        levels = sorted({3, c.parallel.zero}) if mesh.get("fsdp", 1) > 1 else (c.parallel.zero,)
        for sequence, zero in itertools.product(sequences, levels):
            wanted = {
                "parallel.mesh": " ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1),
                "model.remat": remat,
                "train.micro_batches": parts,
                "parallel.sequence": sequence,
                "parallel.zero": zero,
            }
            if mesh == axes:
                del wanted["parallel.mesh"]
            flat = config.flatten(c.to_dict())
            yield {key: value for key, value in wanted.items() if flat[key] != value}


def changed(c: ConfigDict, changes: Changes) -> ConfigDict:
    """A copy of the config with some settings changed. Raises UserError as `config.check` does."""
    c = c.copy_and_resolve_references()
    for key, value in changes.items():
        config.set_key(c, key, value)
    config.check(c)
    return c.lock()


def promising(c: ConfigDict, topology: Topology, *, count: int) -> list[Changes]:
    """The config itself, and the neighbours that are fastest by formula and should fit: `count` in all."""
    found = []
    platform = "tpu" if topology.chip.torus else "gpu"
    seen: set[str] = set()
    available = topology.chip.usable / topology.chip.devices
    for changes in neighbours(c, topology):
        if str(changes) in seen:
            continue
        seen.add(str(changes))
        try:
            made = compiler.resolve(changed(c, changes), platform=platform)
            sizes = compiler.stages(made)
            paper = post.plan(made, topology, sizes.stages[-1])
        except UserError:  # heads that tensor does not divide, rows that the devices do not
            continue
        if changes and paper.memory["peak"] > SLACK * available:
            continue
        found.append((paper.seconds["step"] if changes else 0.0, len(changes), str(changes), changes))
    return [changes for *_, changes in sorted(found, key=lambda item: item[:3])[:count]]


def search(
    c: ConfigDict, topology: Topology, *, trials: int, price: float | None = None, paper: bool = False
) -> list[tuple[Changes, Plan | str]]:
    """Try the config and its most promising neighbours: (changes, plan or error), in the order tried.

    The caller holds the lock of the compiler. `paper` is that of `make_plan`.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    tried: list[tuple[Changes, Plan | str]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(file=sys.stderr)) as bar:
        choosing = bar.add_task("ranking settings by formula", total=None)
        chosen = promising(c, topology, count=trials)
        bar.update(choosing, total=1, completed=1)
        task = bar.add_task("trying them", total=len(chosen))
        for changes in chosen:
            try:
                tried.append((changes, plan_locked(changed(c, changes), topology, price=price, paper=paper)))
            except UserError as error:
                tried.append((changes, str(error)))
            bar.advance(task)
    return tried


def best(tried: list[tuple[Changes, Plan | str]]) -> tuple[Changes, Plan] | None:
    """The fastest plan that fits, or None."""
    fitting = [(changes, plan) for changes, plan in tried if not isinstance(plan, str) and plan["fits"]]
    return min(fitting, key=lambda item: slowest(item[1]), default=None)
