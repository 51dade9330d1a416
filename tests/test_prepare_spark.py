"""On Spark the preparation keeps the same documents and writes the same bytes as on this machine alone."""

import shutil
import sys

import pytest

pytest.importorskip("pyspark", reason="make test-spark installs it")
pytest.importorskip("numba")
if shutil.which("java") is None:
    pytest.skip("Spark needs Java 17", allow_module_level=True)

sys.path.insert(0, __file__.rpartition("/")[0])
from test_prepare_run import EVERY, corpus, prepared, tree  # noqa: F401

from llmjax.prepare import parts


def test_spark_writes_the_same_bytes(tmp_path, corpus, monkeypatch):  # noqa: F811
    monkeypatch.setitem(parts.cut.__kwdefaults__, "part_bytes", 100_000)
    prepared(tmp_path / "local", [corpus], EVERY, data__shard_bytes=100_000)
    settings = {"prepare__engine": "spark", "prepare__spark_master": "local[2]", "data__shard_bytes": 100_000}
    prepared(tmp_path / "spark", [corpus], EVERY, **settings)
    local, spark = tree(tmp_path / "local"), tree(tmp_path / "spark")
    assert len(local) > 5 and local == spark
