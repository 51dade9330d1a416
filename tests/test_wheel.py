"""The package runs without its checkout: a wheel is built, installed alone, and trains a model."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import llmjax
from llmjax import config

ROOT = Path(__file__).parent.parent


def test_a_config_of_the_package_is_found_anywhere_and_one_beside_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.load("configs/models/gpt2.py:tiny").tokenizer.kind == "byte"
    with pytest.raises(ValueError, match="Did you mean gpt2.py"):
        config.load("configs/models/gpt22.py")
    (tmp_path / "configs" / "models").mkdir(parents=True)
    with pytest.raises(ValueError, match="there is no config file configs/models/gpt2.py"):
        config.load("configs/models/gpt2.py:tiny")


@pytest.mark.slow
def test_a_wheel_installs_and_runs_alone(tmp_path):
    """Dependencies are those of this environment, of which the new one sees the packages but not the checkout."""
    source, environment = tmp_path / "source", tmp_path / "venv"
    for name in ("llmjax", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    venv.create(environment)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path), str(source)]
    subprocess.run(wheel, check=True, timeout=300)
    [built] = tmp_path.glob("llmjax-*.whl")
    install = [*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(built)]
    subprocess.run(install, check=True, timeout=300)
    shutil.rmtree(source)
    [packages] = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def command(*words):
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
        done = subprocess.run(
            [environment / "bin" / "llmjax", *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where = subprocess.run(
        [python, "-c", "import llmjax; print(llmjax.__file__)"], capture_output=True, text=True, cwd=tmp_path
    )
    assert Path(where.stdout.strip()).is_relative_to(environment)
    assert command("--version").strip() == f"llmjax {llmjax.__version__}"
    (tmp_path / "text").mkdir()
    for number in range(20):
        (tmp_path / "text" / f"{number}.txt").write_text(
            f"Text number {number}.\n" + "A line of words to be read. " * 20
        )
    command(
        "run", "--config", "configs/models/gpt2.py:tiny", "--workdir", "run", "--config.data.sources=text/",
        "--config.data.holdout_percent=20", "--config.train.duration=2", '--config.prepare.steps=["toxicity","exact"]',
    )  # fmt: skip
    assert (tmp_path / "run" / "report" / "index.html").stat().st_size > 1000
