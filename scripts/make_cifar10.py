"""A tar of images in folders by class -> one ``.npz`` of images and labels, for ``make gpu``.

    python scripts/make_cifar10.py --tar path/to/cifar10.tar.xz --split train --output data/cifar10.npz

The names of the folders above the files are the classes; ``--split`` is a part of the path that all taken files have.
"""

import argparse
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from stepdistill.cli.failures import failures_as_sentences


@failures_as_sentences("make_cifar10.py")
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tar", type=Path, required=True)
    parser.add_argument("--split", default="train")
    parser.add_argument("--output", type=Path, default=Path("data/cifar10.npz"))
    args = parser.parse_args()
    images, classes = [], []
    if args.tar.is_file() and not tarfile.is_tarfile(args.tar):
        raise ValueError(f"--tar: expected a tar, got another file, {args.tar}")
    with tarfile.open(args.tar) as archive:
        for member in archive:
            if member.isfile() and args.split in Path(member.name).parts:
                images.append(np.asarray(Image.open(archive.extractfile(member)).convert("RGB")))
                classes.append(Path(member.name).parent.name)
    if not images:
        raise ValueError(f"--split: expected a part of the paths in {args.tar}, got {args.split!r}")
    names, labels = np.unique(classes, return_inverse=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    np.savez(args.output, images=np.stack(images), labels=labels)
    print(f"{args.output}: {len(images)} images of {len(names)} classes")


if __name__ == "__main__":
    main()
