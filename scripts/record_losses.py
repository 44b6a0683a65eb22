"""Record what a refactoring must not change: losses, weights and exports of every configuration in a folder.

    python scripts/record_losses.py path/to/configs path/to/output
    python scripts/record_losses.py --compare path/to/one path/to/another

Run the first line before and after a change, the second to compare. Each configuration is ``<name>/config.yaml``.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import torch

from stepdistill.config import read_config
from stepdistill.training.config import resolve
from stepdistill.training.run import Run


def record(configs: Path, output: Path) -> None:
    torch.set_num_threads(1)
    recorded = {}
    for folder in sorted(configs.iterdir()):
        run = output / folder.name
        shutil.rmtree(run, ignore_errors=True)
        Run(resolve(read_config(folder / "config.yaml", [f"train.output_dir={run}"]))).train()
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        files = sorted([*run.glob("pipeline/**/*.safetensors"), *run.glob("checkpoint-*/*.safetensors")])
        hashes = {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        recorded[folder.name] = {"losses": [row | {"time": 0} for row in rows], "files": hashes}
    (output / "record.json").write_text(json.dumps(recorded, indent=1))


def compare(one: Path, other: Path) -> None:
    """Values are compared, not their names in the log."""
    before, after = (json.loads((folder / "record.json").read_text()) for folder in (one, other))
    for name, old in before.items():
        new = after[name]
        values = [[sorted(map(str, row.values())) for row in record["losses"]] for record in (old, new)]
        print(name, "equal" if values[0] == values[1] and old["files"] == new["files"] else "DIFFERS")


if __name__ == "__main__":
    if sys.argv[1] == "--compare":
        compare(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        record(Path(sys.argv[1]), Path(sys.argv[2]))
