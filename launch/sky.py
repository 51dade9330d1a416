"""A training on whatever cloud has machines: writes a SkyPilot file and starts it as a managed job.

    python launch/sky.py --name llama --accelerators H100:8 --nodes 2 --bucket my-runs \\
        -- run --config configs/models/llama.py:llama3-8b --workdir /mnt/runs/llama

SkyPilot finds the machines, ships this folder, and finds others when they are preempted; the training then goes on from
its last checkpoint in the bucket, which all nodes see as /mnt/runs. TPU slices are one accelerator: tpu-v5p-8:1.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common
from common import scalar

MOUNT = "/mnt/runs"
FILE = """\
name: {name}
num_nodes: {nodes}
workdir: {root}
resources:
  accelerators: {accelerators}
  use_spot: {spot}
  job_recovery:
    max_restarts_on_errors: {restarts}
file_mounts:
  {mount}:
    name: {bucket}
    mode: MOUNT
setup: |
  set -e
  python3.11 -m venv .venv
  .venv/bin/pip install --quiet -r requirements.lock
  .venv/bin/pip install --quiet -c requirements.lock -e '.[{extra}]'
run: |
  {run}
"""


def settings(accelerators: str, nodes: int) -> dict[str, str]:
    """The variables that tell a process of the others, in the words of SkyPilot's shell."""
    if accelerators.startswith("tpu-"):
        return {"LLMJAX_CLUSTER": "tpu", **common.STOPPED}
    if nodes == 1:
        return common.STOPPED
    return {
        "LLMJAX_COORDINATOR": f'"$(head -n 1 <<< "$SKYPILOT_NODE_IPS"):{common.PORT}"',
        "LLMJAX_PROCESSES": '"$SKYPILOT_NUM_NODES"',
        "LLMJAX_PROCESS": '"$SKYPILOT_NODE_RANK"',
        **common.STOPPED,
    }


def task(args: argparse.Namespace, command: Sequence[str]) -> str:
    """The file as YAML."""
    env = settings(args.accelerators, args.nodes)
    words = common.line([".venv/bin/python", "-m", "llmjax", *command])
    return FILE.format(
        name=scalar(args.name),
        nodes=args.nodes,
        root=scalar(str(args.root)),
        accelerators=scalar(args.accelerators),
        spot=scalar(args.spot),
        restarts=args.restarts,
        mount=MOUNT,
        bucket=scalar(args.bucket),
        extra="tpu" if args.accelerators.startswith("tpu-") else "gpu",
        run=" ".join([*(f"{name}={value}" for name, value in env.items()), words]),
    )


def main(argv: Sequence[str]) -> int:
    """Write the file and start the job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="llmjax", help="of the job")
    parser.add_argument("--accelerators", required=True, help="of each node, such as H100:8")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--bucket", required=True, help=f"seen by all nodes as {MOUNT}")
    parser.add_argument("--spot", action="store_true", help="cheaper machines that may be taken away")
    parser.add_argument("--restarts", type=int, default=10, help="starts after the first when the training fails")
    parser.add_argument("--root", type=Path, default=common.ROOT, help="the folder to ship")
    parser.add_argument("--out", type=Path, help="where the file goes (default: runs/.launch/NAME/task.yaml)")
    parser.add_argument("--yes", action="store_true", help="do not ask, though it costs money")
    args, command = common.parse(parser, argv)
    if not common.workdir(command).startswith(f"{MOUNT}/"):
        raise common.Mistake(f"--workdir must be below {MOUNT}, the bucket that all nodes see")
    path = args.out or common.ROOT / "runs" / ".launch" / args.name / "task.yaml"
    start = ["sky", "jobs", "launch", "--yes", f"--name={args.name}", str(path)]
    if args.dry_run:
        print(f"{task(args, command)}# {common.line(start)}")
        return 0
    common.approve(f"{args.nodes} x {args.accelerators}", yes=args.yes)
    common.write(task(args, command), path)
    common.call(start)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
