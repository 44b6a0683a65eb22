"""What every distillation method is made of: turns and stages.

A *turn* is one optimiser's move, stated once: whose parameters, which loss, on which steps. Most methods have one; a
method with a critic or a fake score has two. A *stage* is a stretch of training with its own learning-rate schedule and
fresh optimisers; progressive distillation has one a halving. The loop over both is
:mod:`stepdistill.training.trainer`; a method is only its algorithm box.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from stepdistill.batch import Batch
from stepdistill.diffusion.samplers import Sampler
from stepdistill.families.base import Family, Inputs
from stepdistill.features.base import FeatureExtractor
from stepdistill.networks.bank import EMA, STUDENT, NetworkBank
from stepdistill.networks.denoiser import Denoiser
from stepdistill.randomness import Draws


def share_out(steps: int, shares: Mapping[str, tuple[int, float]]) -> list[Stage]:
    """Stages of ``steps`` training steps in all.

    Args:
        steps: what there is to spend.
        shares: by a stage's name, its ``value`` and what part of the steps it gets, in any unit.
    """
    unit = steps / sum(share for _, share in shares.values())
    ends = [round(unit * end) for end in accumulate((share for _, share in shares.values()), initial=0.0)]
    spans = [end - begin for begin, end in pairwise(ends)]
    return [Stage(name, span, value) for (name, (value, _)), span in zip(shares.items(), spans, strict=True)]


class Losses(NamedTuple):
    """What a turn computes on one micro-batch."""

    terms: dict[str, Tensor]
    """Scalars by name; the turn minimises their sum."""
    metrics: Mapping[str, Tensor] = MappingProxyType({})
    """Detached scalars that are only logged."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """One optimiser's move."""

    name: str
    params: Sequence[nn.Parameter]
    loss: Callable[[Batch, Draws], Losses]
    when: Callable[[int], bool] = lambda step: True
    """Whether the turn happens on a step (counted from 0)."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stretch of training with fresh optimisers and its own learning-rate schedule."""

    name: str
    steps: int
    """How many training steps it lasts."""
    value: Any = None
    """What the method wants to know about it, for example the student's number of sampling steps."""


class Distiller(nn.Module, abc.ABC):
    """A distillation method: an abstract base, one final class a file.

    A subclass declares a nested frozen ``Config`` dataclass with a field ``steps`` (what the finished student takes)
    and ``turn_names``; it adds its roles and states its turns in :meth:`build`.

    Args:
        family: the opened teacher's family.
        bank: the networks; this adds ``student`` and, where wanted, ``ema``.
        config: the method's own options.
        ema: whether an average of the student is kept and is what gets evaluated and exported.
        start: the weights the student starts from, by name; None is the teacher's.
    """

    Config: ClassVar[type]
    turn_names: ClassVar[tuple[str, ...]] = (STUDENT,)
    optim_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({})
    """By turn, what the paper's optimiser has other than :class:`~stepdistill.training.optimizers.OptimConfig`."""
    sampling_options: ClassVar[frozenset[str]] = frozenset()
    """Options that the sampler alone reads: one training serves all their values, on resuming and at export."""
    needs_images: ClassVar[bool] = True
    """Whether the method trains on real images, or on noise and conditions alone."""

    def __init__(
        self, family: Family, bank: NetworkBank, config: Any, *, ema: bool = False,
        start: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.family = family
        self.bank = bank
        self.config = config
        self.schedule = family.schedule
        self.stage = Stage("train", 0)
        self.step_in_stage = 0
        """Training steps of the stage that were made before the present one; the trainer keeps it, also on resuming."""
        self.teacher = Denoiser(family, bank, "teacher")
        bank.fork(STUDENT)
        if start is not None:
            bank.load_or_project(STUDENT, start)
        self.student = Denoiser(family, bank, STUDENT)
        self.turns = {turn.name: turn for turn in self.build()}
        assert tuple(self.turns) == self.turn_names
        if ema:
            bank.fork(EMA, STUDENT, trainable=False)
        self.result_role = EMA if ema else STUDENT
        self.result = Denoiser(self.student.family, bank, self.result_role, w=self.student.w)

    @classmethod
    def check(cls, config: Any, family: Family) -> None:
        """Raise ``ValueError`` if this teacher cannot be distilled so; called before any network is copied."""

    @classmethod
    def extra_inputs(cls, config: Any) -> Inputs:
        """What the networks must take besides state, time and condition; added before any role is forked."""
        del config
        return Inputs()

    @abc.abstractmethod
    def build(self) -> Sequence[Turn]:
        """Add the roles and modules the method needs, and state its turns."""

    @abc.abstractmethod
    def sampler(self) -> Sampler:
        """How the student of the current stage is sampled."""

    def stages(self, steps: int) -> list[Stage]:
        """The stages that ``steps`` training steps are spent on."""
        return [Stage("train", steps)]

    def begin_stage(self) -> None:
        """Move weights between roles at the start of ``self.stage``; not called when a stage is resumed."""

    def after_step(self) -> None:
        """Move weights between roles after every step, for example a target's average."""

    def forward(self, turn: str, batch: Batch, draws: Draws) -> Losses:
        """The loss of a turn: the one entry that is wrapped for distributed training."""
        return self.turns[turn].loss(batch, draws)

    def contract(self) -> dict[str, Any]:
        """What else a caller of the finished student must know: JSON values."""
        return {}

    def feature_networks(self) -> dict[str, FeatureExtractor]:
        """The frozen networks that a critic sees through, by their configuration key: none of them may judge."""
        return {}
