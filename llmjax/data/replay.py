"""Replay: a share of general text beside the text of a domain, so that a model keeps what it knows (Ibrahim et al. 2024).

`data.replay` names the sources of general text. They are `data.replay_percent` of the rows; the others are the domain.
Both groups are measured on their held-out text, in training and by the eval stage.
"""

from collections.abc import Iterable, Mapping

from ml_collections import ConfigDict

from llmjax.data.mixture import tempered
from llmjax.errors import UserError

DOMAIN, GENERAL = "domain", "general"  # the names of the groups in results


def is_general(c: ConfigDict, source: str) -> bool:
    """Whether a source is one of `data.replay`, or one of its languages (SOURCE.LANGUAGE)."""
    return any(source == name or source.startswith(f"{name}.") for name in c.data.replay)


def groups(c: ConfigDict, sources: Iterable[str]) -> dict[str, list[str]]:
    """The sources of each group that has any; {} without `data.replay`."""
    if not c.data.replay:
        return {}
    found: dict[str, list[str]] = {}
    for source in sources:
        found.setdefault(GENERAL if is_general(c, source) else DOMAIN, []).append(source)
    return found


def weights(c: ConfigDict, sizes: Mapping[str, int]) -> dict[str, float]:
    """The weight of each source: `data.replay_percent` for general text, the rest for the domain.

    Within a group a source weighs as without replay. Raises UserError if either group is empty.
    """
    found = groups(c, sizes)
    if len(found) < 2:
        raise UserError(
            f"data.replay={tuple(c.data.replay)} must name some of the sources with training text, but not all: they are "
            f"{', '.join(sizes)}"
        )
    share = {GENERAL: c.data.replay_percent / 100, DOMAIN: 1 - c.data.replay_percent / 100}
    made: dict[str, float] = {}
    for group, sources in found.items():
        own = tempered({source: sizes[source] for source in sources}, c.data.mixture_temperature)
        made |= {source: share[group] * weight / sum(own.values()) for source, weight in own.items()}
    return made
