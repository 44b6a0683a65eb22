"""The base of every distillation method: roles, turns and stages.

A method trains a student against a frozen teacher. It is written in three terms:

- A *role* is a network of the bank: the teacher, the student, a slow copy of the student, a fake score.
- A *turn* is one optimiser's move: whose parameters, which loss, on which steps. Most methods have one turn; a method
  with a critic or a fake score has two.
- A *stage* is a stretch of training with fresh optimisers and its own learning-rate schedule. Progressive distillation
  has one for every halving, most methods have one in all.

The loop over stages and turns is :mod:`stepdistill.training.trainer`. A method is only the algorithm box of its paper.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from stepdistill.batch import Batch, Cond
from stepdistill.diffusion.prediction import Denoise
from stepdistill.diffusion.samplers import Sampler
from stepdistill.discriminators.conditioning import check_classes
from stepdistill.discriminators.critics import Critic
from stepdistill.families.base import Family, Inputs
from stepdistill.features.base import FeatureExtractor
from stepdistill.losses.student_inputs import check_first_step
from stepdistill.networks.bank import EMA, STUDENT, TEACHER, NetworkBank
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.modes import in_mode, shared_dropout
from stepdistill.randomness import Draws

TARGET, HEAD = "target", "head"


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
    head: Sequence[nn.Parameter] = ()
    """Those of its parameters that have an optimiser of their own, ``head``."""

    @property
    def parts(self) -> dict[str, Sequence[nn.Parameter]]:
        """The parameters by the optimiser that steps them: the turn's own, and a head's."""
        apart = set(map(id, self.head))
        parts: dict[str, Sequence[nn.Parameter]] = {self.name: [p for p in self.params if id(p) not in apart]}
        return parts | ({HEAD: self.head} if self.head else {})


def last_of(interval: int, after: int = 0) -> Callable[[int], bool]:
    """Return a turn's ``when``: on the last step of every ``interval``, once ``after`` steps are over.

    >>> [step for step in range(9) if last_of(3, after=2)(step)]
    [4, 7]
    """
    return lambda step: step >= after and (step - after) % interval == interval - 1


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stretch of training with fresh optimisers and its own learning-rate schedule."""

    name: str
    steps: int
    """Training steps of the stage."""
    value: Any = None
    """A parameter of the stage, by default the number of sampling steps of its student."""


def split_steps(steps: int, shares: Mapping[str, tuple[int, float]]) -> list[Stage]:
    """Return stages of ``steps`` training steps in total.

    Args:
        steps: training steps of the whole run.
        shares: by a stage's name, its ``value`` and its share of the steps, in any unit.

    Raises:
        ValueError: if there are too few for one to fall to every stage.
    """
    unit = steps / sum(share for _, share in shares.values())
    ends = [round(unit * end) for end in accumulate((share for _, share in shares.values()), initial=0.0)]
    stages = []
    for (name, (value, _)), (begin, end) in zip(shares.items(), pairwise(ends), strict=True):
        if end == begin:
            raise ValueError(
                f"train.steps: expected training steps for each of the {len(shares)} stages ({', '.join(shares)}), got "
                f"{steps}, which leaves none for {name!r}"
            )
        stages.append(Stage(name, end - begin, value))
    return stages


class Distiller(nn.Module, abc.ABC):
    """A distillation method: an abstract base, and one final class per file.

    A subclass declares a nested frozen ``Config`` dataclass with a field ``steps`` (sampling steps of the finished
    student) and its ``turn_names``. It implements :meth:`build` and :meth:`make_sampler`.

    Args:
        family: the family of the opened teacher.
        bank: the networks; the role ``student`` is added here and, with ``ema``, the role ``ema``.
        config: the method's options.
        ema: whether an average of the student is kept, and is the network that is evaluated and exported.
        start: the weights the student starts from, by name; by default the teacher's.
    """

    Config: ClassVar[type]
    turn_names: ClassVar[tuple[str, ...]] = (STUDENT,)
    optim_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({})
    """By turn, where the paper's optimiser differs from :class:`~stepdistill.training.optimizers.OptimConfig`."""
    heads: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Further optimisers, of heads that train in another's turn: the turn whose settings they take if not given."""
    sampling_options: ClassVar[frozenset[str]] = frozenset()
    """Options that only the sampler reads: they may change on resuming and at export."""
    needs_images: ClassVar[bool] = True
    """Whether the method trains on real images; otherwise it needs only noise and conditions."""

    serves_as_dmd2: ClassVar[bool] = False
    """Whether exports of flow students have DMD2's keys, see :mod:`stepdistill.export.servers`."""

    def __init__(
        self, family: Family, bank: NetworkBank, config: Any, *, ema: bool = False,
        start: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.family = self.student_family(config, family)
        self.converts = self.family is not family
        """Whether the student predicts something else than the teacher, or is told other timesteps."""
        self.bank = bank
        self.config = config
        self.inputs = self.extra_inputs(config)
        self.schedule = family.schedule
        self.stage = Stage("train", 0)
        self.step_in_stage = 0
        """Training steps of the stage before the present one; the trainer keeps it, also on resuming."""
        self.turns: dict[str, Turn] = {}
        self.conditional_critic = False
        """Whether a critic is given the class labels: a first batch of a single class is then refused."""
        self.unused_roles: frozenset[str] = frozenset()
        """Roles whose weights an older version of the method wrote into checkpoints; they are ignored."""
        self.prepared_forwards = 0
        """Teacher forwards that made the method's own data before the run; they are part of its cost."""
        self.versions: dict[str, str] = {}
        """By configuration key, which content a file or folder of the method had, if its path alone does not tell."""
        self._averages: dict[str, Callable[[], float]] = {}
        self._times: dict[Any, Tensor] = {}
        self._sampler: tuple[Any, Sampler] | None = None
        self.teacher = Denoiser(family, bank, TEACHER)
        self.student = self.add_role(STUDENT)
        if start is not None:
            bank.load_or_project(STUDENT, start)
        self.build()
        assert tuple(self.turns) == self.turn_names
        if ema:
            bank.fork(EMA, STUDENT, trainable=False)
        self.result_role = EMA if ema else STUDENT
        self.result = Denoiser(self.family, bank, self.result_role, w=self.student.w)

    # ------------------------------------------------------------------------------- what a method implements

    @abc.abstractmethod
    def build(self) -> None:
        """Add the roles, modules and turns of the method."""

    @classmethod
    @abc.abstractmethod
    def make_sampler(cls, config: Any, family: Family) -> Sampler:
        """Return the sampler of the finished student."""

    @classmethod
    def check(cls, config: Any, family: Family) -> None:
        """Raise ``ValueError`` if this teacher cannot be distilled so; called before any network is copied."""
        family.check_guidance(getattr(config, "guidance_scale", 1.0))
        family.check_head(cls.head_points(config))
        sampler = cls.make_sampler(config, family)
        if not cls.needs_velocity(config, family):
            check_first_step(family, sampler.times[0].item())
        family.check_sampler(sampler)

    @classmethod
    def needs_velocity(cls, config: Any, family: Family) -> bool:
        """Return whether the student of this noise-predicting teacher predicts the velocity, see ``progressive``."""
        del config, family
        return False

    @classmethod
    def student_family(cls, config: Any, family: Family) -> Family:
        """Return the family of the student's network: another than the teacher's where a first stage converts it."""
        return family.with_prediction("v_prediction") if cls.needs_velocity(config, family) else family

    @classmethod
    def extra_inputs(cls, config: Any) -> Inputs:
        """Return the inputs of the student besides state, time and condition; added before any role is forked."""
        del config
        return Inputs()

    @classmethod
    def trains_on_images(cls, config: Any) -> bool:
        """Return whether this training needs real images, which an option may decide."""
        del config
        return cls.needs_images

    @classmethod
    def head_points(cls, config: Any) -> int:
        """Return how many predictions a call of the student gives; the head is widened before any role is forked."""
        del config
        return 1

    def stages(self, steps: int) -> list[Stage]:
        """Return the stages of a run of ``steps`` training steps."""
        return [Stage("train", steps)]

    def begin_stage(self) -> None:
        """Move weights between roles at the start of ``self.stage``; not called when a stage is resumed."""

    def stage_sampler(self) -> Sampler:
        """Return a new sampler of the present stage's student, where it is not yet that of the finished one."""
        return self.make_sampler(self.config, self.family)

    def contract(self) -> dict[str, Any]:
        """Return what a caller of the finished student must know besides its sampler: JSON values."""
        return {}

    def feature_networks(self) -> dict[str, FeatureExtractor]:
        """Return the frozen feature networks of a critic by their configuration key: none of them may evaluate."""
        return {}

    # ----------------------------------------------------------------------------------- what a method builds

    def add_role(self, role: str, from_: str = TEACHER, *, trainable: bool = True) -> Denoiser:
        """Add a network that starts with the weights of the role ``from_``."""
        self.bank.fork(role, from_, trainable=trainable)
        return Denoiser(self.family, self.bank, role)

    def add_average(self, role: str, decay: Callable[[], float]) -> Denoiser:
        """Add an average of the student: after every step it keeps ``decay()`` of itself."""
        self.keep_near_student(role, decay)
        return self.add_role(role, STUDENT, trainable=False)

    def keep_near_student(self, role: str, keep: Callable[[], float]) -> None:
        """Move a role towards the student after every step: it keeps ``keep()`` of itself, 1 is all.

        Of adapters, both factors are blended, and not their product: nearly the same while the two roles are close.
        """
        self._averages[role] = keep

    def add_target(self, decay: float) -> Denoiser:
        """Add the target of a consistency method: an average of the student; with ``decay`` 0 the student itself."""
        if decay == 0:
            self.unused_roles = frozenset({TARGET})
            return self.student
        return self.add_average(TARGET, lambda: decay)

    def add_turn(
        self, name: str, loss: Callable[[Batch, Draws], Losses], *modules: nn.Module,
        when: Callable[[int], bool] = lambda step: True, head: Sequence[nn.Parameter] = (),
    ) -> None:  # fmt: skip
        """Add a turn that trains the role ``name``, if there is one, ``modules``, and a ``head`` by its optimiser."""
        params = list(self.bank.params(name)) if name in self.bank.roles else []
        for module in modules:
            params.extend(module.parameters())
        self.turns[name] = Turn(name, [*params, *head], loss, when, head)

    def add_critic(self, critic: Critic, loss: Callable[[Batch, Draws], Losses]) -> Critic:
        """Add a turn that trains ``critic``."""
        self.conditional_critic = critic.conditional
        self.add_turn("critic", loss, critic)
        return critic

    # ------------------------------------------------------------------------------------- what a loss uses

    def guided_teacher(self, cond: Cond) -> Denoise:
        """Return the teacher under ``config.guidance_scale``; a scale of 1 costs one call, any other two."""
        return self.teacher.guided(cond, self.config.guidance_scale - 1)

    def times(self, grid: Callable[[int], Tensor], intervals: int, device: torch.device | str = "cpu") -> Tensor:
        """Return ``grid(intervals)``, a grid of the schedule or places on it, on a device; it is computed once."""
        key = grid, intervals, str(device)
        if key not in self._times:
            self._times[key] = grid(intervals).to(device)
        return self._times[key]

    @contextlib.contextmanager
    def computing_target(self, target: Denoiser) -> Iterator[None]:
        """Compute without gradient, and with the dropout masks that the student will draw next."""
        with torch.no_grad(), shared_dropout(self.bank, target.role):
            yield

    # ------------------------------------------------------------------------------------ what the loop calls

    def forward(self, turn: str, batch: Batch, draws: Draws) -> Losses:
        """Return the losses of a turn: the one entry that is wrapped for distributed training.

        A network that only judges in another network's turn, such as the fake score, has no dropout there.
        """
        if self.step_in_stage == 0 and self.conditional_critic:
            check_classes(batch.cond, self.family.num_classes)
        with contextlib.ExitStack() as stack:
            for role in self.turns:
                if role not in (turn, STUDENT) and role in self.bank.roles:
                    stack.enter_context(in_mode(self.bank, role, training=False))
            return self.turns[turn].loss(batch, draws)

    def after_step(self) -> None:
        """Move the averages, and other roles that stay near it, towards the student."""
        for role, keep in self._averages.items():
            if (share := keep()) < 1:
                self.bank.blend(role, STUDENT, share)

    def sampler(self) -> Sampler:
        """Return the sampler of the present stage's student; it is made once per stage."""
        key = self.stage, self.config
        if self._sampler is None or self._sampler[0] != key:
            self._sampler = key, self.stage_sampler()
        return self._sampler[1]
