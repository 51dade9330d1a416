"""Train on any cloud with SkyPilot: write its file and start a managed job.

    python launch/sky.py --name llama --accelerators H100:8 --nodes 2 --bucket my-runs \\
        -- run --config configs/models/llama.py:llama3-8b --workdir /mnt/runs/llama

SkyPilot finds the machines and copies this folder to them. When machines are preempted it finds others, and the training
goes on from its last checkpoint in the bucket, which all nodes see as /mnt/runs. A TPU slice is one accelerator:
tpu-v5p-8:1. Reservations are named in SkyPilot's own settings: specific_reservations in ~/.sky/config.yaml.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import jobs
from jobs import scalar

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
    recover_on_exit_codes: [{stopped}]  # told to stop, and saved: no error
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
    """The environment variables of a process, as SkyPilot's shell expands them."""
    if accelerators.startswith("tpu-"):
        return {"LLMJAX_CLUSTER": "tpu", **jobs.STOPPED}
    if nodes == 1:
        return jobs.STOPPED
    return {
        "LLMJAX_COORDINATOR": f'"$(head -n 1 <<< "$SKYPILOT_NODE_IPS"):{jobs.PORT}"',
        "LLMJAX_PROCESSES": '"$SKYPILOT_NUM_NODES"',
        "LLMJAX_PROCESS": '"$SKYPILOT_NODE_RANK"',
        **jobs.STOPPED,
    }


def task(args: argparse.Namespace, command: Sequence[str]) -> str:
    """The file as YAML."""
    env = settings(args.accelerators, args.nodes)
    words = jobs.line([".venv/bin/python", "-m", "llmjax", *command])
    return FILE.format(
        name=scalar(args.name),
        nodes=args.nodes,
        root=scalar(str(args.root)),
        accelerators=scalar(args.accelerators),
        spot=scalar(args.spot),
        restarts=args.restarts,
        stopped=next(iter(jobs.STOPPED.values())),
        mount=MOUNT,
        bucket=scalar(args.bucket),
        extra="tpu" if args.accelerators.startswith("tpu-") else "gpu",
        run=" ".join([*(f"{name}={value}" for name, value in env.items()), words]),
    )


def main(argv: Sequence[str]) -> int:
    """Write the file and start the job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="llmjax", help="name of the job")
    parser.add_argument("--accelerators", required=True, help="accelerators of each node, such as H100:8")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--bucket", required=True, help=f"bucket that all nodes see as {MOUNT}")
    parser.add_argument("--spot", action="store_true", help="use cheaper machines that may be preempted")
    parser.add_argument(
        "--restarts", type=int, default=10, help="how often the training may start again after an error"
    )
    parser.add_argument("--root", type=Path, default=jobs.ROOT, help="the folder to copy to the nodes")
    parser.add_argument("--out", type=Path, help="write the file here (default: runs/.launch/NAME/task.yaml)")
    parser.add_argument("--yes", action="store_true", help="do not ask before something that costs money")
    args, command = jobs.parse(parser, argv)
    if not jobs.workdir(command).startswith(f"{MOUNT}/"):
        raise jobs.Mistake(f"--workdir must be below {MOUNT}, the bucket that all nodes see")
    path = args.out or jobs.ROOT / "runs" / ".launch" / args.name / "task.yaml"
    start = ["sky", "jobs", "launch", "--yes", f"--name={args.name}", str(path)]
    if args.dry_run:
        print(f"{task(args, command)}# {jobs.line(start)}")
        return 0
    jobs.approve(f"{args.nodes} x {args.accelerators}", yes=args.yes)
    jobs.write(task(args, command), path)
    jobs.call(start)
    return 0


if __name__ == "__main__":
    sys.exit(jobs.each(main, sys.argv[1:]))
