"""Train a student: ``accelerate launch scripts/train.py --config configs/x.yaml [section.key=value ...]``."""

import sys

from stepdistill.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
