"""The two commands of README and what CI runs: targets, files and markers that they name exist and agree."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.M))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def steps(target: str, **variables: str) -> str:
    """What make would do."""
    command = ["make", "--dry-run", target, f"PYTHON={sys.executable}", *(f"{k}={v}" for k, v in variables.items())]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
    ).stdout


def test_every_target_that_is_named_somewhere_exists():
    phony = set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.M)[1].split())
    assert phony == TARGETS
    told = {"README.md", "CONTRIBUTING.md", ".ci/run", "pyproject.toml", "Makefile"}
    named = {
        name
        for file in told
        for name in re.findall(r"`make ([a-z-]+)|^ *make ([a-z-]+)", (ROOT / file).read_text(), re.M)
    }
    assert {one or other for one, other in named} <= TARGETS


@pytest.mark.parametrize("target", sorted(TARGETS - {"clean", "lock", "same-python"}))
def test_every_target_makes_its_own_environment_from_files_that_exist(target):
    done = steps(target, VENV=".venv-of-nobody")
    assert ".venv-of-nobody/bin/python" in done or ".venv-of-nobody/bin/llmjax" in done
    assert " .venv/" not in done
    for name in re.findall(r"(?:-r|-c) (\S+)|(tests/\S+\.py)", done):
        assert (ROOT / (name[0] or name[1])).is_file(), name


def test_ci_runs_every_test_but_the_exhaustive_ones():
    ci = (ROOT / ".ci" / "run").read_text()
    assert {"test", "test-slow", "test-core"} <= set(re.findall(r"[a-z-]+", " ".join(re.findall(r"make (.*)", ci))))
    markers = {target: re.search(r'-m "([^"]*)"', steps(target))[1] for target in ("test", "test-slow", "test-all")}
    defined = [line.partition(":")[0] for line in PROJECT["tool"]["pytest"]["ini_options"]["markers"]]
    for slow in (False, True):
        for exhaustive in (False, True):
            marks = {"slow": slow, "exhaustive": exhaustive}
            assert set(marks) == set(defined)
            ran = [target for target, expression in markers.items() if eval(expression, {}, marks)]
            expected = "test-all" if exhaustive else "test-slow" if slow else "test"
            assert set(ran) == {expected, "test-all"}, marks


def test_the_tests_in_a_browser_which_are_slow_are_run_where_the_browser_is():
    expression = re.search(r'-m "([^"]*)"', steps("test-browser"))[1]
    assert eval(expression, {}, {"slow": True, "exhaustive": False})


def test_an_environment_of_another_python_is_refused(tmp_path):
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\necho Python 3.99.0\n")
    other.chmod(0o755)
    command = ["make", "same-python", f"PYTHON={other}", f"VENV={sys.prefix}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "not Python 3.99.0: give VENV=" in done.stdout


def test_packages_come_from_where_pip_takes_them(tmp_path):
    """From an index of one's own, and with certificates of one's own; uv's own variables go first."""
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "python").symlink_to(sys.executable)
    (fake / "uv").write_text("#!/bin/sh\nenv\n")
    (fake / "uv").chmod(0o755)
    (tmp_path / "pip.conf").write_text("[global]\nindex-url = https://one.example/simple\ncert = /one.pem\n")
    names = ("PIP_", "UV_", "SSL_", "XDG_")
    plain = {k: v for k, v in os.environ.items() if not k.startswith(names)} | {
        "PIP_CONFIG_FILE": str(tmp_path / "pip.conf")
    }

    def told(**variables: str) -> dict[str, str]:
        done = subprocess.run(
            [ROOT / ".ci" / "uv", tmp_path, "list"], env=plain | variables, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return dict(line.split("=", 1) for line in done.stdout.splitlines() if line.startswith(("UV_", "SSL_")))

    found = told()
    assert found["UV_DEFAULT_INDEX"] == "https://one.example/simple"
    assert found["SSL_CERT_FILE"] == "/one.pem"
    assert found["UV_SYSTEM_CERTS"] == "true"
    assert told(PIP_INDEX_URL="https://two.example/simple")["UV_DEFAULT_INDEX"] == "https://two.example/simple"
    own = told(
        PIP_INDEX_URL="https://two.example/simple", UV_DEFAULT_INDEX="https://three.example/simple", PIP_CERT="/two.pem"
    )
    assert (own["UV_DEFAULT_INDEX"], own["SSL_CERT_FILE"]) == ("https://three.example/simple", "/two.pem")
