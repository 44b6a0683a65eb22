"""Two sets of emoji -> ``train.npz`` and ``held_out.npz``: images on white with captions, for any ``data:`` section.

A set is ``<name>_32.npz`` (``rgba`` uint8 (N, 32, 32, 4), not premultiplied) and ``<name>.jsonl`` (name, group, tone).
For their origin see stepdistill/assets/emoji/LICENSE.
"""

import argparse
import json
import zlib
from pathlib import Path

import numpy as np

from stepdistill.cli.failures import failures_as_sentences

STYLES = {"fluent3d": "3d", "twemoji": "flat"}  # a set's name, and the word that its captions begin with
LEFT_OUT = ("People & Body", "Flags")  # hundreds of figures and flags that differ in a few of 32 x 32 pixels
HELD_OUT = 20  # one in this many names is held out, in one of its two styles


def read_style(folder: Path, name: str) -> dict[str, np.ndarray]:
    """Every emoji of a set by its name, as RGB on white."""
    rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    rgba = np.load(folder / f"{name}_32.npz")["rgba"].astype(np.float32)
    alpha = rgba[..., 3:] / 255
    images = np.round(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    kept = (i for i, row in enumerate(rows) if not row["tone"] and row["group"] not in LEFT_OUT)
    return {rows[i]["name"]: images[i] for i in kept}


def is_held_out(name: str, style: str) -> bool:
    """Whether a pair is held out, by the checksum of its name; the same name in the other style is not."""
    number = zlib.crc32(name.encode())
    return number % HELD_OUT == 0 and style == list(STYLES)[number // HELD_OUT % 2]


@failures_as_sentences("make_emoji.py")
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--emoji_dir", type=Path, required=True, help="folder that holds both sets")
    parser.add_argument("--output_dir", type=Path, required=True, help="where train.npz and held_out.npz go")
    args = parser.parse_args()
    sets = {style: read_style(args.emoji_dir, style) for style in STYLES}
    both = set.intersection(*(set(images) for images in sets.values()))
    pairs = [(style, name) for style, images in sets.items() for name in images]
    held_out = {(style, name) for style, name in pairs if name in both and is_held_out(name, style)}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for split, wanted in [("train", lambda pair: pair not in held_out), ("held_out", lambda pair: pair in held_out)]:
        chosen = [pair for pair in pairs if wanted(pair)]
        chosen = [chosen[i] for i in np.random.default_rng(0).permutation(len(chosen))]  # any first n are a fair sample
        images = np.stack([sets[style][name] for style, name in chosen])
        captions = np.array([f"{STYLES[style]} {name}" for style, name in chosen])
        np.savez_compressed(args.output_dir / f"{split}.npz", images=images, captions=captions)
        print(f"{args.output_dir / split}.npz: {len(images)} images {images.shape[1:]}")


if __name__ == "__main__":
    main()
