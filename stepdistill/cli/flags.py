"""Flags that several commands share, and flags that are refused because nothing would read them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

TRUST_FLAGS = {
    "trust_remote_code": "run Python files of the folder; read them first",
    "trust_pickles": "read weights that exist only as pickles (.bin)",
}
"""Flags that allow code or pickles of the folders that a command opens."""

SAMPLING_FLAGS = (
    "batch_size", "compile", *TRUST_FLAGS, "seed", "captions", "guidance_scale", "num_inference_steps", "rows",
    "precision",
)  # fmt: skip
"""Flags of ``evaluate`` that say how images are made."""


def flags_of_trust(command: argparse.ArgumentParser) -> None:
    """Add the flags of commands that open folders without a configuration."""
    for name, text in TRUST_FLAGS.items():
        command.add_argument(f"--{name}", action="store_true", help=text)


def flag_of_compile(command: argparse.ArgumentParser) -> None:
    """Add the flag of commands that sample one pipeline."""
    command.add_argument(
        "--compile", action="store_true", help="compile the network's repeated blocks; this changes the last digits"
    )


def trust_of(args: argparse.Namespace) -> dict[str, bool]:
    """Return the values of the flags of :func:`flags_of_trust`."""
    return {name: getattr(args, name) for name in TRUST_FLAGS}


def check_flags_of_evaluate(args: argparse.Namespace) -> None:
    """Raise ``ValueError`` if a flag of ``stepdistill evaluate`` says how to make what is already made."""
    if args.teacher is None:
        _refuse(args, ["solver"], "--teacher, which a solver samples", "none")
    if args.images is not None:
        _refuse(args, SAMPLING_FLAGS, "--pipeline or --teacher, which make images", "--images, which are as they are")


def check_flags_of_generate(args: argparse.Namespace) -> None:
    """Raise ``ValueError`` if a flag of ``stepdistill generate`` is about a teacher that is not asked for."""
    if args.compare is None:
        _refuse(args, ["compare_steps", "compare_guidance_scale"], "--compare, which names the teacher", "none")


def _refuse(args: argparse.Namespace, names: Sequence[str], expected: str, got: str) -> None:
    """Raise ``ValueError`` for the first of these flags that is given."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value is not False:
            raise ValueError(f"--{name}: expected {expected}, got {got}")
