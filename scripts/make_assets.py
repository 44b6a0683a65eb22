"""Make the Fashion-MNIST files that ship with the package: teacher, training subset, reference statistics.

python scripts/make_assets.py --train data/fashion_train.npz --teacher runs/teacher_fashion \
    --output_dir stepdistill/assets/fashion

Needs the feature network in <output_dir>/features (scripts/train_features.py).
"""

import argparse
import functools
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DModel

from stepdistill.cli.failures import failures_as_sentences
from stepdistill.evaluation.metrics.frechet import Moments
from stepdistill.evaluation.reference import ReferenceStatistics
from stepdistill.features.loading import load_features
from stepdistill.files.ranges import PositiveInt, in_range
from stepdistill.pretraining.classifier import read_labelled_images
from stepdistill.pretraining.pixel import halved_pipeline


def first_of_each_class(labels: torch.Tensor, count: int) -> torch.Tensor:
    """Indices, in order, of the first ``count`` images of every class."""
    picked = [(labels == label).nonzero().flatten()[:count] for label in labels.unique()]
    return torch.cat(picked).sort().values


@failures_as_sentences("make_assets.py")
@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help=".npz with images and labels")
    parser.add_argument("--teacher", type=Path, required=True, help="what scripts/train_teacher.py wrote")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--per_class", type=in_range(PositiveInt), default=1000, help="images in train_subset.npz")
    args = parser.parse_args()
    images, labels = read_labelled_images(args.train)
    index = first_of_each_class(labels, args.per_class)
    subset = images[index].movedim(1, -1).squeeze(-1).numpy()
    np.savez_compressed(
        args.output_dir / "train_subset.npz", images=subset, labels=labels[index].numpy().astype(np.uint8)
    )
    unet = UNet2DModel.from_pretrained(args.teacher / "unet", use_safetensors=True)
    scheduler = DDIMScheduler.from_pretrained(args.teacher / "scheduler")
    pipeline = halved_pipeline(unet, scheduler.config)
    pipeline.save_pretrained(args.output_dir / "teacher")  # without its code, which the package has

    features = load_features(str(args.output_dir / "features"))
    moments = functools.reduce(Moments.merge, (Moments.of(features(batch)) for batch in images.split(1000)))
    ReferenceStatistics.of(moments, features).write(args.output_dir / "reference.npz")
    print(f"{args.output_dir}: {len(index)} images, statistics of {moments.n} under {features.sha256[:12]}")


if __name__ == "__main__":
    main()
