"""Train the network that reads the attributes of faces: data of make_faces.py -> config.json + model.safetensors.

python scripts/train_reader.py --data stepdistill/assets/faces --output_dir stepdistill/assets/faces/reader
"""

import argparse
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator

from stepdistill.cli.failures import failures_as_sentences
from stepdistill.features.attributes import WORDS, AttributeReader
from stepdistill.features.vocabulary import Vocabulary
from stepdistill.files.ranges import PositiveFloat, PositiveInt, Seed, in_range
from stepdistill.pretraining.faces import with_other_shirts
from stepdistill.pretraining.fit import FitConfig
from stepdistill.pretraining.reader import accuracies, lowest, read_attributes, train_reader


@failures_as_sentences("train_reader.py")
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.npz and held_out.npz")
    parser.add_argument("--output_dir", type=Path, required=True, help=f"holds {WORDS}")
    parser.add_argument("--steps", type=in_range(PositiveInt), default=2500)
    parser.add_argument("--batch_size", type=in_range(PositiveInt), default=128)
    parser.add_argument("--lr", type=in_range(PositiveFloat), default=3e-3)
    parser.add_argument("--seed", type=in_range(Seed), default=7, help="must differ from every seed in a teacher")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    network = AttributeReader(Vocabulary.read(args.output_dir / WORDS))
    recipe = {"steps": args.steps, "batch_size": args.batch_size, "lr": args.lr, "seed": args.seed}
    faces = with_other_shirts(*read_attributes(args.data / "train.npz"), args.seed)
    config = FitConfig(model={}, ema=0.995, **recipe)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "reader.jsonl"
        network = train_reader(network, *faces, config, Accelerator(), log)

    network.save_pretrained(args.output_dir)
    network = AttributeReader.from_pretrained(args.output_dir)  # measured as shipped, in half precision
    found = accuracies(network, *read_attributes(args.data / "held_out.npz"))
    network.save_pretrained(args.output_dir, held_out_accuracy=found, **recipe)
    print(f"{args.output_dir}: held out: {lowest(found)}; sha256 {network.sha256[:12]}")


if __name__ == "__main__":
    main()
