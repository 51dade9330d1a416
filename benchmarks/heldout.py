"""Which modules a run of the standard library holds out, by name and SHA-256, written beside its figures.

The corpus is what the running Python brings, so figures are of one version of it:

    .venv/bin/llmjax prepare --config configs/quickstart.py --workdir runs/heldout
    .venv/bin/python benchmarks/heldout.py runs/heldout --into results/quickstart.json
"""

import argparse
import hashlib
import json
import platform
from pathlib import Path


def heldout(run: Path) -> dict[str, str]:
    """Path in the standard library -> SHA-256 of its text, of the held-out documents of a prepared run."""
    files = sorted((run / "prepare" / "heldout").glob("*.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return {
        row["path"]: hashlib.sha256(row["text"].encode()).hexdigest() for row in sorted(rows, key=lambda r: r["path"])
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder whose prepare stage is done, by this Python")
    parser.add_argument("--into", type=Path, required=True, help="the file of figures that gets the keys")
    args = parser.parse_args()
    figures = json.loads(args.into.read_text())
    figures |= {"prepare/python": platform.python_version(), "prepare/heldout": heldout(args.run)}
    args.into.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
