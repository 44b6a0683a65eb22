"""The attributes that a prompt asks for: from words to values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stepdistill.files.reading import read_yaml

UNASKED = -1
"""Stands for an attribute of which a prompt says nothing."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Attributes, their values, and the words that ask for them.

    Attributes:
        attributes: for each attribute the pattern (of ``re``, whole words, any case) of each value; None for a value
            that no words ask for. The first value whose pattern is found counts.
        unseen: combinations, as values by attribute, that were held out of a training.
    """

    attributes: dict[str, dict[str, str | None]]
    unseen: tuple[dict[str, str], ...] = ()

    def __post_init__(self) -> None:
        for name, values in self.attributes.items():
            for value, pattern in values.items():
                _check_pattern(f"attributes.{name}.{value}", pattern or "")
        for combination in self.unseen:
            for name, value in combination.items():
                if value not in self.attributes.get(name, {}):
                    raise ValueError(f"unseen: expected values of attributes, got {name}: {value}")

    @classmethod
    def read(cls, path: Path) -> Vocabulary:
        """Read a YAML file with the sections ``attributes`` and ``unseen``; raise ``ValueError`` if it is none."""
        vocabulary: Vocabulary = read_yaml(path, cls)
        return vocabulary

    @property
    def sizes(self) -> list[int]:
        """Number of values of each attribute."""
        return [len(values) for values in self.attributes.values()]

    def asked(self, prompts: Sequence[str]) -> Tensor:
        """Return the values that prompts ask for, (N, attributes) int64: indices of values, or :data:`UNASKED`."""
        found = [[self._find(values, prompt) for values in self.attributes.values()] for prompt in prompts]
        return torch.tensor(found, dtype=torch.int64).view(len(prompts), len(self.attributes))

    @staticmethod
    def _find(values: Mapping[str, str | None], prompt: str) -> int:
        for index, pattern in enumerate(values.values()):
            if pattern is not None and re.search(rf"\b(?:{pattern})\b", prompt, re.IGNORECASE):
                return index
        return UNASKED

    def encode(self, values: Mapping[str, str]) -> list[int]:
        """Return the indices (attributes,) of values by attribute."""
        return [list(known).index(values[name]) for name, known in self.attributes.items()]

    def is_unseen(self, asked: Tensor) -> Tensor:
        """Return which of the rows ``asked`` (N, attributes) hold a combination that was held out, (N,) bool."""
        found = torch.zeros(len(asked), dtype=torch.bool)
        for combination in self.unseen:
            found |= self._holds(asked, combination)
        return found

    def _holds(self, asked: Tensor, combination: Mapping[str, str]) -> Tensor:
        held = torch.ones(len(asked), dtype=torch.bool)
        for column, (name, values) in enumerate(self.attributes.items()):
            if name in combination:
                held &= asked[:, column] == list(values).index(combination[name])
        return held


def _check_pattern(where: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{where}: expected a pattern, got {pattern!r} ({error})") from None
