"""Upload an export: ``python scripts/push.py --pipeline runs/x/pipeline --push_to_hub user/name``."""

import sys

from stepdistill.cli import main

if __name__ == "__main__":
    main(["push", *sys.argv[1:]])
