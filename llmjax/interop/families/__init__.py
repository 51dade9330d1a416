"""The families of Hugging Face models: the tuples FAMILIES of the modules here, collected by `model_type`."""

import importlib
import pkgutil

from llmjax.interop.mapping import Family


def _collect() -> dict[str, Family]:
    found: dict[str, Family] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(__path__)):
        for family in getattr(importlib.import_module(f"{__name__}.{module}"), "FAMILIES", ()):
            for model_type in family.model_types:
                assert model_type not in found, f"two families for {model_type}"
                found[model_type] = family
    return found


FAMILIES: dict[str, Family] = _collect()
