"""HumanEval's own solutions pass, broken ones do not, and hostile programs are contained.

    python benchmarks/humaneval.py --data ../shared/data/eval [--out results/humaneval.json]

Runs every canonical solution, an empty body, and each canonical solution with its last line gone, then programs that
try to leave the sandbox or to use up the machine. No model is needed. Takes a minute on 2 cores; Linux only.
"""

import os
import socket
import tempfile
import time
from pathlib import Path

from common import make_parser, write

from llmjax.eval import code, sandbox
from llmjax.eval.sandbox import Limits

LIMITS = Limits(cpu_seconds=2, wall_seconds=10.0, memory=1 << 29, disk=4 << 20)


def hostile(folder: Path, port: int) -> dict[str, str]:
    """Name -> program. Forks are bounded, in case a fence is missing."""
    outside = str(folder / "outside")
    return {
        "fork bomb (64 forks)": "import os, time\nn = 0\nfor _ in range(64):\n    if not os.fork(): time.sleep(20); os._exit(0)\n",
        "memory hog (2 GiB)": "x = bytearray(2 << 30)\nprint(len(x))",
        "write outside": f"open({outside!r}, 'w').write('x')",
        "read outside": f"print(open({str(folder / 'secret')!r}).read())",
        "fill the disk": "for i in range(200): open(f'f{i}', 'wb').write(b'x' * 1_000_000)",
        "network, TCP": f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)",
        "network, UDP": f"import socket; socket.socket(2, 2).sendto(b'x', ('127.0.0.1', {port}))",
        "endless loop": "while True: pass",
        "endless sleep": "import time; time.sleep(1000)",
        "kill the parent": f"import os\nos.kill({os.getpid()}, 9)",
        "kill everybody": "import os\nos.kill(-1, 9)\nraise SystemExit(1)",
        "output flood": "while True: print('x' * 100_000)",
        "early exit as a pass": "import os; os._exit(0)",
        "orphan in a new session": "import os, time\nif not os.fork(): os.setsid(); time.sleep(30)\nraise SystemExit(1)",
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder with humaneval.jsonl")
    parser.add_argument("--limit", type=int, default=0, help="problems at most")
    args = parser.parse_args()
    print(sandbox.describe())
    problems = code.find("humaneval", [args.data])
    problems = problems[: args.limit] if args.limit else problems
    solutions = {
        "canonical": [p.solution for p in problems],
        "empty body": ["    pass\n" for _ in problems],
        "last line gone": ["\n".join(p.solution.rstrip().split("\n")[:-1]) + "\n    pass\n" for p in problems],
    }
    results: dict[str, object] = {"fences": list(sandbox.fences()), "problems": len(problems)}
    for name, texts in solutions.items():
        began = time.perf_counter()
        right = sum(row[0] for row in code.check(problems, [[text] for text in texts]))
        results[name] = {"passed": right, "seconds": round(time.perf_counter() - began, 1)}
        print(f"{name}: {right} of {len(problems)} pass, {results[name]['seconds']} s")  # type: ignore[index]
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        (Path(folder) / "secret").write_text("a secret")
        rows = []
        for name, program in hostile(Path(folder), server.getsockname()[1]).items():
            outcome = sandbox.run(program, limits=LIMITS)
            said = (outcome.output.strip().splitlines() or [""])[-1][:60]
            contained = (
                not outcome.passed and not (Path(folder) / "outside").exists() and "a secret" not in outcome.output
            )
            rows.append(
                {
                    "program": name,
                    "contained": contained,
                    "status": outcome.status,
                    "said": said,
                    "seconds": round(outcome.seconds, 2),
                }
            )
            print(
                f"{name:<26} {'contained' if contained else 'NOT CONTAINED':<14} {outcome.status:<8} {outcome.seconds:5.2f} s  {said}"
            )
        results["hostile"] = rows
    write(results, args.out)


if __name__ == "__main__":
    main()
