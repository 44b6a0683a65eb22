"""Distil the embedded teacher and draw the picture: ``python scripts/demo.py --config configs/demo.yaml``."""

import sys

from stepdistill.cli import main

if __name__ == "__main__":
    main(["demo", *sys.argv[1:]])
