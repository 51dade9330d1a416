"""Jupyter notebooks: prose and code in their order, without outputs."""

import json
from typing import Any

from llmjax.prepare.formats import RejectedError
from llmjax.prepare.formats.rows import Row, rejected
from llmjax.prepare.formats.text import decode


def document(data: bytes, path: str) -> Row:
    """The document of a notebook of format 3 or 4 (nbformat), or why it has none."""
    try:
        content, facts = decode(data)
        text = text_of(json.loads(content))
    except RejectedError as error:
        return rejected(path, f"broken notebook: {error}", data)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return rejected(path, f"broken notebook: {type(error).__name__}: {error}", data)
    row = {"path": path, "group": path, "format": "text", "data": text.encode("utf-8", "replace"), "size": len(data)}
    return {**row, "facts": json.dumps(facts)} if facts else row


def text_of(notebook: dict[str, Any]) -> str:
    """The sources of the cells, an empty line between them; code is fenced as in Markdown."""
    told = notebook.get("metadata") or {}
    named = (told.get("kernelspec") or {}).get("language"), (told.get("language_info") or {}).get("name")
    language = next((name for name in named if isinstance(name, str) and name), "python")
    cells = (
        notebook["cells"] if "cells" in notebook else [c for sheet in notebook["worksheets"] for c in sheet["cells"]]
    )
    texts = []
    for cell in cells:
        source = cell.get("source", cell.get("input")) or ""
        source = (source if isinstance(source, str) else "".join(source)).strip("\n")
        if source.strip():
            texts.append(f"```{language}\n{source}\n```" if cell.get("cell_type") == "code" else source)
    return "\n\n".join(texts) + "\n"
