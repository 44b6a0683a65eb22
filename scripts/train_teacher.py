"""Train a teacher: ``accelerate launch scripts/train_teacher.py --config configs/teacher_fashion.yaml``.

``configs/teacher_faces.yaml`` trains a text-to-image teacher.
"""

import argparse

from stepdistill.cli.failures import failures_as_sentences
from stepdistill.config import read_config
from stepdistill.files.schema import build
from stepdistill.pretraining.pixel import PretrainConfig, train_teacher
from stepdistill.pretraining.text_to_image import TextTeacherConfig, train_text_teacher


@failures_as_sentences("train_teacher.py")
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file, see configs/teacher_*.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override values of the file")
    args = parser.parse_args()
    sections = read_config(args.config, args.overrides)
    if "vae" in sections:
        print(train_text_teacher(build(TextTeacherConfig, sections)))
    else:
        print(train_teacher(build(PretrainConfig, sections)))


if __name__ == "__main__":
    main()
