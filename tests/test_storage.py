"""The storage room: whole files or none, locks that go with their process, lines that are never glued together."""

import ast
import fcntl
import gzip
import multiprocessing
import re
import threading
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


# What opens for itself: processes apart, one that has nothing of llmjax, and one that answers through its own output.
ALONE = {"eval/jail.py", "prepare/formats/isolated.py"}
WRITERS = ("write_text", "write_bytes", "rename", "unlink", "rmdir", "touch", "truncate", "symlink_to", "hardlink_to")
MODE = re.compile("[rwaxbt+]+")


def _writes(call: ast.Call) -> bool:
    """Whether a call opens a file to write it, or renames, replaces or removes one, but for those of `storage`."""
    words = [word.value for word in (*call.args, *(k.value for k in call.keywords)) if isinstance(word, ast.Constant)]
    modes = [word for word in words if isinstance(word, str) and MODE.fullmatch(word)]
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    of = call.func.value if isinstance(call.func, ast.Attribute) else None
    module = of.id if isinstance(of, ast.Name) else ""
    if module == "storage":
        return False
    if name in ("open", "fdopen", "GzipFile"):
        if module == "temporary":  # what `storage.replacing` gave
            return False
        return any(set(mode) & set("wax+") for mode in modes)
    if module in ("os", "shutil"):
        return name in (*WRITERS, "replace", "remove", "rmtree", "move") or name.startswith("copy")
    if module == "np" and name.startswith("save"):
        return not (isinstance(call.args[0], ast.Name) and call.args[0].id in ("file", "buffer"))
    # `Path.replace` has one argument, `str.replace` two, and `dataclasses.replace` names.
    return of is not None and (name in WRITERS or (name == "replace" and len(call.args) == 1 and not call.keywords))


def test_no_other_room_opens_files_to_write_or_renames_or_locks() -> None:
    root = Path(storage.__file__).parent
    found = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name in {"storage.py", *ALONE}:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imports = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if "fcntl" in imports or (isinstance(node, ast.Call) and _writes(node)):
                found.append(f"{name}:{node.lineno}")
    assert not found, f"use llmjax/storage.py: {', '.join(found)}"


def test_text_of_users_is_read_without_marks_and_names_what_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_bytes("\ufeffa\n\ufeffb\n".encode())
    assert list(storage.read_lines(path)) == ["a\n", "b\n"]
    packed = tmp_path / "rows.txt.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert storage.read_text(packed) == "a\nb\n"
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(UserError, match="rows.txt.gz is no whole gzip file"):
        storage.read_text(packed)
    path.write_bytes(b"a\ncaf\xe9\n")
    with pytest.raises(UserError, match="rows.txt, line 2, is no UTF-8 .*: save it as UTF-8"):
        storage.read_text(path)


def test_an_appended_line_begins_a_line(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    storage.append_line(path, "a")
    path.write_text("a\nby hand")
    storage.append_line(path, "b")
    assert path.read_text() == "a\nby hand\nb\n"


def test_lines_that_threads_append_at_once_stay_apart(tmp_path: Path) -> None:
    path, length = tmp_path / "rows.jsonl", 100_000

    def append(letter: str) -> None:
        for _ in range(20):
            storage.append_line(path, letter * length)
            storage.cut_unfinished_line(path)  # what opening for more does

    threads = [threading.Thread(target=append, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = path.read_text().split("\n")
    assert sorted(lines) == ["", *sorted(letter * length for letter in "abcd" * 20)]


def test_json_may_hold_half_a_character(tmp_path: Path) -> None:
    storage.write_json(tmp_path / "a.json", {"caf\udce9": "\u00e9"})
    assert storage.read_json(tmp_path / "a.json", mend="") == {"caf\udce9": "\u00e9"}


def test_a_folder_takes_the_place_of_another_and_a_kill_in_between_loses_neither(tmp_path: Path) -> None:
    old, new = tmp_path / "made", tmp_path / "new"
    for folder, text in ((old, "old"), (new, "new")):
        storage.write_text(folder / "a", text)
    storage.rename(old, tmp_path / ".made.old")  # killed between the two renames
    storage.recover_folder(old)
    assert (old / "a").read_text() == "old"
    storage.replace_folder(new, old)
    assert (old / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_look_at_a_lock_keeps_no_run_from_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lock"
    path.touch()
    looking = path.open()
    fcntl.flock(looking, fcntl.LOCK_SH)  # as is_locked does, which holds it for less
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: looking.close())
    with storage.locked(path, otherwise="another process is at work"):
        assert storage.is_locked(path)
    assert not storage.is_locked(path)
