"""Fashion-MNIST's four idx files -> two ``.npz`` files that every ``data:`` section can read.

The files come with Debian's package ``dataset-fashion-mnist`` (MIT, (c) 2017 Zalando SE).
"""

import argparse
import gzip
from pathlib import Path

import numpy as np

from stepdistill.cli.failures import failures_as_sentences


def read_idx(path: Path) -> np.ndarray:
    """An idx file of unsigned bytes: magic (00 00 08 ndim), big-endian sizes, data."""
    raw = gzip.decompress(path.read_bytes())
    sizes = np.frombuffer(raw, dtype=">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * raw[3]).reshape(sizes)


@failures_as_sentences("make_fashion.py")
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--idx_dir", type=Path, required=True, help="folder that holds *-images-idx3-ubyte.gz")
    parser.add_argument("--output_dir", type=Path, default=Path("data"), help="where fashion_{train,test}.npz go")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for split, prefix in [("train", "train"), ("test", "t10k")]:
        images = read_idx(args.idx_dir / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(args.idx_dir / f"{prefix}-labels-idx1-ubyte.gz")
        np.savez_compressed(args.output_dir / f"fashion_{split}.npz", images=images, labels=labels)
        print(f"{args.output_dir}/fashion_{split}.npz: {len(images)} images {images.shape[1:]}")


if __name__ == "__main__":
    main()
