"""Measure a pipeline: ``python scripts/evaluate.py --pipeline runs/x/pipeline --metrics fd kd --output fd.json``."""

import sys

from stepdistill.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
