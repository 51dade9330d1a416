"""The storage room: whole files or none, locks that go with their process, lines that are never glued together."""

import multiprocessing
from pathlib import Path

import pytest

from llmjax import storage
from llmjax.errors import UserError


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    storage.write_json(path, {"a": 1})

    def fail() -> None:
        with storage.writing(path) as file:
            file.write(b"half of")
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        fail()
    assert storage.read_json(path, mend="") == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_a_damaged_json_file_is_a_mistake_with_its_mend(tmp_path: Path) -> None:
    path = tmp_path / "stages.json"
    path.write_bytes(b'{"a": \xff')
    with pytest.raises(UserError, match="stages.json is damaged .*: delete it"):
        storage.read_json(path, mend="delete it")


@pytest.mark.parametrize(("left", "kept"), [("a\nb\nha", "a\nb\n"), ("ha", ""), ("a\n", "a\n"), ("", ""), (None, "")])
def test_a_line_is_never_glued_to_what_a_killed_process_left(tmp_path: Path, left: str | None, kept: str) -> None:
    path = tmp_path / "rows.jsonl"
    if left is not None:
        path.write_text(left)
    with storage.appending(path) as file:
        file.write("new\n")
    assert path.read_text() == kept + "new\n"


def _hold(path: Path, ready: "multiprocessing.synchronize.Event", stop: "multiprocessing.synchronize.Event") -> None:
    with storage.locked(path, otherwise="taken"):
        ready.set()
        stop.wait(30)


def test_a_lock_goes_with_its_process(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, stop = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path / ".lock", ready, stop))
    other.start()
    assert ready.wait(30)
    with pytest.raises(storage.Locked, match="taken"), storage.locked(tmp_path / ".lock", otherwise="taken"):
        pass
    other.kill()
    other.join()
    with storage.locked(tmp_path / ".lock", otherwise="taken"):
        pass
