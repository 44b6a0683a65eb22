"""The command ``stepdistill push``, and the flags by which ``export`` uploads, too."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stepdistill.export.pipeline import ExportConfig


def flags_of_hub(command: argparse.ArgumentParser, *, required: bool) -> None:
    """Add the flags that say where to upload."""
    command.add_argument("--push_to_hub", metavar="USER/NAME", required=required, help="repository to upload to")
    command.add_argument("--private", action="store_true", help="make a new repository private")


def flags_of_push(command: argparse.ArgumentParser) -> None:
    """Add the flags of ``stepdistill push``."""
    command.add_argument("--pipeline", required=True, type=Path, help="folder of an exported pipeline")
    flags_of_hub(command, required=True)


def check_flags_of_hub(args: argparse.Namespace, config: ExportConfig) -> None:
    """Raise ``ValueError`` if an export as ``config`` says could not be uploaded where the flags say."""
    from stepdistill.export.sharing import check_upload

    dataclasses.replace(config, push_to_hub=args.push_to_hub, private=args.private)  # which checks them
    if args.push_to_hub is not None:
        check_upload(args.push_to_hub, private=args.private)


def push_if_asked(args: argparse.Namespace, folder: Path) -> None:
    """Upload an export if the flags say where to; print its address."""
    from stepdistill.export.sharing import upload
    from stepdistill.networks.sharding import is_main

    if args.push_to_hub is not None and is_main():
        print(upload(folder, args.push_to_hub, private=args.private))


def push(args: argparse.Namespace) -> None:
    """Run ``stepdistill push``."""
    from stepdistill.export.sharing import check_name

    check_name(args.push_to_hub)
    push_if_asked(args, args.pipeline)
