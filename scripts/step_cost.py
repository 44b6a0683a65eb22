"""Measure seconds and peak memory of a training step, by memory policy, on networks of real size with random weights.

    python scripts/step_cost.py data.batch_size=4

prints a table of LCM and DMD2 on networks of the sizes of Stable Diffusion 1.5 and XL, as full copies and as adapters
on one network. It needs a GPU and no files: nothing is downloaded or written. Without a GPU, --plan tells what would be
held (weights, gradients, optimisers), --tiny tries the steps with miniatures, and --floor compares the steps of
twelve methods with their network calls, on the embedded teacher.
"""

import argparse
from pathlib import Path

from stepdistill.benchmark.floor import floor_table
from stepdistill.benchmark.step_cost import plan, step_cost_table
from stepdistill.cli.failures import failures_as_sentences
from stepdistill.files.ranges import PositiveInt, in_range

CONFIGS = ("sd_lcm_lora", "sd_dmd2", "sdxl_lcm_lora", "sdxl_dmd2_lora")


@failures_as_sentences("step_cost.py")
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", nargs="+", type=Path, default=[Path(f"configs/{name}.yaml") for name in CONFIGS],
        help="files sd_<method>.yaml or sdxl_<method>.yaml; by default those of LCM and DMD2",
    )  # fmt: skip
    parser.add_argument("--bank", nargs="+", choices=["copy", "adapter"], default=["copy", "adapter"])
    parser.add_argument(
        "--steps", type=in_range(PositiveInt), default=20, help="timed; a multiple of method.student_update_interval"
    )
    parser.add_argument("--tiny", action="store_true", help="miniatures of the networks, for a CPU")
    parser.add_argument("--plan", action="store_true", help="calculate the memory; train nothing")
    parser.add_argument(
        "--floor", action="store_true", help="compare FLOPs and seconds of a step with those of its network calls"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override values of all files")
    args = parser.parse_args()
    if args.floor and (args.plan or args.tiny or args.overrides):
        raise ValueError(
            "--floor: expected no --plan, --tiny or overrides: it has networks and configurations of its own"
        )
    if args.floor:
        print(floor_table())
        return
    if args.plan:
        cases = [(path, [*args.overrides, f"bank.name={bank}"]) for path in args.config for bank in args.bank]
        print("\n\n".join(plan(path, wanted) for path, wanted in cases))
        return
    print(step_cost_table(args.config, args.bank, args.overrides, args.steps, args.tiny))


if __name__ == "__main__":
    main()
