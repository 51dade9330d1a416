"""A training on GPU nodes under Slurm: writes a batch script and hands it to sbatch.

    python launch/slurm.py --nodes 4 --gpus 8 --time 24:00:00 -- run --config configs/models/gpt3.py:6.7b --workdir /shared/runs/gpt3

One process a GPU, as JAX expects under Slurm. Some minutes before the time limit (--before) the job gets SIGTERM, saves,
and is queued again until the training is done; it is queued again too when it is preempted or a node fails, and starts
again from the last checkpoint when a process is lost. The output of process N is in WORKDIR/processes/N.log. --workdir
and this folder must be on a disk that all nodes see.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common

SCRIPT = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={tasks}
#SBATCH --gpus-per-node={gpus}
#SBATCH --cpus-per-task={cpus}
#SBATCH --time={time}
#SBATCH --output={folder}/batch.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@{before}
{more}
set -uo pipefail
cd {root}
mkdir -p {folder}

# The time limit is near: all processes save and end, and the job is queued again.
stopped=
stop() {{ stopped=1; scancel --signal=TERM "$SLURM_JOB_ID"; }}
trap stop USR1

for attempt in $(seq 0 {restarts}); do
  echo "start $attempt, restart ${{SLURM_RESTART_COUNT:-0}} of the job, on $SLURM_JOB_NODELIST"
  srun --kill-on-bad-exit=1 --open-mode=append --output={folder}/%t.log \\
    {command} &
  step=$!
  wait "$step"; status=$?
  while kill -0 "$step" 2> /dev/null; do wait "$step"; status=$?; done  # a signal ends a wait early
  if [ -n "$stopped" ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
  fi
  [ "$status" -eq 0 ] && exit 0
  [ "$status" -eq 2 ] && break  # a mistake to mend
  echo "ended with status $status; starting again from the last checkpoint"
  sleep 10
done
exit "$status"
"""


def script(args: argparse.Namespace, command: Sequence[str]) -> str:
    """The batch script."""
    more = [("account", args.account), ("partition", args.partition), ("constraint", args.constraint)]
    return SCRIPT.format(
        name=args.name,
        nodes=args.nodes,
        tasks=args.gpus,
        gpus=args.gpus,
        cpus=args.cpus,
        time=args.time,
        before=args.before,
        restarts=args.restarts,
        more="".join(f"#SBATCH --{key}={value}\n" for key, value in more if value),
        root=shlex.quote(str(args.root)),
        folder=shlex.quote(f"{common.workdir(command)}/processes"),
        command=common.line([".venv/bin/python", "-m", "llmjax", *command]),
    )


def main(argv: Sequence[str]) -> int:
    """Write the script and submit it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="llmjax", help="of the job")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus", type=int, default=8, help="of each node, a process each")
    parser.add_argument("--cpus", type=int, default=8, help="cores of each process")
    parser.add_argument("--time", default="24:00:00", help="limit of one turn; the job goes on in the next")
    parser.add_argument("--before", type=int, default=600, help="seconds before the limit at which it saves")
    parser.add_argument("--restarts", type=int, default=10, help="starts after the first in a turn, when one is lost")
    parser.add_argument("--account", default="")
    parser.add_argument("--partition", default="")
    parser.add_argument("--constraint", default="")
    parser.add_argument(
        "--root", type=Path, default=common.ROOT, help="this repository, with .venv, as the nodes see it"
    )
    parser.add_argument("--out", type=Path, help="where the script goes (default: WORKDIR/job.sh)")
    parser.add_argument("--yes", action="store_true", help="do not ask before it is submitted")
    args, command = common.parse(parser, argv)
    text, path = script(args, command), args.out or Path(common.workdir(command)) / "job.sh"
    if args.dry_run:
        print(f"# {path}\n{text}\n# {common.line(['sbatch', str(path)])}")
        return 0
    common.approve(f"{args.nodes} nodes with {args.gpus} GPUs each, for as long as it takes", yes=args.yes)
    (Path(common.workdir(command)) / "processes").mkdir(parents=True, exist_ok=True)
    common.write(text, path, executable=True)
    common.call(["sbatch", str(path)])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
