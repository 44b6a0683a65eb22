"""Check and measure this machine's GPU: ``python scripts/gpu_report.py --parts checks steps reference cifar``.

Sized to ten minutes on one card of H100's class, not yet measured: checks 1, steps 2, reference 1, cifar 6 (it needs
data/cifar10.npz: see scripts/make_cifar10.py). Each part can run alone and writes its JSON as it goes. --tiny: all of
it small, for a CPU.
"""

import argparse
import sys
from pathlib import Path

import stepdistill

# where the package is not installed, its pipelines are found where they lie
stepdistill.__path__.append(str(Path(__file__).parents[1]))

from stepdistill.benchmark.gpu_report import PARTS, Report  # noqa: E402
from stepdistill.cli.failures import failures_as_sentences  # noqa: E402


@failures_as_sentences("gpu_report.py")
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tiny", action="store_true", help="miniatures and few steps, for a CPU")
    parser.add_argument("--data", type=Path, default=Path("data/cifar10.npz"), help=".npz with images and labels")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/gpu"))
    args = parser.parse_args()
    report = Report(folder=args.output_dir, data=args.data, tiny=args.tiny)
    report.check(args.parts)
    passed = [report.run(part) for part in args.parts]
    print(report.write())
    if not all(passed):
        sys.exit("a check failed")


if __name__ == "__main__":
    main()
