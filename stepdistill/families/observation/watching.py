"""A pipeline's own call, with its network and its scheduler watched.

The watched pipeline shares all weights with the teacher's, which stays as it is: the network is a shallow copy with
another ``forward``, the scheduler a copy with another ``step``.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from stepdistill.families.latent import rebuild
from stepdistill.families.observation.arguments import Arguments, first_output, in_precision, is_one_number
from stepdistill.families.vaes import dtype_of

Answer = Callable[..., Any]
"""In place of a network: called with its arguments."""


class Seen(Exception):
    """Enough was seen of a call; nothing is wrong."""


@dataclasses.dataclass(frozen=True)
class Ask:
    """One call of the network: its arguments, and its first output (B, ...) in float32."""

    arguments: Arguments
    output: Tensor


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of the scheduler: what it was given, what came out, and the network's calls since the step before."""

    asks: list[Ask]
    output: Tensor
    timestep: float
    state: Tensor
    stepped: Tensor
    handed_on: bool
    """Whether the call passed its generators on."""


@dataclasses.dataclass
class Record:
    """What was seen of one call."""

    asked: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    """The prompts or labels of a whole call."""
    steps: list[Step] = dataclasses.field(default_factory=list)
    asks: list[Ask] = dataclasses.field(default_factory=list)
    """The network's calls after the last step."""
    arguments: list[Arguments] = dataclasses.field(default_factory=list)
    """Of all calls of the network."""
    draws: list[Tensor] = dataclasses.field(default_factory=list)
    """Everything that was drawn by ``torch.randn``."""
    scaled: bool = False
    """Whether the scheduler was asked to scale a state."""
    images: Tensor | None = None
    """(B, C, ..., H, W) in [0, 1], of a call that came to its end."""


@dataclasses.dataclass
class Given(BaseOutput):
    """What a scheduler's step returns: the state that it was told."""

    prev_sample: Tensor
    pred_original_sample: Tensor


@dataclasses.dataclass
class Predicted(BaseOutput):
    """What a network returns: a tensor, or a list of one a sample."""

    sample: Any


class Draws(TorchFunctionMode):
    """Keeps what ``torch.randn`` returns inside the context."""

    def __init__(self, kept: list[Tensor]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        if func is torch.randn:
            self.kept.append(result.clone())
        return result


class Watched:
    """A pipeline that is watched.

    Args:
        pipe: the teacher's; nothing of it changes.
        component: name of its network.
        options: arguments of every call besides the conditions.
    """

    def __init__(self, pipe: Any, component: str, options: Mapping[str, Any]) -> None:
        self.network, self.component, self.options = getattr(pipe, component), component, dict(options)
        self.lists = False
        """Whether the network returns a list of samples; known after a call."""
        parts = {component: shadow(self.network), "scheduler": copy.deepcopy(pipe.scheduler)}
        if getattr(pipe, "safety_checker", None) is not None:
            parts["safety_checker"] = None
        self.pipe = rebuild(pipe, kind=on_its_encoders(type(pipe)), **parts)
        self.pipe.set_progress_bar_config(disable=True)
        self.parameters = inspect.signature(type(pipe).__call__).parameters
        # without the decorator that turns gradients off: decoding has some
        self._call = inspect.unwrap(type(pipe).__call__)

    @torch.no_grad()
    def run(self, conditions: Mapping[str, Any], *, steps: int = 3, **options: Any) -> Record:
        """Make a whole call of ``steps`` steps and return all that was seen."""
        with self._watched(self._genuine) as record:
            result = self._ask(conditions, num_inference_steps=steps, output_type="pt", **options)
            record.asked, record.images = conditions, as_images(result[0])
        return record

    @torch.no_grad()
    def first(self, conditions: Mapping[str, Any], **options: Any) -> Record:
        """Make a call up to the network's first, which is not made: what the call asks it, and its scheduler's grid."""
        with self._watched(_stop) as record:
            try:
                self._ask(conditions, output_type="pt", **options)
            except Seen:
                return record
        raise ValueError(f"{type(self.pipe).__name__}: its call never asked its {self.component}")

    @torch.no_grad()
    def rehearse(
        self, conditions: Mapping[str, Any], output: Tensor, calls: int, **options: Any
    ) -> Sequence[Arguments]:
        """Make a call in which the network returns ``output``, up to ``calls`` of its calls; return their arguments."""
        asked: list[Arguments] = []

        def answer(arguments: Arguments) -> Any:
            asked.append(arguments)
            if len(asked) == calls:
                raise Seen
            return Predicted(sample=list(output) if self.lists else output)

        with self._watched(answer), contextlib.suppress(Seen):
            self._ask(conditions, output_type="pt", **options)
        return asked

    def decode(self, latents: Tensor, conditions: Mapping[str, Any], output: Tensor, **options: Any) -> Tensor:
        """Return the images (B, C, ..., H, W) that the call makes of clean latents, by a scheduler that returns them.

        Args:
            latents: as the call's loop holds them.
            conditions: of as many samples; they do not matter.
            output: what the network returns, which does not matter.
            options: further arguments of the call.
        """
        given = Given(prev_sample=latents, pred_original_sample=latents)
        network, scheduler = getattr(self.pipe, self.component), self.pipe.scheduler
        network.forward = lambda *args, **kwargs: Predicted(sample=list(output) if self.lists else output)
        step, scheduler.step = scheduler.step, functools.wraps(scheduler.step)(lambda *args, **kwargs: given)
        try:
            # two steps: a grid of one that is stretched to an end is 0 / 0
            return as_images(self._ask(conditions, num_inference_steps=2, output_type="pt", **options)[0])
        finally:
            scheduler.step = step

    def _ask(self, conditions: Mapping[str, Any], **options: Any) -> Any:
        count = len(next(iter(conditions.values())))
        call = self.options | options | {"generator": [torch.Generator().manual_seed(i) for i in range(count)]}
        accepted = {name: value for name, value in call.items() if name in self.parameters}
        given = {name: list(values) for name, values in conditions.items()}  # some pipelines change them
        return self._call(self.pipe, **given, **accepted, return_dict=False)

    def _genuine(self, arguments: Arguments) -> Any:
        dtype, leaves = dtype_of(self.network), arguments.leaves
        cast = {name: in_precision(leaf, dtype) for name, leaf in leaves.items() if not is_one_number(leaf)}
        output = self.network(**arguments.with_leaves(cast))
        return tree_map(lambda leaf: leaf.float() if torch.is_tensor(leaf) else leaf, output)

    @contextlib.contextmanager
    def _watched(self, answer: Answer) -> Iterator[Record]:
        record, network, scheduler = Record(), getattr(self.pipe, self.component), self.pipe.scheduler
        step, scale = scheduler.step, getattr(scheduler, "scale_model_input", None)

        def forward(*args: Any, **kwargs: Any) -> Any:
            arguments = Arguments.of(self.network.forward, args, kwargs)
            record.arguments.append(arguments)
            output = answer(arguments)
            self.lists = not torch.is_tensor(output) and type(output[0]) is list
            record.asks.append(Ask(arguments, first_output(output).float()))
            return output

        @functools.wraps(step)
        def watched_step(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(step).bind(*args, **kwargs).arguments
            result = step(*args, **kwargs)
            record.steps.append(step_of(record.asks, given, result))
            record.asks = []
            return result

        def watched_scale(*args: Any, **kwargs: Any) -> Any:
            record.scaled = True
            assert scale is not None
            return scale(*args, **kwargs)

        network.forward, scheduler.step = forward, watched_step
        if scale is not None:
            scheduler.scale_model_input = watched_scale
        try:
            with Draws(record.draws):
                yield record
        finally:
            scheduler.step = step
            if scale is not None:
                scheduler.scale_model_input = scale


def _stop(arguments: Arguments) -> Any:
    del arguments
    raise Seen


def step_of(asks: list[Ask], given: Mapping[str, Any], result: Any) -> Step:
    """Return a step's record, by the names of a scheduler's arguments."""
    return Step(
        asks, given["model_output"].float().clone(), float(given["timestep"]), given["sample"].float().clone(),
        result[0].float().clone(), given.get("generator") is not None,
    )  # fmt: skip


def shadow(network: nn.Module) -> Any:
    """Return a network that shares everything with ``network`` but its ``forward`` and its hooks.

    It says that it is in float32, in which a call then keeps its states and times, whatever the weights are in.
    """
    other, kind = copy.copy(network), type(network)
    other.__class__ = type(kind.__name__, (kind,), {"dtype": torch.float32, "__module__": kind.__module__})
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        other.__dict__[name] = {}
    other.__dict__["_compiled_call_impl"] = None
    return other


def on_its_encoders(kind: type) -> type:
    """Return a pipeline class that works where its frozen parts are, not where its network is."""

    def device(self: Any) -> torch.device:
        parts = (part for name, part in self.components.items() if name not in ("transformer", "unet"))
        return next(next(part.parameters()).device for part in parts if isinstance(part, nn.Module))

    return type(kind.__name__, (kind,), {"_execution_device": property(device), "__module__": kind.__module__})


def as_images(result: Any) -> Tensor:
    """Return images (B, C, H, W) or clips (B, C, F, H, W) of what a call returns, in [0, 1]."""
    if not torch.is_tensor(result):  # some pipelines only know arrays, whose channels come last
        return torch.from_numpy(np.asarray(result)).movedim(-1, 1)
    return result.movedim(1, 2) if result.ndim == 5 else result
