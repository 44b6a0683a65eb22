"""Scikit-learn's handwritten digits -> two ``.npz`` files that every ``data:`` section can read.

1,797 grey images of 8 x 8 (CC BY 4.0, E. Alpaydin and C. Kaynak); one in six is kept from training.
They come with a package: ``pip install scikit-learn``.
"""

import argparse
from pathlib import Path

import numpy as np

from stepdistill.cli.failures import failures_as_sentences


@failures_as_sentences("make_digits.py")
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("data"), help="where digits_{train,test}.npz go")
    args = parser.parse_args()
    try:
        from sklearn.datasets import load_digits  # no dependency of ours
    except ImportError as error:
        raise ValueError("expected the package scikit-learn, got none; run: pip install scikit-learn") from error
    args.output_dir.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    images = np.round(digits.images * 255 / 16).astype(np.uint8)
    held_out = np.arange(len(images)) % 6 == 5
    for split, rows in [("train", ~held_out), ("test", held_out)]:
        np.savez_compressed(args.output_dir / f"digits_{split}.npz", images=images[rows], labels=digits.target[rows])
        print(f"{args.output_dir}/digits_{split}.npz: {rows.sum()} images {images.shape[1:]}")


if __name__ == "__main__":
    main()
