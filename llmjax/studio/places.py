"""Names of files and folders below the folders that the studio may read. A name never leads out of them."""

from collections.abc import Sequence
from pathlib import Path

from llmjax.errors import UserError
from llmjax.serve.refusals import Refusal

LONGEST = 1000  # characters of a name


class Places:
    """The folder of runs, and folders of data beside it."""

    def __init__(self, runs: Path, data: Sequence[Path] = ()) -> None:
        """Raises UserError for a folder that is not there."""
        for folder in (runs, *data):
            if not folder.is_dir():
                raise UserError(f"there is no folder {folder}: give the folder of your runs, as in llmjax studio runs")
        self._folders = {"runs": runs.resolve(), **{str(folder): folder.resolve() for folder in data}}

    @property
    def names(self) -> list[str]:
        """The names of the places; "runs" is the first."""
        return list(self._folders)

    def path(self, name: str, place: str = "runs") -> Path:
        """The file or folder of a name in a place; "": the place itself. It may be missing.

        Raises Refusal for an unknown place, for hidden files, and for a name that leads out, also by a link.
        """
        root = self._folders.get(place)
        if root is None:
            raise Refusal(404, f"there is no place {place[:LONGEST]!r}", code="not_found", param="place")
        parts = name.split("/") if name else []
        if len(name) > LONGEST or "\0" in name or "\\" in name or any(not p or p.startswith(".") for p in parts):
            raise Refusal(400, "this is not the name of a file in the folder", code="invalid_name", param="name")
        try:
            found = root.joinpath(*parts).resolve()
        except (OSError, RuntimeError, ValueError):  # a circle of links, half a character
            found = root.parent
        if not found.is_relative_to(root):
            raise Refusal(404, "this name leads out of the folder", code="not_found", param="name")
        return found

    def name(self, path: Path, place: str = "runs") -> str:
        """The name of a path that `path` gave, or of one below it."""
        name = path.relative_to(self._folders[place]).as_posix()
        return "" if name == "." else name
