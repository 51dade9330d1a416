"""Train on GPU nodes under Slurm: write a batch script and hand it to sbatch.

    python launch/slurm.py --nodes 4 --gpus 8 --time 24:00:00 -- run --config configs/models/gpt3.py:6.7b --workdir /shared/runs/gpt3

One process runs on each GPU. Some minutes before the time limit (--before), and when Slurm preempts the job, the
processes get SIGTERM and save, and the job is queued again until the training is done. A job whose node fails is queued
again too. A lost process makes the job start again from the last checkpoint. The output of process N is in
WORKDIR/processes/N.log. --workdir and this folder must be on a disk that all nodes see.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import jobs

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
folder={folder}
mkdir -p "$folder"
export {stopped_status}

# The time limit is near: all processes save and end, and the job is queued again.
trap 'touch "$folder/stopped"; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
# Slurm may send the signal of a preemption to this shell too, which has to stay, to have the job queued again.
trap : TERM
# A process that was told to stop, and has saved, leaves a mark. It ends with 0, or srun would kill the others.
process='"$@"; status=$?; if [ "$status" -eq {stopped} ]; then touch "$0"; status=0; fi; exit "$status"'

for attempt in $(seq 0 {restarts}); do
  echo "start $attempt, restart ${{SLURM_RESTART_COUNT:-0}} of the job, on $SLURM_JOB_NODELIST"
  rm -f "$folder/stopped"
  srun --kill-on-bad-exit=1 --open-mode=append --output="$folder/%t.log" \\
    bash -c "$process" "$folder/stopped" {command} &
  step=$!
  wait "$step"; status=$?
  while kill -0 "$step" 2> /dev/null; do wait "$step"; status=$?; done  # a signal ends a wait early
  if [ -e "$folder/stopped" ]; then  # a job that is cancelled is no longer RUNNING, and stays cancelled
    [ "$(squeue --noheader --format=%T --jobs="$SLURM_JOB_ID")" = RUNNING ] && scontrol requeue "$SLURM_JOB_ID"
    exit 0
  fi
  [ "$status" -eq 0 ] && exit 0
  [ "$status" -eq 2 ] && break  # the user's mistake
  echo "ended with status $status; starting again from the last checkpoint"
  sleep 10
done
exit "$status"
"""


def script(args: argparse.Namespace, command: Sequence[str]) -> str:
    """The text of the batch script."""
    names = ("account", "partition", "qos", "reservation", "constraint")
    more = [(name, getattr(args, name)) for name in names]
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
        stopped_status=" ".join(f"{name}={value}" for name, value in jobs.STOPPED.items()),
        stopped=next(iter(jobs.STOPPED.values())),
        folder=shlex.quote(f"{jobs.workdir(command)}/processes"),
        command=jobs.line([".venv/bin/python", "-m", "llmjax", *command]),
    )


def main(argv: Sequence[str]) -> int:
    """Write the script and submit it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="llmjax", help="name of the job")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of each node, with a process each")
    parser.add_argument("--cpus", type=int, default=8, help="cores for each process")
    parser.add_argument(
        "--time", default="24:00:00", help="time limit of one run of the job; it is queued again after it"
    )
    parser.add_argument("--before", type=int, default=600, help="seconds before the time limit at which the job saves")
    parser.add_argument(
        "--restarts", type=int, default=10, help="how often a run of the job may start again after an error"
    )
    for name in ("account", "partition", "qos", "reservation", "constraint"):
        parser.add_argument(f"--{name}", default="", help=f"sbatch's --{name}")
    parser.add_argument("--root", type=Path, default=jobs.ROOT, help="this repository, with .venv, as the nodes see it")
    parser.add_argument("--out", type=Path, help="write the script here (default: WORKDIR/job.sh)")
    parser.add_argument("--yes", action="store_true", help="submit without asking")
    args, command = jobs.parse(parser, argv)
    text, path = script(args, command), args.out or Path(jobs.workdir(command)) / "job.sh"
    if args.dry_run:
        print(f"# {path}\n{text}\n# {jobs.line(['sbatch', str(path)])}")
        return 0
    jobs.approve(f"{args.nodes} nodes with {args.gpus} GPUs each, for as long as it takes", yes=args.yes)
    (Path(jobs.workdir(command)) / "processes").mkdir(parents=True, exist_ok=True)
    jobs.write(text, path, executable=True)
    jobs.call(["sbatch", str(path)])
    return 0


if __name__ == "__main__":
    sys.exit(jobs.each(main, sys.argv[1:]))
