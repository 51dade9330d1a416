"""Tools of a file run in a process that is ended with a call that takes too long, whatever the call does."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")

from serving import until

from llmjax.agents import processes, react, sources, tools
from llmjax.agents.react import Budget, Call
from llmjax.agents.tools import Tool
from llmjax.errors import UserError

TOOLS = '''
import enum, os, re, subprocess, sys, time
from pathlib import Path
from typing import Any
from llmjax.agents import tool

class Day(enum.Enum):
    TODAY = "today"

CALLED = []

@tool(effect="read", trusted=True)
def count(day: Day = Day.TODAY) -> str:
    """How often this was called."""
    CALLED.append(day)
    print("a tool prints")
    return f"{day.name} {len(CALLED)}"

@tool(effect="read")
async def pid() -> int:
    return os.getpid()

@tool(effect="read")
def spin() -> str:
    while True:
        pass

@tool(effect="read")
def match() -> bool:
    return bool(re.match("(a+)+$", "a" * 60 + "b"))  # nothing else in the process runs meanwhile

@tool(effect="write")
def wait(path: str) -> str:
    while not Path(path).exists():
        time.sleep(0.01)
    return "there"

@tool(effect="ask")
def leave() -> None:
    os._exit(3)

@tool(effect="ask")
def ask() -> str:
    return input("yes? ")

@tool(effect="ask")
def start() -> int:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid

@tool(effect="read")
def half() -> str:
    return "\\ud800 \u00e9"
'''


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "my_tools.py"
    made.write_text(TOOLS)
    return made


@pytest.fixture
def found(path: Path) -> Iterator[dict[str, Tool]]:
    with sources.opened([str(path)]) as opened:
        yield {one.name: one for one in opened}


def run(tool: Tool, seconds: float = 60.0, **arguments: Any) -> tuple[str, bool]:
    return react.run_tool(tool, Call(tool.name, arguments), seconds)


def runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_tools_of_a_process_are_those_of_the_file_and_keep_what_the_file_keeps(found, path):
    for one, other in zip(tools.load(path), found.values(), strict=True):
        assert [getattr(one, name) for name in tools.DESCRIBED] == [getattr(other, name) for name in tools.DESCRIBED]
    assert [run(found["count"]), run(found["count"], day="today")] == [("TODAY 1", False), ("TODAY 2", False)]
    assert found["count"].run() == "TODAY 3"
    assert run(found["pid"]) == run(found["pid"]) != (str(os.getpid()), False)
    assert run(found["half"]) == ("\ud800 \u00e9", False)


def test_what_tools_print_stands_among_the_errors_and_they_read_nothing(path, capfd):
    with sources.opened([str(path)]) as opened:
        known = {one.name: one for one in opened}
        assert run(known["count"]) == ("TODAY 1", False)
        assert run(known["ask"]) == ("EOFError: EOF when reading a line", True)
    printed = capfd.readouterr()
    assert "a tool prints" in printed.err and printed.out == ""  # which may be a protocol's


@pytest.mark.parametrize("name", ["spin", "match"])
def test_a_call_that_hangs_is_ended_with_its_process_and_the_next_call_has_another(found, name):
    run(found["count"])
    process = int(run(found["pid"])[0])
    child = int(run(found["start"])[0])
    result, failed = run(found[name], 0.1)
    assert failed and "took more than" in result and "was ended" in result
    assert until(lambda: not runs(process) and not runs(child))
    assert run(found["count"]) == ("TODAY 1", False)  # the file was loaded again


def test_other_calls_of_a_process_end_before_it_does(found, tmp_path):
    process, results = int(run(found["pid"])[0]), list[tuple[str, bool]]()
    other = threading.Thread(target=lambda: results.append(run(found["wait"], path=str(tmp_path / "there"))))
    other.start()
    file = found["wait"].within.func.__self__
    assert until(lambda: file._process.users == 1)
    assert run(found["spin"], 0.1)[1]
    assert runs(process) and int(run(found["pid"])[0]) != process
    (tmp_path / "there").touch()
    other.join(60)
    assert results == [("there", False)] and until(lambda: not runs(process))


def test_a_process_that_ends_is_a_result_and_begun_again(found):
    assert run(found["leave"]) == ("the process of the tools ended with status 3", True)
    assert run(found["count"]) == ("TODAY 1", False)


def test_the_end_of_the_tools_ends_a_call_that_hangs(path):
    results = list[tuple[str, bool]]()
    with sources.opened([str(path)]) as opened:
        known = {one.name: one for one in opened}
        process = int(run(known["pid"])[0])
        hanging = threading.Thread(target=lambda: results.append(run(known["spin"])), daemon=True)
        hanging.start()
        assert until(lambda: known["spin"].within.func.__self__._process.users == 1)
    hanging.join(60)
    assert results == [(f"the process of the tools ended with status {-signal.SIGKILL}", True)] and not runs(process)


def test_a_budget_of_time_holds_over_a_call_that_hangs(found):
    session = react.Session("go", Budget(seconds=0.3))
    session.begin_turn()
    step = session.act(Call("spin", {}), list(found.values()))
    assert step.failed and step.verdict == "allowed" and session.begin_turn() == "seconds"


def test_a_file_that_cannot_be_loaded_says_why(tmp_path, monkeypatch):
    for text, message in (("\nimport nothing_here", "line 2 cannot be run"), ("x = 1", "has no tools"), ("import os; os._exit(4)", "status 4")):  # fmt: skip
        (tmp_path / "a.py").write_text(text)
        with pytest.raises(UserError, match=message), sources.opened([str(tmp_path / "a.py")]):
            pass
    monkeypatch.setattr(processes, "LOAD_SECONDS", 0.2)
    (tmp_path / "a.py").write_text("while True:\n    pass\n")
    with pytest.raises(UserError, match="to load"), sources.opened([str(tmp_path / "a.py")]):
        pass


def test_the_process_ends_with_a_program_that_was_killed(path):
    code = (
        "import sys; from llmjax.agents.processes import File; from pathlib import Path\n"
        "tools = {one.name: one for one in File(Path(sys.argv[1])).tools()}\n"
        "print(tools['pid'].within({}, 60)[0], flush=True); tools['spin'].within({}, 60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        process = int(program.stdout.readline())
        program.kill()
    assert until(lambda: not runs(process))
