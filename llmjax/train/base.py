"""The base of a run with adapters: the checkpoint that its frozen parameters are in.

Frozen parameters are not copied. The run keeps `checkpoints/base.json`: where the base is, a fingerprint of its files, and
which kernels the run reads in few bits. The base is looked for at its path from the run, so that both can be moved
together, and then at its absolute path.
"""

import hashlib
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from llmjax import storage
from llmjax.train.folders import FROZEN, CheckpointError

FILE = "base.json"
PART = 1 << 16  # bytes of a file's beginning and of its end that the fingerprint reads


@dataclass(frozen=True)
class Base:
    """What `checkpoints/base.json` says."""

    path: str  # of the checkpoint folder, from the run's folder
    absolute: str  # the same, as it was when the run began
    item: str  # "params", or "ema" where that is what counts
    fingerprint: str
    form: str  # of the kernels below: int8 or nf4; "stored": none are in few bits
    kernels: tuple[str, ...]  # paths of the linear maps whose kernels are read in few bits

    def folder(self, checkpoints: Path) -> Path:
        """The base's checkpoint folder, for a run with this folder of checkpoints.

        Raises CheckpointError when it is gone, or another one than it was.
        """
        run = checkpoints.absolute().parent
        found = [path for path in (Path(os.path.normpath(run / self.path)), Path(self.absolute)) if path.is_dir()]
        mend = f'write its folder as "absolute" into {checkpoints / FILE}'
        if not found:
            raise CheckpointError(
                f"{run} has adapters alone, and its base, the checkpoint {self.absolute}, is not there: put it back; if it "
                f"was moved, {mend}"
            )
        same = [path for path in found if fingerprint(path, self.item) == self.fingerprint]
        if not same:
            raise CheckpointError(
                f"{run} has adapters alone, and its base, the checkpoint {found[0]}, has changed since they were trained: "
                f"put the old one back (import it again, or copy it); if it is elsewhere, {mend}"
            )
        return same[0]


def item_of(folder: Path) -> str:
    """The item of a checkpoint folder that counts: the moving average where there is one."""
    return "ema" if (folder / "ema").is_dir() else "params"


def fingerprint(folder: Path, item: str) -> str:
    """What tells the parameters of a checkpoint folder from others: their files' names, sizes, beginnings and ends."""
    digest = hashlib.blake2b(digest_size=16)
    beside = folder.parent / FROZEN
    for root in (folder / item, *([beside] if beside.is_dir() else [])):
        for path in sorted(one for one in root.rglob("*") if one.is_file()):
            size = path.stat().st_size
            digest.update(f"{path.relative_to(root)} {size}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(PART))
                file.seek(max(size - PART, 0))
                digest.update(file.read(PART))
    return digest.hexdigest()


def of_checkpoint(folder: Path, *, run: Path, form: str = "stored", kernels: tuple[str, ...] = ()) -> Base:
    """The checkpoint folder as the base of a run."""
    item, absolute = item_of(folder), folder.absolute()
    path = os.path.relpath(absolute, run.absolute())
    return Base(path, str(absolute), item, fingerprint(folder, item), form, kernels)


def read(checkpoints: Path) -> Base | None:
    """The base of the run with this folder of checkpoints; None: it has its parameters itself.

    Raises UserError for a damaged file.
    """
    path = checkpoints / FILE
    if not path.is_file():
        return None
    mend = "get the run again: its other files do not say what its base is"
    told = storage.read_json(path, mend=mend)
    try:
        return Base(**{**told, "kernels": tuple(told["kernels"])})
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}): {mend}") from error


def write(checkpoints: Path, base: Base) -> None:
    """Write `base.json`."""
    storage.write_json(checkpoints / FILE, asdict(base))


def follow(checkpoints: Path, start: Path) -> None:
    """Note where the base of a run is now, if it is gone from its place and `start` is the same checkpoint, or stands on it."""
    kept = read(checkpoints)
    if kept is None:
        return
    try:
        kept.folder(checkpoints)
    except CheckpointError:
        theirs = read(start.parent)
        folder = start if theirs is None else theirs.folder(start.parent)
        if fingerprint(folder, kept.item) != kept.fingerprint:
            raise
        absolute, run = folder.absolute(), checkpoints.absolute().parent
        write(checkpoints, replace(kept, path=os.path.relpath(absolute, run), absolute=str(absolute)))
