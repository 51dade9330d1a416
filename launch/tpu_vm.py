"""Train on Cloud TPU VMs: request them, copy the code, start all hosts, and start again after a preemption.

    python launch/tpu_vm.py --name llama --type v5p-64 --zone us-east5-a --project P --spot \\
        --disk 10.0.0.2:/runs -- run --config configs/models/llama.py:llama3-8b --workdir /mnt/runs/llama

gcloud must be signed in. The checked-out commit is copied to the hosts (git archive) and installed from the lock file with
the tpu extra. Then the command starts on all hosts. All hosts see --disk as /mnt/runs: a network disk (Filestore,
HOST:/PATH) or a bucket (gs://BUCKET, mounted with gcsfuse; it needs a hierarchical namespace, because checkpoints rename
folders at once). --config and --workdir must be paths on the hosts.

The launcher stays in the foreground and shows the output of the first host. It requests preempted machines again, and
starts a training that failed again from its last checkpoint, together at most --restarts times. At the end it deletes the
machines, unless --keep is given. If the launcher itself is stopped, they stay, and the same call goes on.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import jobs
from jobs import line

RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
MOUNT = "/mnt/runs"
POLL_SECONDS = 30
GONE = ("SUSPENDED", "SUSPENDING", "FAILED", "DELETING")  # states of a request without machines
SILENT = 20  # polls in a row without an answer, after which the request counts as gone
# In the home folder of a host: llmjax/ (the code), llmjax.log, llmjax.pid (the session of the command), llmjax.status (its
# exit status, after the end).
STATUS = 'cat llmjax.status 2>/dev/null || (kill -0 "$(cat llmjax.pid)" 2>/dev/null && echo running || echo lost)'
# End an earlier start and wait until it is gone: the TPU is in use until then. libtpu's lock file may outlive it.
END = """\
if pid=$(cat llmjax.pid 2>/dev/null); then
  kill -KILL -- "-$pid" 2>/dev/null
  for i in $(seq 60); do kill -0 -- "-$pid" 2>/dev/null || break; sleep 1; done
  kill -0 -- "-$pid" 2>/dev/null || rm -f llmjax.pid
fi
lock=/tmp/libtpu_lockfile
[ ! -e "$lock" ] || fuser -s "$lock" || sudo rm -f "$lock"
"""


def flags(args: argparse.Namespace) -> list[str]:
    """The flags for the place of the machines, for every gcloud command."""
    return [f"--zone={args.zone}", f"--project={args.project}"]


def nodes(args: argparse.Namespace) -> list[str]:
    """The names of the slices."""
    return [args.name] if args.slices == 1 else [f"{args.name}-{i}" for i in range(args.slices)]


def create(args: argparse.Namespace) -> list[str]:
    """The command that requests the machines."""
    which = [f"--node-id={args.name}"]
    if args.slices > 1:
        which = [f"--node-prefix={args.name}", f"--node-count={args.slices}"]
    runtime = args.runtime or RUNTIMES[args.type.partition("-")[0]]
    more = ["--spot"] if args.spot else []
    more += ["--reserved"] if args.reserved else []
    more += [f"--reservation={args.reservation}"] if args.reservation else []
    release = ["alpha"] if args.reservation else []  # the option is not in the released command
    return [
        "gcloud", *release, "compute", "tpus", "queued-resources", "create", args.name, *which,
        f"--accelerator-type={args.type}", f"--runtime-version={runtime}", *more, *flags(args),
    ]  # fmt: skip


def delete(args: argparse.Namespace) -> list[str]:
    """The command that deletes the machines."""
    return ["gcloud", "compute", "tpus", "queued-resources", "delete", args.name, "--force", "--quiet", *flags(args)]


def describe(args: argparse.Namespace) -> list[str]:
    """The command that prints the state of the request."""
    return [
        "gcloud", "compute", "tpus", "queued-resources", "describe", args.name, "--format=value(state.state)",
        *flags(args),
    ]  # fmt: skip


def ssh(args: argparse.Namespace, node: str, script: str, *, worker: str = "all") -> list[str]:
    """The command that runs a script on the hosts of a slice."""
    return [
        "gcloud", "compute", "tpus", "tpu-vm", "ssh", node, f"--worker={worker}", f"--command={script}", *flags(args)
    ]  # fmt: skip


def install_script(disk: str) -> str:
    """The script that installs the code on a bare host."""
    if disk.startswith("gs://"):
        bucket = disk.removeprefix("gs://").rstrip("/")
        mount = f"gcsfuse --implicit-dirs {bucket} {MOUNT}"
    else:
        mount = f"sudo apt-get install -y -qq nfs-common && sudo mount {disk} {MOUNT}"
    return "\n".join(
        [
            "set -euo pipefail",
            f"sudo mkdir -p {MOUNT} && sudo chown $USER {MOUNT}",
            f"mountpoint -q {MOUNT} || ({mount})",
            "rm -rf llmjax && mkdir llmjax && tar -xzf llmjax.tar.gz -C llmjax && cd llmjax",
            "python3.11 -m venv .venv || (sudo apt-get install -y -qq python3.11-venv && python3.11 -m venv .venv)",
            ".venv/bin/pip install --quiet -r requirements.lock",
            ".venv/bin/pip install --quiet -c requirements.lock -e '.[tpu]'",
        ]
    )


def start_script(command: Sequence[str]) -> str:
    """The script that starts the command on a host and leaves it running. JAX finds the other hosts."""
    words = line([".venv/bin/python", "-m", "llmjax", *command], env={"LLMJAX_CLUSTER": "tpu", **jobs.STOPPED})
    body = f"echo $$ > ~/llmjax.pid; cd ~/llmjax; {words} >> ~/llmjax.log 2>&1; echo $? > ~/llmjax.status"
    return f"rm -f llmjax.status; {line(['setsid', 'nohup', 'bash', '-c', body])} > /dev/null 2>&1 < /dev/null &"


def archive(args: argparse.Namespace) -> tuple[list[str], Path]:
    """The command that packs the commit, and the path of the archive."""
    path = jobs.ROOT / "runs" / ".launch" / args.name / "llmjax.tar.gz"
    return ["git", "-C", str(jobs.ROOT), "archive", "--format=tar.gz", f"--output={path}", args.commit], path


def prepare(args: argparse.Namespace, code: Path) -> list[list[str]]:
    """The commands that bring the code to every host and install it."""
    commands = []
    for node in nodes(args):
        target = f"{node}:llmjax.tar.gz"
        commands.append(["gcloud", "compute", "tpus", "tpu-vm", "scp", str(code), target, "--worker=all", *flags(args)])
        commands.append(ssh(args, node, install_script(args.disk)))
    return commands


def begin(args: argparse.Namespace, command: Sequence[str]) -> list[list[str]]:
    """The commands that end processes of an earlier start, and start the training on every host."""
    end = [ssh(args, node, END) for node in nodes(args)]
    return [*end, *(ssh(args, node, start_script(command)) for node in nodes(args))]


def state(args: argparse.Namespace) -> str:
    """The state of the request; "" without a request or an answer."""
    return jobs.ask(describe(args)).split(";")[0].strip()


def wait_until_active(args: argparse.Namespace) -> None:
    """Request the machines, unless there is a request, and wait for them without a limit."""
    now = state(args)
    if now in GONE:
        jobs.call(delete(args))
        now = ""
    if not now:
        jobs.call(create(args))
    while (now := state(args)) != "ACTIVE":
        if now in GONE:
            raise jobs.Mistake(f"the request {args.name} is {now}: look at it with {line(describe(args))}")
        print(f"launch: the machines are {now or 'not known'} yet", file=sys.stderr, flush=True)
        time.sleep(args.poll)


def watch(args: argparse.Namespace) -> str:
    """Wait for the end of the training: its exit status, "lost" (it is not running), or "preempted"."""
    first, silent = nodes(args)[0], 0
    log = subprocess.Popen(ssh(args, first, "tail -n +1 -F llmjax.log", worker="0"), stdin=subprocess.DEVNULL)
    try:
        while True:
            time.sleep(args.poll)
            found = state(args)
            silent = 0 if found else silent + 1
            if found in GONE or silent > SILENT:
                return "preempted"
            now = jobs.ask(ssh(args, first, STATUS, worker="0"))
            if now not in ("running", ""):  # "": the host did not answer
                return "preempted" if state(args) in GONE else now
    finally:
        log.terminate()


def show(args: argparse.Namespace, command: Sequence[str]) -> None:
    """Print what would run, in order."""
    pack, code = archive(args)
    print(f"# pack the code\n{line(pack)}\n# request the machines\n{line(create(args))}")
    print(f"# until it says ACTIVE, every {args.poll} s\n{line(describe(args))}")
    print("# copy and install")
    print("\n".join(map(line, prepare(args, code))))
    print("# start on all hosts")
    print("\n".join(map(line, begin(args, command))))
    print("# show the output; look at the machines and the training")
    print(line(ssh(args, nodes(args)[0], "tail -n +1 -F llmjax.log", worker="0")))
    print(line(ssh(args, nodes(args)[0], STATUS, worker="0")))
    print(f"# preempted: delete, and again from the request on; another error: start again; {args.restarts} times")
    if not args.keep:
        print(f"# at the end\n{line(delete(args))}")


def main(argv: Sequence[str]) -> int:
    """Run the training to its end: its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the request and of the machines")
    parser.add_argument("--type", required=True, help="accelerator type, such as v5p-64 or v5litepod-256")
    parser.add_argument("--slices", type=int, default=1, help="number of slices, joined by the data-centre network")
    parser.add_argument("--zone", required=True)
    parser.add_argument("--project", required=True)
    parser.add_argument("--disk", required=True, help=f"HOST:/PATH or gs://BUCKET, which all hosts see as {MOUNT}")
    parser.add_argument("--runtime", default="", help="software of the machines (default: by type)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--spot", action="store_true", help="use cheaper machines that may be preempted")
    which.add_argument("--reserved", action="store_true", help="take the machines from any reservation of the project")
    which.add_argument("--reservation", default="", metavar="NAME", help="take the machines of this reservation")
    parser.add_argument("--commit", default="HEAD", help="the commit to copy to the hosts")
    parser.add_argument("--restarts", type=int, default=100)
    parser.add_argument("--poll", type=float, default=POLL_SECONDS, help="seconds between polls")
    parser.add_argument("--keep", action="store_true", help="keep the machines at the end")
    parser.add_argument("--yes", action="store_true", help="do not ask before something that costs money")
    args, command = jobs.parse(parser, argv)
    if not jobs.workdir(command).startswith(f"{MOUNT}/"):
        raise jobs.Mistake(f"--workdir must be below {MOUNT}, the disk that all hosts see")
    if not args.runtime and args.type.partition("-")[0] not in RUNTIMES:
        raise jobs.Mistake(f"the runtime of {args.type} is not known: give --runtime; known are {', '.join(RUNTIMES)}")
    if args.dry_run:
        show(args, command)
        return 0
    jobs.approve(f"{args.slices} x {args.type} in {args.zone}, until the training ends", yes=args.yes)
    pack, code = archive(args)
    code.parent.mkdir(parents=True, exist_ok=True)
    jobs.call(pack)
    status, fresh = "preempted", True
    for attempt in range(args.restarts + 1):
        if status == "preempted":
            wait_until_active(args)
            fresh = True
        try:
            for words in [*(prepare(args, code) if fresh else []), *begin(args, command)]:
                jobs.call(words)
        except subprocess.CalledProcessError as error:  # hosts may vanish at any time
            status = "preempted" if state(args) in GONE else f"{line(error.cmd[:6])} failed"
        else:
            fresh, status = False, watch(args)
        if status in ("0", "2"):
            break
        print(f"launch: {status}; starting again ({attempt + 1} of {args.restarts})", file=sys.stderr, flush=True)
    if not args.keep:
        jobs.call(delete(args))
    return int(status) if status.isdigit() else 1


if __name__ == "__main__":
    sys.exit(jobs.each(main, sys.argv[1:]))
