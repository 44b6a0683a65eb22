"""Compare students, teacher and solvers: ``python scripts/benchmark.py --config configs/benchmark_fashion.yaml``."""

import sys

from stepdistill.cli import main

if __name__ == "__main__":
    main(["benchmark", *sys.argv[1:]])
