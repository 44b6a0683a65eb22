"""Train the small classifier whose features measure images: data/fashion_train.npz -> config.json + model.safetensors.

python scripts/train_features.py --train data/fashion_train.npz --test data/fashion_test.npz \
    --output_dir stepdistill/assets/fashion/features
"""

import argparse
from pathlib import Path

import torch

from stepdistill.cli.failures import failures_as_sentences
from stepdistill.features.classifier import SmallConvNet
from stepdistill.files.ranges import PositiveFloat, PositiveInt, Seed, in_range
from stepdistill.pretraining.classifier import accuracy, check_sets, read_labelled_images, train_classifier


@failures_as_sentences("train_features.py")
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help=".npz with images and labels")
    parser.add_argument("--test", type=Path, required=True, help=".npz with images and labels, never trained on")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--width", type=in_range(PositiveInt), default=24, help="channels of the first convolution")
    parser.add_argument("--epochs", type=in_range(PositiveInt), default=6)
    parser.add_argument("--batch_size", type=in_range(PositiveInt), default=256)
    parser.add_argument("--lr", type=in_range(PositiveFloat), default=5e-3, help="peak of the one-cycle learning rate")
    parser.add_argument("--seed", type=in_range(Seed), default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    images, labels = read_labelled_images(args.train)
    test = read_labelled_images(args.test)
    check_sets((images, labels), test, args.batch_size)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    network = SmallConvNet(images.shape[1], int(labels.max()) + 1, args.width)
    recipe = {"epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr, "seed": args.seed}
    train_classifier(network, images, labels, **recipe)

    network.save_pretrained(args.output_dir)
    network = SmallConvNet.from_pretrained(args.output_dir)  # measured as shipped, in half precision
    facts = {"test_accuracy": accuracy(network, *test), "test": args.test.name}
    network.save_pretrained(args.output_dir, **facts, train=args.train.name, **recipe)
    print(f"{args.output_dir}: test accuracy {facts['test_accuracy']:.4f}, sha256 {network.sha256[:12]}")


if __name__ == "__main__":
    main()
