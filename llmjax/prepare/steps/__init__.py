"""The steps that look at one document at a time, each a pure function from record batch to record batch."""

import importlib
from typing import Any

from llmjax.prepare.documents import Step

SHARED_FILES = {  # steps that do not have a file of their own
    **dict.fromkeys(("gopher_quality", "gopher_repetition", "fineweb", "c4"), "quality_rules"),
    **dict.fromkeys(("quality", "toxicity", "perplexity"), "scores"),
}


def make_step(name: str, settings: Any) -> Step:
    """The step of this name for the settings of c.prepare. Its file is imported here, since it may need an extra.

    Raises:
        UserError: for settings that the step cannot use, or a library that is not installed.
    """
    module = importlib.import_module(f"{__name__}.{SHARED_FILES.get(name, name)}")
    step: Step = getattr(module, name if name in SHARED_FILES else "make")(settings)
    return step
