"""The families of Hugging Face models: the tuples FAMILIES of the modules here, collected by `model_type`."""

import importlib
import pkgutil

from llmjax.interop.mapping import Family


def _collect() -> dict[str, Family]:
    found: dict[str, Family] = {}
    names = (info.name for info in pkgutil.iter_modules(__path__))
    # Llama's first: a model that several families can say is exported as the one that most programs read.
    for module in sorted(names, key=lambda name: (name != "llama", name)):
        for family in getattr(importlib.import_module(f"{__name__}.{module}"), "FAMILIES", ()):
            for model_type in family.model_types:
                assert model_type not in found, f"two families for {model_type}"
                found[model_type] = family
    return found


FAMILIES: dict[str, Family] = _collect()
