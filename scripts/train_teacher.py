"""Train a pixel teacher: ``accelerate launch scripts/train_teacher.py --config configs/teacher_fashion.yaml``."""

import argparse

from stepdistill.config import build, read_config
from stepdistill.pretrain import PretrainConfig, train_teacher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file, see configs/teacher_fashion.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace values of the file")
    args = parser.parse_args()
    print(train_teacher(build(PretrainConfig, read_config(args.config, args.overrides))))


if __name__ == "__main__":
    main()
