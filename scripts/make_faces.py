"""Pixel-art faces -> ``train.npz``, ``held_out.npz`` (images, captions, for any ``data:`` section), ``prompts.txt``.

python scripts/make_faces.py --faces data/avatars/pixel-art --output_dir stepdistill/assets/faces

The faces are ``<name>_16.npz`` (``images`` uint8 (N, 16, 16, 3)) and ``<name>.jsonl`` (their attributes); their origin
is in stepdistill/assets/faces/LICENSE. The held-out file has 180 faces of combinations of hair and shirt colour that
training leaves out, and 1,500 others.
"""

import argparse
from pathlib import Path

import numpy as np

from stepdistill.assets import FACES
from stepdistill.cli.failures import failures_as_sentences
from stepdistill.features.vocabulary import Vocabulary
from stepdistill.pretraining.faces import caption, is_held_out, read_faces, values_of, visible

CAPTIONS = 8  # of a training image; held-out images have three
SEEN, UNSEEN = 1500, 180  # held-out faces, in about the proportion that they have in all faces
PROMPTS = 5000


@failures_as_sentences("make_faces.py")
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", required=True, help="path of both files without _16.npz and .jsonl")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    images, drawn = np.load(f"{args.faces}_16.npz")["images"], read_faces(Path(f"{args.faces}.jsonl"))
    faces = visible(drawn, images)
    vocabulary, rng = Vocabulary.read(FACES / "reader/attributes.yaml"), np.random.default_rng(0)
    codes = np.array([vocabulary.encode(values_of(face)) for face in faces], dtype=np.uint8)
    left_out = np.array([is_held_out(face) for face in drawn])
    order = rng.permutation(np.flatnonzero(~left_out))  # any first n are a fair sample
    paired = left_out & np.array([face["hair_colour"] != "hidden" for face in faces])
    unseen = rng.permutation(np.flatnonzero(paired))[:UNSEEN]

    def save(name: str, rows: np.ndarray, captions: np.ndarray) -> None:
        file = args.output_dir / f"{name}.npz"
        np.savez_compressed(file, images=images[rows], captions=captions, attributes=codes[rows])
        print(f"{file}: {len(rows)} images, {file.stat().st_size / 1e6:.2f} MB")

    args.output_dir.mkdir(parents=True, exist_ok=True)
    train = order[SEEN:]
    save("train", train, np.array([[caption(faces[i], rng) for _ in range(CAPTIONS)] for i in train]))
    held_out, pair = rng.permutation(np.concatenate([order[:SEEN], unseen])), ("hair_colour", "shirt")
    asked = {i: pair if left_out[i] else () for i in held_out}
    captions = np.array([[caption(faces[i], rng, asked[i]) for _ in range(3)] for i in held_out])
    save("held_out", held_out, captions)
    lines = captions.T.flatten()[:PROMPTS]
    (args.output_dir / "prompts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
