"""Sample a pipeline: ``python scripts/generate.py --pipeline runs/x/pipeline --num_images 64 --output grid.png``."""

import sys

from stepdistill.cli import main

if __name__ == "__main__":
    main(["generate", *sys.argv[1:]])
