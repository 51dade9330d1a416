"""Programs that nobody has read: pass@k is the unbiased one, and hostile programs stay where they are put."""

import json
import math
import os
import socket
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest

from llmjax.eval import code, sandbox
from llmjax.eval.sandbox import Limits

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="programs run on Linux only")
QUICK = Limits(cpu_seconds=2, wall_seconds=20.0, memory=1 << 29, disk=1 << 20)  # processors are shared while tests run
HUMANEVAL = Path(__file__).parents[2] / "shared" / "data" / "eval" / "humaneval.jsonl"


def test_pass_at_k_is_the_chance_that_a_draw_without_replacement_has_a_right_one():
    assert [round(code.pass_at_k(20, 5, k), 6) for k in (1, 5, 10)] == [0.25, 0.806308, 0.983746]
    rng = np.random.default_rng(0)
    right = np.array([True] * 3 + [False] * 7)
    drawn = np.mean([rng.permutation(right)[:4].any() for _ in range(4000)])
    assert code.pass_at_k(10, 3, 4) == pytest.approx(drawn, abs=0.03)
    assert code.pass_at_k(5, 5, 1) == 1.0 and code.pass_at_k(5, 0, 5) == 0.0
    with pytest.raises(ValueError, match="pass@6"):
        code.pass_at_k(5, 1, 6)


def test_a_program_passes_when_it_reaches_its_end():
    assert sandbox.run("print('text')", limits=QUICK).passed
    assert sandbox.run("print('text')", limits=QUICK).output == "text\n"
    for program in ("assert False", "import sys; sys.exit(0)", "import os; os._exit(0)", "def f(:", "quit()"):
        assert sandbox.run(program, limits=QUICK).status == "failed", program


def needs(*fences: str) -> None:
    missing = [fence for fence in fences if fence not in sandbox.fences()]
    if missing:
        pytest.skip(f"this machine does not permit {', '.join(missing)}")


def test_an_endless_loop_and_an_endless_sleep_end():
    assert sandbox.run("while True: pass", limits=Limits(cpu_seconds=1, wall_seconds=20.0)).status == "failed"
    slept = sandbox.run("import time; time.sleep(60)", limits=Limits(wall_seconds=1.5))
    assert slept.status == "timeout" and slept.seconds < 15


def test_a_memory_hog_gets_an_error():
    outcome = sandbox.run("x = bytearray(2 << 30)", limits=QUICK)
    assert outcome.status == "failed" and "MemoryError" in outcome.output


def test_a_flood_of_output_is_cut():
    outcome = sandbox.run("while True: print('x' * 10_000)", limits=QUICK)
    assert outcome.status == "flood" and len(outcome.output) <= QUICK.output


def test_a_fork_bomb_is_stopped_and_leaves_nothing_running():
    needs("process namespace")
    # Bounded, so that a broken fence shows as a count and not as a machine that stands still.
    bomb = "import os, time\nn = 0\nfor _ in range(48):\n    try:\n        pid = os.fork()\n    except OSError:\n        break\n"
    bomb += "    if not pid:\n        time.sleep(30); os._exit(0)\n    n += 1\nprint('forked', n)"
    outcome = sandbox.run(bomb, limits=QUICK)
    assert int(outcome.output.split()[1]) < QUICK.processes
    assert outcome.seconds < 15  # its children did not hold it
    marker = f"marker{os.getpid()}"
    orphan = f"import os, sys\nif not os.fork():\n    os.setsid(); os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(60)', '{marker}'])\n"
    assert sandbox.run(orphan, limits=QUICK).passed
    assert not [p for p in Path("/proc").glob("[0-9]*/cmdline") if marker.encode() in _read(p)]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended
        return b""


def test_nothing_outside_can_be_written_or_read(tmp_path):
    needs("landlock")
    tmp_path.chmod(0o777)
    secret = tmp_path / "secret"
    secret.write_text("secret")
    secret.chmod(0o666)
    for attack in (f"open({str(secret)!r}, 'w').write('changed')", f"print(open({str(secret)!r}).read())",
                   f"open({str(tmp_path / 'new')!r}, 'w')", f"import os; os.remove({str(secret)!r})",
                   f"import os; os.listdir({str(tmp_path)!r})", f"import os; os.symlink('a', {str(tmp_path / 'link')!r})"):  # fmt: skip
        outcome = sandbox.run(attack, limits=QUICK)
        assert outcome.status == "failed" and "PermissionError" in outcome.output, attack
    assert secret.read_text() == "secret" and [p.name for p in tmp_path.iterdir()] == ["secret"]


def test_the_disk_is_small_and_vanishes():
    needs("tmpfs")
    big = "for i in range(1000):\n    open(f'f{i}', 'wb').write(b'x' * 100_000)"
    outcome = sandbox.run(big, limits=QUICK)
    assert outcome.status == "failed" and "No space left" in outcome.output
    where = sandbox.run("import os; open('kept', 'w').write('x'); print(os.getcwd())", limits=QUICK).output.strip()
    assert where and not Path(where).exists()


def test_the_network_cannot_be_reached():
    needs("network namespace")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        attack = f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=2)"
        assert sandbox.run(attack, limits=QUICK).status == "failed"
        attack = f"import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.sendto(b'x', ('127.0.0.1', {port}))"
        assert sandbox.run(attack, limits=QUICK).status == "failed"
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()


def test_the_parent_and_other_processes_cannot_be_killed():
    needs("process namespace")
    survivor = threading.current_thread()
    for attack in (
        "os.kill(os.getppid(), 9)",
        f"os.kill({os.getpid()}, 9)",
        f"os.killpg({os.getpgrp()}, 9)",
        "os.kill(-1, 9)",
    ):
        sandbox.run(f"import os\n{attack}", limits=QUICK)
    assert survivor.is_alive()
    assert sandbox.run("print(1)", limits=QUICK).passed


def test_the_environment_holds_no_secrets(monkeypatch):
    monkeypatch.setenv("TOKEN_FOR_TESTS", "secret")
    outcome = sandbox.run("import os; print(dict(os.environ)); print(open('/proc/self/environ').read())", limits=QUICK)
    assert "secret" not in outcome.output


def test_many_programs_give_their_own_outcomes():
    outcomes = sandbox.run_all([f"print({i}); assert {i} % 2" for i in range(6)], limits=QUICK)
    assert [o.passed for o in outcomes] == [bool(i % 2) for i in range(6)]


def test_code_runs_only_when_it_was_allowed(tmp_path):
    with pytest.raises(ValueError, match="--allow-code-execution"):
        code.evaluate(None, "humaneval", [tmp_path], allow_code_execution=False)
    with pytest.raises(ValueError, match="all equal"):
        code.evaluate(None, "humaneval", [tmp_path], allow_code_execution=True, samples=2)
    with pytest.raises(ValueError, match=r"humaneval.jsonl"):
        code.evaluate(None, "humaneval", [tmp_path], allow_code_execution=True)


def write(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_both_formats_are_read_and_scored(tmp_path):
    write(tmp_path / "humaneval.jsonl", [
        {"task_id": f"T/{i}", "prompt": "def f(x):\n", "entry_point": "f", "test": f"def check(g):\n    assert g(2) == {2 + i}\n",
         "canonical_solution": f"    return x + {i}\n"} for i in range(3)])  # fmt: skip
    write(tmp_path / "mbpp.jsonl", [
        {"task_id": 7, "text": "Write f.", "code": "def f(): return math.pi", "test_list": ["assert f() > 3"], "test_setup_code": "import math"}])  # fmt: skip
    for task in code.TASKS:
        problems = code.find(task, [tmp_path])
        assert code.check(problems, [[p.solution] for p in problems], limits=QUICK) == [[True]] * len(problems)
        assert code.check(problems, [["    pass"] for _ in problems], limits=QUICK) == [[False]] * len(problems)
    write(tmp_path / "other.jsonl", [{"a": 1}])
    with pytest.raises(ValueError, match="neither"):
        code.load(tmp_path / "other.jsonl")

    class Model:  # says x + 0, then x + 1, ...
        config = types.SimpleNamespace(model=types.SimpleNamespace(max_length=2048))
        tokenizer = types.SimpleNamespace(prefix_ids=(1,), encode=lambda text: [5] * len(text), start_id=1)

        def generate(self, prompts, *, seed, **_):
            assert all(0 <= i < 2**32 for i in seed)
            return [types.SimpleNamespace(text=f"    return x + {i % 4}\n") for i in seed]

    score = code.evaluate(
        Model(), "humaneval", [tmp_path], allow_code_execution=True, samples=4, ks=(1, 2), temperature=0.8, limits=QUICK,
        seed=2**32 - 4,
    )  # fmt: skip
    assert score.metrics["pass@1"].value == pytest.approx(0.25)
    assert score.metrics["pass@2"].value == pytest.approx(1 - math.comb(3, 2) / math.comb(4, 2))
    assert [sum(item["passed"]) for item in score.items] == [1, 1, 1]


@pytest.mark.slow
@pytest.mark.skipif(not HUMANEVAL.is_file(), reason="needs shared/data/eval/humaneval.jsonl")
def test_all_canonical_solutions_of_humaneval_pass_and_no_broken_one_does():
    problems = code.load(HUMANEVAL)
    right = code.check(problems, [[p.solution] for p in problems])
    broken = code.check(problems, [["    pass\n"] for _ in problems])
    assert (sum(r[0] for r in right), sum(r[0] for r in broken), len(problems)) == (164, 0, 164)
