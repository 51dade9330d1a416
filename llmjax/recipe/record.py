"""What a run's folder says of its stages: WORKDIR/stages.json, what they left, and the training in it.

stages.json keeps the settings with which each stage was started, fingerprints of the models that they name, and whether
the stage was finished or ended with an error.
"""

import contextlib
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from llmjax import config, storage
from llmjax.errors import UserError
from llmjax.recipe.stages import START, TRAINED, stage_of


def read(workdir: Path) -> dict[str, Any]:
    """The entries of stages.json: {stage: {"done", "settings", ...}}. Raises UserError when the file is damaged."""
    path, mend = workdir / "stages.json", "delete it, and the stages run again"
    entries = storage.read_json(path, mend=mend) if path.exists() else {}
    try:
        return {
            stage: {**entry, "done": bool(entry["done"]), "settings": dict(entry["settings"])}
            for stage, entry in entries.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error!r}): {mend}") from error


def start(workdir: Path) -> str:
    """The digest of the training that the run's stages started from, as a chain noted it; "": it is not known."""
    return next((str(e["settings"][START]) for e in read(workdir).values() if START in e["settings"]), "")


def models(workdir: Path) -> dict[str, str]:
    """Path -> fingerprint, of the runs that the settings of the stages name."""
    return {path: told for entry in read(workdir).values() for path, told in entry.get("models", {}).items()}


def sources(workdir: Path) -> list[str]:
    """`data.sources` of config.json: those that were accepted last, perhaps by other paths than the stages noted."""
    with contextlib.suppress(UserError):  # there is none, or it is damaged and will be written again
        return list(config.load(str(workdir / "config.json")).data.sources)
    return []


def note(workdir: Path, stage: str, entry: Mapping[str, Any]) -> None:
    """Put an entry in the place of a stage's."""
    storage.write_json(workdir / "stages.json", read(workdir) | {stage: dict(entry)})


def before(workdir: Path, stage: str, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings of the last start of a stage, and whether it was finished; None: it never was started.

    For a setting that the stage did not depend on in an earlier version, the value is that of other stages. If
    stages.json is lost, a checkpoint still has the settings of its training.
    """
    entries = read(workdir)
    if stage in entries:
        told = {key: value for entry in entries.values() for key, value in entry["settings"].items() if key in wanted}
        return {"done": entries[stage]["done"], "settings": told | entries[stage]["settings"]}
    if stage not in TRAINED or trained_steps(workdir) is None:
        return None
    meta = _newest_meta(workdir)
    if "imported" in meta:
        return None
    known = config.flatten(meta["config"])
    known |= {key: wanted.get(key, 0) for key in ("model.vocab_size", "objective.vocab_size")}  # 0 was resolved
    return {"done": False, "settings": {**wanted, **{key: known[key] for key in wanted if key in known}}}


def is_there(c: ConfigDict, workdir: Path, stage: str) -> bool:
    """Whether the results of a stage still exist."""
    left = (f"{stage}/results.json", *stage_of(c, stage).leaves)
    return all(any(workdir.glob(pattern)) for pattern in left)


def is_finished(c: ConfigDict, workdir: Path, stage: str) -> bool:
    """Whether a run has finished a stage, with whatever settings, and its results still exist."""
    return read(workdir).get(stage, {"done": False})["done"] and is_there(c, workdir, stage)


def adopt(workdir: Path, source: Path, stage: str) -> None:
    """Let the run in `workdir` use a stage that was finished in the run `source`, by a link."""
    note(workdir, stage, read(source)[stage])
    storage.link(source / stage, workdir / stage)  # last: a run with the link has the entry too


def trained_steps(workdir: Path) -> int | None:
    """The step of the newest checkpoint of the run; None without one."""
    return max((int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()), default=None)


def is_imported(workdir: Path) -> bool:
    """Whether the model of the run came from elsewhere."""
    return trained_steps(workdir) is not None and "imported" in _newest_meta(workdir)


def next_aside(workdir: Path) -> Path:
    """The folder to which a training would be moved."""
    return next(path for n in itertools.count(1) if not (path := workdir / f"before-{n}").exists())


def set_aside(workdir: Path) -> None:
    """Move a training, with everything needed to load it, to a folder of its own, rather than delete it."""
    aside = next_aside(workdir)
    for name in ("config.json", "tokenizer"):
        if (workdir / name).exists():
            storage.copy(workdir / name, aside / name, without=("tokens",))
    for name in ("checkpoints", "metrics.jsonl", "train"):
        if (workdir / name).exists():
            storage.rename(workdir / name, aside / name)
    print(f"the training so far was moved to {aside}; delete it when you do not need it")


def _newest_meta(workdir: Path) -> dict[str, Any]:
    from llmjax.train import folders

    return folders.read_meta(folders.newest(workdir))
