"""Measure how many samples a second one process gets out of a cache and out of tars: ``python scripts/data_speed.py``.

It writes about 200 MB into a temporary folder, and nothing else.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from stepdistill.benchmark.data_speed import speed_table
from stepdistill.cli.failures import failures_as_sentences
from stepdistill.files.ranges import PositiveInt, in_range


@failures_as_sentences("data_speed.py")
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=in_range(PositiveInt), default=512, help="samples in a cache")
    parser.add_argument("--samples", type=in_range(PositiveInt), default=2048, help="samples that are read")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print(speed_table(Path(folder), args.count, args.samples))


if __name__ == "__main__":
    main()
