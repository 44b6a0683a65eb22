"""Encode a data set once: ``python scripts/cache.py --config configs/sd_lcm_lora.yaml cache.output_dir=data/cache``.

Then train with ``data.name=cache data.path=data/cache``. The sections teacher and data tell what is encoded, and by
which teacher; others belong to the training. Run the same command again to resume.
"""

import argparse

from tqdm.auto import tqdm

from stepdistill.cli.failures import failures_as_sentences
from stepdistill.config import read_config
from stepdistill.data.base import DataConfig, locate_data
from stepdistill.data.datasets import open_data
from stepdistill.data.latent_cache import CacheConfig, make_cache
from stepdistill.families.config import TeacherConfig
from stepdistill.families.loading import load_teacher
from stepdistill.files.schema import build
from stepdistill.networks.launcher import own_device


@failures_as_sentences("cache.py")
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file with the sections teacher and data, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override values of the file")
    args = parser.parse_args()
    sections = read_config(args.config, args.overrides)
    teacher = build(TeacherConfig, sections.get("teacher"), "teacher")
    data = locate_data(build(DataConfig, sections.get("data"), "data"))
    config = build(CacheConfig, sections.get("cache"), "cache")
    family = load_teacher(teacher)
    channels, *size = family.image_shape
    dataset = open_data(
        data, channels=channels, size=tuple(size), num_classes=family.num_classes, takes_text=family.takes_text
    )
    family.to(own_device())
    with tqdm(total=len(dataset) + 1, desc="cache") as bar:
        print(make_cache(family, dataset, data, config, lambda done: bar.update(done - bar.n)))


if __name__ == "__main__":
    main()
