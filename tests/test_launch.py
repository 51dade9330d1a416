"""A dry run prints exactly what would run; what costs money asks first; a local job survives a lost process."""

import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden" / "launch"
TRAIN = ("--", "train", "--config", "configs/models/llama.py:llama3-8b", "--workdir", "/mnt/runs/it's one")

CALLS = {
    "local": ("local.py", "-n", "2", "--devices-per-process", "1", "--port", "1234"),
    "slurm": ("slurm.py", "--nodes", "4", "--gpus", "8", "--account", "a1", "--partition", "gpu",
              "--qos", "high", "--reservation", "r1", "--root", "/shared/code"),
    "gke-tpu": ("gke.py", "--name", "llama", "--image", "pkg.dev/p/llmjax:1", "--tpu", "v5p:4x4x4", "--slices", "2", "--reservation", "r1"),
    "gke-gpu": ("gke.py", "--name", "llama", "--image", "pkg.dev/p/llmjax:1", "--gpus", "8", "--nodes", "4", "--spot"),
    "sky-gpu": ("sky.py", "--accelerators", "H100:8", "--nodes", "2", "--bucket", "b", "--root", "/home/me/code"),
    "sky-tpu": ("sky.py", "--accelerators", "tpu-v5p-8:1", "--bucket", "b", "--spot", "--root", "/home/me/code"),
    "tpu-vm": ("tpu_vm.py", "--name", "llama", "--type", "v5p-64", "--zone", "us-east5-a", "--project", "p", "--disk", "10.0.0.2:/runs"),
    "tpu-vm-slices": ("tpu_vm.py", "--name", "llama", "--type", "v5litepod-256", "--slices", "2", "--zone", "z", "--project", "p",
                      "--disk", "gs://bucket", "--reserved", "--keep"),
    "tpu-vm-reservation": ("tpu_vm.py", "--name", "llama", "--type", "v6e-8", "--zone", "z", "--project", "p", "--disk", "gs://bucket",
                           "--reservation", "r1"),
}  # fmt: skip


def launch(script, *arguments, cwd=ROOT, **environment):
    """Run a launcher to its end; no JAX is imported."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "LLMJAX_"))} | environment
    command = [sys.executable, str(ROOT / "launch" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, check=False, timeout=60)


def dry_run(name):
    script, *arguments = CALLS[name]
    done = launch(script, *arguments, "--dry-run", *TRAIN)
    assert done.returncode == 0, done.stderr
    return done.stdout.replace(sys.executable, "PYTHON").replace(str(ROOT), "CODE")


@pytest.mark.parametrize("name", CALLS)
def test_a_dry_run_prints_the_golden_commands_and_files(name):
    text, path = dry_run(name), GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), "if the change is meant, run UPDATE_GOLDEN=1 pytest tests/test_launch.py"


@pytest.mark.parametrize("name", [name for name in CALLS if not name.startswith(("gke-tpu", "gke-gpu", "sky"))])
def test_what_is_printed_is_sound_shell(name):
    subprocess.run(["bash", "-n"], input=dry_run(name), text=True, check=True)


@pytest.mark.parametrize("name", ["gke-tpu", "gke-gpu", "sky-gpu", "sky-tpu"])
def test_manifests_are_yaml_whose_command_is_the_one_given(name):
    yaml = pytest.importorskip("yaml")
    tree = yaml.safe_load(dry_run(name))
    if name.startswith("sky"):
        subprocess.run(["bash", "-n"], input=tree["setup"] + tree["run"], text=True, check=True)
        words = shlex.split(tree["run"])
        assert tree["num_nodes"] == (2 if name == "sky-gpu" else 1)
    else:
        (job,) = tree["spec"]["replicatedJobs"]
        spec = job["template"]["spec"]
        (container,) = spec["template"]["spec"]["containers"]
        words = container["command"]
        assert (job["replicas"], spec["completions"]) == ((2, 16) if name == "gke-tpu" else (1, 4))
        assert list(container["resources"]["limits"].values()) == [4 if name == "gke-tpu" else 8]
    assert words[-5:] == list(TRAIN[1:])


@pytest.mark.parametrize("name", [name for name in CALLS if name != "local"])
def test_what_costs_money_is_not_done_without_yes(name, tmp_path):
    calls = fake(tmp_path, *("gcloud", "kubectl", "sky", "sbatch"), body="")
    script, *arguments = CALLS[name]
    done = launch(script, *arguments, *TRAIN, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 2
    assert "--yes" in done.stderr
    assert not calls.exists()


def fake(folder, *names, body):
    """Programs that note how they were called, and then do what `body` says; the file of notes."""
    calls = folder / "calls"
    for name in names:
        (folder / name).write_text(f'#!/bin/bash\necho "{name} $*" >> {calls}\n{body}')
        (folder / name).chmod(0o755)
    return calls


def test_preempted_tpus_are_asked_for_again_and_the_training_is_started_again(tmp_path):
    body = f"""
cd {tmp_path}
case "$*" in
  *"queued-resources create"*) echo ACTIVE > state ;;
  *"queued-resources delete"*) rm -f state ;;
  *"queued-resources describe"*) [ -f state ] && cat state ;;
  *setsid*) echo x >> starts ;;
  *"cat llmjax.status"*)  # the first start is preempted, the second loses a process, the third gets to its end
    case "$(wc -l < starts)" in
      1) [ -f seen ] && echo SUSPENDED > state; touch seen; echo running ;;
      2) echo 134 ;;
      *) echo 0 ;;
    esac ;;
esac
exit 0
"""
    calls = fake(tmp_path, "gcloud", body=body)
    fake(tmp_path, "git", body="exit 0")
    script, *arguments = CALLS["tpu-vm"]
    done = launch(script, *arguments, "--yes", "--poll", "0.05", *TRAIN, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    made = [line for line in calls.read_text().splitlines() if "queued-resources" in line or "setsid" in line]
    steps = [next(w for w in ("create", "delete", "describe", "setsid") if w in line) for line in made]
    steps = [step for step in steps if step != "describe"]
    assert steps == ["create", "setsid", "delete", "create", "setsid", "setsid", "delete"]
    assert calls.read_text().count("scp") == 2  # fresh machines get the code, those that are still there have it
    assert "preempted; starting again (1 of" in done.stderr


def test_a_host_of_a_pod_says_whether_its_command_runs_and_ends_all_of_it(tmp_path):
    """The launcher asks by the session of the command: its name would be that of any other one too."""
    vm = runpy.run_path(str(ROOT / "launch" / "tpu_vm.py"))
    (tmp_path / "llmjax" / ".venv" / "bin").mkdir(parents=True)
    python, lock = tmp_path / "llmjax" / ".venv" / "bin" / "python", tmp_path / "lock"
    fake(tmp_path, "fuser", body="exit 1")
    fake(tmp_path, "sudo", body='"$@"')
    env = os.environ | {"HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def on_host(script):
        script = script.replace("/tmp/libtpu_lockfile", str(lock))
        return subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=30
        ).stdout.strip()

    def started(body):
        fake(python.parent, "python", body=f"{body}")
        (tmp_path / "llmjax.pid").unlink(missing_ok=True)
        on_host(vm["start_script"](["train"]))
        deadline = time.monotonic() + 20
        while not (tmp_path / "llmjax.pid").exists() or not (tmp_path / "llmjax.pid").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return int((tmp_path / "llmjax.pid").read_text())

    started("sleep 60")
    assert on_host(vm["STATUS"]) == "running"
    lock.touch()
    on_host(vm["END"])
    assert on_host(vm["STATUS"]) == "lost"
    assert not lock.exists() and not (tmp_path / "llmjax.pid").exists()
    started("exit 3")
    deadline = time.monotonic() + 20
    while (found := on_host(vm["STATUS"])) == "running" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert found == "3"


@pytest.mark.parametrize("state", ["RUNNING", "CANCELLED", "done", "signalled"])
def test_a_slurm_job_that_was_told_to_stop_is_queued_again_unless_it_was_cancelled(state, tmp_path):
    """What Slurm preempts gets SIGTERM, saves and ends with status 75; so does what its user cancels. The shell may get it too."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    fake(tmp_path / ".venv" / "bin", "python", body="exit 0" if state == "done" else 'exit "$LLMJAX_STOPPED_STATUS"')
    calls = fake(tmp_path, "scontrol", body="")
    fake(tmp_path, "squeue", body=f"echo {'RUNNING' if state == 'signalled' else state}")
    signal_shell = "kill -TERM $PPID; sleep 0.2;" if state == "signalled" else ""
    fake(tmp_path, "srun", body=f'{signal_shell}while [[ "$1" == --* ]]; do shift; done; "$@"')
    script = tmp_path / "job.sh"
    command = ("--", "train", "--workdir", tmp_path / "it's one")
    done = launch("slurm.py", "--nodes", 2, "--root", tmp_path, "--out", script, "--yes", *command,
                  PATH=f"{fake(tmp_path, 'sbatch', body='').parent}:{os.environ['PATH']}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    subprocess.run(["bash", script], env=env, check=True, timeout=30)
    assert ("scontrol requeue 7" in calls.read_text()) == (state in ("RUNNING", "signalled"))
    assert calls.read_text().count("srun") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("local.py", "-n", "2"), "the command is missing"),
        (("local.py", "-n", "2", "--", "trian", "--workdir", "x"), "'trian' cannot be launched"),
        (("local.py", "-n", "2", "--", "train", "--config", "x.py"), "needs --workdir"),
        (("local.py", "-n", "0", "--", "train", "--workdir", "x"), "at least one process"),
        ((*CALLS["gke-tpu"], "--", "train", "--workdir", "runs/x"), "--workdir must be below /mnt/runs"),
        ((*CALLS["gke-gpu"], "--grace", "300", *TRAIN), "a pod on a spot node has 15 seconds, or up to 120"),
        (("gke.py", "--name", "a", "--image", "i", "--tpu", "v5p", *TRAIN), "write TYPE:TOPOLOGY such as v5p:4x4x4"),
        (
            ("gke.py", "--name", "a", "--image", "i", "--tpu", "v5p:3x3x3", *TRAIN),
            "27 chips are not a whole number of hosts",
        ),
    ],
)
def test_a_mistake_in_the_call_says_how_to_mend_it(arguments, message):
    done = launch(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- the local launcher, with a stand-in for the command

STAND_IN = """
import os, signal, sys, time
from pathlib import Path
index, folder = int(os.environ["LLMJAX_PROCESS"]), Path(sys.argv[sys.argv.index("--workdir") + 1])
starts = folder / f"starts-{index}"
starts.open("a").write(os.environ["LLMJAX_COORDINATOR"] + "\\n")
first = starts.read_text().count("\\n") == 1
def stop(number, _):
    print("saved", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print(f"process {index} is here", flush=True)
(folder / f"here-{index}").touch()
what = sys.argv[1]
while index == 1 and what != "run" and not all((folder / f"here-{i}").exists() for i in (0, 2)): time.sleep(0.01)
if what == "eval" and index == 1: print("llmjax: set it to 3"); sys.exit(2)
if what == "train" and index == 1 and first: os.kill(os.getpid(), signal.SIGKILL)
if what in ("run", "eval") or (what == "train" and first): time.sleep(60)
"""


@pytest.fixture
def stand_in(tmp_path):
    (tmp_path / "llmjax").mkdir()
    (tmp_path / "llmjax" / "__init__.py").write_text("")
    (tmp_path / "llmjax" / "__main__.py").write_text(STAND_IN)
    (tmp_path / "run").mkdir()
    return tmp_path


def gone(folder):
    """Whether none of the processes that the launcher started is there any more."""
    pids = [int(path.read_text()) for path in (folder / "run" / "processes").glob("*.pid")]
    return len(pids) == 3 and not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_when_one_process_is_killed_the_rest_are_ended_and_the_job_starts_again(stand_in):
    began = time.monotonic()
    done = launch("local.py", "-n", 3, "--restarts", 2, "--", "train", "--workdir", "run", cwd=stand_in)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 30  # nobody waited for the processes that sleep
    assert "process 1 of 3 was ended by SIGKILL" in done.stderr
    assert "starting again from the last checkpoint (1 of 2)" in done.stderr
    assert done.stdout.count("process 0 is here") == 2  # the first writes to the terminal
    assert (stand_in / "run" / "processes" / "2.log").read_text() == "process 2 is here\n" * 2
    assert all((stand_in / "run" / f"starts-{i}").read_text().count("\n") == 2 for i in range(3))
    assert gone(stand_in)


def test_without_restarts_left_the_status_tells_and_nothing_is_left_running(stand_in):
    done = launch("local.py", "-n", 3, "--", "train", "--workdir", "run", cwd=stand_in)
    assert done.returncode == 128 + signal.SIGKILL
    assert "given up after 0 restarts" in done.stderr
    assert gone(stand_in)


def test_a_mistake_is_not_tried_again_and_is_shown_whichever_process_made_it(stand_in):
    done = launch("local.py", "-n", 3, "--restarts", 5, "--", "eval", "--workdir", "run", cwd=stand_in)
    assert done.returncode == 2
    assert "1.log: llmjax: set it to 3" in done.stderr
    assert "not started again" in done.stderr
    assert (stand_in / "run" / "starts-0").read_text().count("\n") == 1
    assert gone(stand_in)


def test_sigterm_is_passed_on_to_all_and_a_job_that_saved_ends_well(stand_in):
    command = [
        sys.executable,
        ROOT / "launch" / "local.py",
        "-n",
        "3",
        "--restarts",
        "5",
        "--",
        "run",
        "--workdir",
        "run",
    ]
    process = subprocess.Popen(command, cwd=stand_in, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    logs = stand_in / "run" / "processes"
    assert process.stdout.readline() == "process 0 is here\n"
    deadline = time.monotonic() + 20
    while not all((logs / f"{i}.log").exists() and "is here" in (logs / f"{i}.log").read_text() for i in (1, 2)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output
    assert output.count("saved") == 1
    assert all((logs / f"{i}.log").read_text().endswith("saved\n") for i in (1, 2))
    assert gone(stand_in)


def test_the_steps_of_the_image_name_what_is_there():
    text = (ROOT / "launch" / "Dockerfile").read_text()
    steps = [line.split(maxsplit=1) for line in text.replace("\\\n", " ").splitlines() if line and line[0] not in "# "]
    copied = [word for step, rest in steps if step == "COPY" for word in rest.split()[:-1]]
    assert {"requirements.lock", "pyproject.toml", "llmjax", "configs"} <= set(copied)
    assert all((ROOT / path).exists() for path in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["readme"] in copied and set(project["license-files"]) <= set(copied)
    named = {extra for line in re.findall(r'extras="?([\w,$]+)', text) for extra in line.split(",")} - {"$ACCELERATOR"}
    assert named | {"tpu", "gpu"} <= project["optional-dependencies"].keys()
    base = re.search(r"^FROM python:(3\.\d+)", text, re.MULTILINE)[1]
    assert f"Programming Language :: Python :: {base}" in project["classifiers"]
    (directory,) = [rest for step, rest in steps if step == "WORKDIR"]
    assert f"workingDir: {directory}\n" in (ROOT / "launch" / "gke.py").read_text()
    if hadolint := shutil.which("hadolint"):
        subprocess.run([hadolint, str(ROOT / "launch" / "Dockerfile")], check=True)


def test_every_verb_that_trains_can_be_launched():
    from llmjax import cli

    launched = runpy.run_path(str(ROOT / "launch" / "jobs.py"))["VERBS"]
    assert {name for name, verb in cli.VERBS.items() if verb.whole} <= set(launched) <= set(cli.VERBS)
