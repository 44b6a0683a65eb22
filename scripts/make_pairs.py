"""Sample a teacher in pairs of noise and image: ``python scripts/make_pairs.py --config configs/pixel_dmd_pairs.yaml``.

Run the same command again to resume: existing pairs are kept.
"""

import argparse

from tqdm.auto import tqdm

from stepdistill.cli.failures import failures_as_sentences
from stepdistill.config import read_config
from stepdistill.data.ode_pairs import PairsConfig, make_pairs
from stepdistill.families.config import TeacherConfig
from stepdistill.families.loading import load_teacher
from stepdistill.files.schema import ConfigError, build
from stepdistill.networks.launcher import own_device


@failures_as_sentences("make_pairs.py")
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file with the sections teacher and pairs")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override values of the file")
    args = parser.parse_args()
    sections = read_config(args.config, args.overrides)
    if unknown := sorted(sections.keys() - {"teacher", "pairs"}):
        raise ConfigError([f"{name}: unknown section; expected teacher and pairs" for name in unknown])
    teacher = build(TeacherConfig, sections.get("teacher"), "teacher")
    config = build(PairsConfig, sections.get("pairs"), "pairs")
    family = load_teacher(teacher)
    device = own_device()
    family.network.to(device).requires_grad_(False).eval()
    family.to(device)
    with tqdm(total=config.count, desc="pairs") as bar:
        print(make_pairs(family, config, lambda done: bar.update(done - bar.n)))


if __name__ == "__main__":
    main()
