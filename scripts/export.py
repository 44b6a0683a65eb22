"""Export a run's newest checkpoint: ``python scripts/export.py --config runs/x/config.yaml --output folder``."""

import sys

from stepdistill.cli import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
