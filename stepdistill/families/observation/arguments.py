"""The arguments of a network's call, as named leaves that can be exchanged."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path, tree_unflatten


@dataclasses.dataclass(frozen=True)
class Arguments:
    """All arguments of one call by name, those in dictionaries and tuples by their path (``"kwargs.text_embeds"``)."""

    leaves: Mapping[str, Any]
    structure: Any

    @classmethod
    def of(cls, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments:
        """Return the arguments of ``function(*args, **kwargs)``; tensors are copied, lists are one leaf."""
        named = dict(zip(inspect.signature(function).parameters, args, strict=False)) | dict(kwargs)
        found, structure = tree_flatten_with_path(named, is_leaf=lambda node: type(node) is list)
        leaves = {}
        for path, leaf in found:
            name = ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
            leaves[name] = leaf.detach().clone() if torch.is_tensor(leaf) else leaf
        return cls(leaves, structure)

    def with_leaves(self, changed: Mapping[str, Any]) -> dict[str, Any]:
        """Return keyword arguments of the function, with other leaves."""
        return tree_unflatten([changed.get(name, leaf) for name, leaf in self.leaves.items()], self.structure)

    def part(self, start: int, rows: int) -> Arguments:
        """Return the arguments of ``rows`` samples of a call of twice as many; what has no row a sample stays."""
        double = [name for name, leaf in self.leaves.items() if count_of(leaf) == 2 * rows]
        cut = {name: self.leaves[name][start : start + rows] for name in double}
        return Arguments({**self.leaves, **cut}, self.structure)

    def tensors(self) -> dict[str, Tensor]:
        """Return every leaf that is numbers: tensors, and lists of tensors of one shape, stacked."""
        found = {}
        for name, leaf in self.leaves.items():
            tensor = stacked(leaf)
            if tensor is not None:
                found[name] = tensor
        return found


def count_of(leaf: Any) -> int:
    """Return the number of a leaf's rows; 0 of what has none."""
    if torch.is_tensor(leaf):
        return len(leaf) if leaf.ndim else 0
    return len(leaf) if type(leaf) is list else 0


def stacked(leaf: Any) -> Tensor | None:
    """Return a tensor, a list of tensors of one shape as (B, ...), a number as (); None of anything else."""
    if torch.is_tensor(leaf):
        return leaf
    if type(leaf) in (int, float):
        return torch.tensor(leaf)
    if type(leaf) is list and leaf and all(torch.is_tensor(row) and row.shape == leaf[0].shape for row in leaf):
        return torch.stack(leaf)
    return None


def as_leaf(tensor: Tensor, like: Any) -> Any:
    """Return a tensor (B, ...) in the form of a leaf: itself, or as a list of its rows."""
    return list(tensor.unbind()) if type(like) is list else tensor


def repeated(leaf: Any, rows: int) -> list[Any]:
    """Return a list with one equal entry a sample for another number of samples."""
    return [leaf[0]] * rows


def is_one_number(leaf: Any) -> bool:
    """Return whether a leaf is a tensor of one number throughout, but not of zeros: a time, also one a token."""
    return torch.is_tensor(leaf) and leaf.numel() > 0 and bool((leaf == leaf.flatten()[0]).all() and leaf.any())


def in_precision(leaf: Any, dtype: torch.dtype) -> Any:
    """Return a leaf in a network's precision: every floating tensor of two or more axes."""
    if type(leaf) is list:
        return [in_precision(row, dtype) for row in leaf]
    if torch.is_tensor(leaf) and leaf.is_floating_point() and leaf.ndim > 1:
        return leaf.to(dtype)
    return leaf


def first_output(output: Any) -> Tensor:
    """Return what a network predicts: its output, or the first of several; a list of samples as one tensor."""
    found = output if torch.is_tensor(output) else output[0]
    tensor = stacked(found)
    assert tensor is not None, "a network's first output is a tensor, or one a sample"
    return tensor
