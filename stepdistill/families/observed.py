"""Any text-conditioned diffusers pipeline, observed: no line of this file knows its network.

The pipeline's own call is made once and watched: which argument of its network is the state, which the time, which are
conditions, what becomes of its output. The family repeats these calls with other states and times, and decodes by the
pipeline's own tail. When the teacher is opened, every finding is checked against the pipeline's calls; where one does
not hold, the teacher is refused with what differs. It is distilled from prompts, and from its own samples: images are
not encoded.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.batch import Batch, Cond, RawBatch
from stepdistill.diffusion.samplers import Sampler
from stepdistill.diffusion.schedule import DiscreteVP, Karras, RectifiedFlow
from stepdistill.diffusion.schedulers import to_diffusers
from stepdistill.families.base import Family, Inputs
from stepdistill.families.config import Resolution, TeacherConfig, sides_of
from stepdistill.families.latent import TextToImageFamily
from stepdistill.families.loading import open_pipeline
from stepdistill.families.network_file import network_class
from stepdistill.families.observation.checking import GUIDED, check_decodes, check_repeats
from stepdistill.families.observation.guidance import is_input, read_guidance, read_unguided, scale_argument
from stepdistill.families.observation.replay import ROWS, read_calls
from stepdistill.families.observation.watching import Record, Watched
from stepdistill.families.prompts import EXAMPLE_PROMPTS
from stepdistill.families.tiny import tiny_aura_flow
from stepdistill.loading import read_code

PLAIN = {"use_resolution_binning": False, "clean_caption": False, "cfg_normalization": False, "guidance_rescale": 0.0}
"""Arguments of calls that would change sizes, prompts or guidance."""
ATTENTION = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
)  # fmt: skip
"""Names that diffusers' attention layers have in every network."""


class Observed(TextToImageFamily):
    """An opened pipeline of any class whose call takes prompts.

    Args:
        pipe: the pipeline.
        resolution: side in pixels of its images, or their height and width; None for what its call makes by default.
        guidance_scale: the network's guidance input, for pipelines that have one; None is their call's default.
        frames: number of frames of its clips; None for what its call makes by default.

    Raises:
        ValueError: if its calls cannot be repeated from outside; it says what differs.
    """

    component = "transformer"
    network_classes = ()
    parts = ()
    processes = (DiscreteVP, Karras, RectifiedFlow)
    feature_blocks = ()
    lora_targets = ATTENTION
    encodes_images = False

    def __init__(
        self,
        pipe: Any,
        *,
        resolution: Resolution | None = None,
        guidance_scale: float | None = None,
        frames: int | None = None,
    ) -> None:
        self.pipe, self.component = pipe, component_of(pipe)  # type: ignore[misc]  # of this teacher alone
        self.network, self.num_classes, self.prompts = getattr(pipe, self.component), None, EXAMPLE_PROMPTS
        self.frozen_modules = tuple(
            part.requires_grad_(False).eval()
            for name, part in pipe.components.items()
            if isinstance(part, nn.Module) and name not in (self.component, "safety_checker")
        )
        self.network.eval()
        name = f"{type(pipe).__name__} with {type(pipe.scheduler).__name__}"
        watched = Watched(pipe, self.component, {**PLAIN, **size_arguments(resolution, frames)})
        try:
            self._observe(watched, guidance_scale)
            self._check_made(resolution, frames)
        except ValueError as error:
            raise ValueError(f"teacher.family: {name} cannot be observed: {error}") from error
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, AssertionError) as error:
            raise ValueError(
                f"teacher.family: {name} cannot be observed: its call with prompts alone fails: {error}"
            ) from error

    def _observe(self, watched: Watched, guidance_scale: float | None) -> None:
        # the last is long: some pipelines fill up to the longest prompt of a batch
        prompts = ["", *EXAMPLE_PROMPTS[: sum(ROWS) - 2], ", ".join(EXAMPLE_PROMPTS[:4])]
        self._scale, self._none = scale_argument(watched.parameters), 1.0
        self._guided: dict[str, Any] = {}
        options: dict[str, Any] = {}
        if self._scale is not None and is_input(watched, {"prompt": prompts[: ROWS[0]]}, self._scale):
            options[self._scale] = watched.parameters[self._scale].default if guidance_scale is None else guidance_scale
            self.replay, records = read_calls(watched, "prompt", prompts, options)
            self.guidance_convention = "an input of the network"
        elif guidance_scale is not None:
            raise ValueError(
                f"teacher.guidance_scale: got {guidance_scale}, but its network takes no guidance as an input"
            )
        else:
            self.replay, records, self._none = read_unguided(watched, "prompt", prompts, self._scale)
        for record in records:
            check_repeats(self.replay, record)
        check_decodes(self.replay, records[0], "")
        self._keep(watched, records[0], options)
        self.null: Cond = {}
        self._why_unguided = "its guidance is an input of its network, or it has none"
        if self._scale is not None and not options:
            try:
                self.null, self.guidance_rule, self._guided = read_guidance(
                    self.replay, prompts, self.guidance_arguments(GUIDED)
                )
            except ValueError as error:
                self._why_unguided = str(error)

    def _keep(self, watched: Watched, record: Record, options: Mapping[str, Any]) -> None:
        replay, taken = self.replay, watched.parameters
        self.schedule, self.prediction_type = replay.schedule, replay.prediction_type
        self.scheduler_config, self.sample_shape = replay.scheduler_config, replay.sample_shape
        assert record.images is not None, "the call came to its end"
        self.image_shape = tuple(record.images.shape[1:])
        _, *frames, height, width = self.image_shape
        call = {**PLAIN, **size_arguments((height, width), frames[0] if frames else None), **options}
        if "max_sequence_length" in taken:
            call["max_sequence_length"] = taken["max_sequence_length"].default
        self.pipeline_kwargs = {name: value for name, value in call.items() if name in taken}
        self.makes_clips = bool(frames)  # type: ignore[misc]
        self.scales_states = record.scaled  # type: ignore[misc]
        self.hands_generators_on = hands_on(self.pipe, record)  # type: ignore[misc]
        self.loads_lora = takes_lora(type(self.pipe), self.component)  # type: ignore[misc]
        linear = [name for name, layer in self.network.named_modules() if isinstance(layer, nn.Linear)]
        if not any(name.endswith(ATTENTION) for name in linear):
            self.lora_targets = tuple(name for name in linear if "." in name)  # type: ignore[misc]

    def _check_made(self, resolution: Resolution | None, frames: int | None) -> None:
        _, *made, height, width = self.image_shape
        if resolution is not None and (height, width) != sides_of(resolution):
            raise ValueError(f"its call makes {[height, width]} of {list(sides_of(resolution))} pixels asked for")
        if frames is not None and made != [frames]:
            raise ValueError(f"its call makes {made[0] if made else 'no'} frames of {frames} asked for")

    @classmethod
    def parts_of(cls, pipeline: str | None) -> tuple[set[str], set[str]]:
        """Return the parts that the pipeline's class takes."""
        import diffusers

        kind: Any = getattr(diffusers, pipeline or "DiffusionPipeline")
        taken = inspect.signature(kind.__init__).parameters
        optional = {name for name, part in taken.items() if part.default is not part.empty} | {
            *kind._optional_components
        }
        return {*taken} - optional - {"self", "args", "kwargs"}, optional

    @classmethod
    def load(cls, folder: Path, config: TeacherConfig) -> Observed:
        component = "transformer" if network_class(folder, "transformer") else "unet"
        if config.null_class is not None:
            raise ValueError(f"teacher.null_class: got {config.null_class}, but an observed teacher takes prompts")
        pipe = open_pipeline(folder, component, config)
        family = cls(pipe, resolution=config.resolution, guidance_scale=config.guidance_scale, frames=config.frames)
        family.code = read_code(folder)
        return family

    @classmethod
    def tiny(cls, seed: int = 0) -> Observed:
        """Return AuraFlow, for which there is no hand-written family."""
        return cls(tiny_aura_flow(seed), resolution=16)

    def native_size(self) -> tuple[int, int]:
        """Return the (height, width) in pixels at which it was observed."""
        return self.image_shape[-2], self.image_shape[-1]

    def check_size(self, size: tuple[int, int], key: str) -> None:
        """Raise ``ValueError``, which names ``key``, unless the pipeline can be observed at this (height, width)."""
        if size == self.native_size():
            return
        _, *frames, _, _ = self.image_shape
        try:
            type(self)(self.pipe, resolution=size, frames=frames[0] if frames else None)
        except ValueError as error:
            raise ValueError(f"{key}: got {list(size)}: {error}") from error

    def guidance_arguments(self, scale: float) -> dict[str, Any]:
        """Return the arguments of the pipeline's call for the guidance scale ``scale``, 1 being none."""
        if self._scale is None:
            return {}
        return {self._scale: scale - 1 + self._none} | (self._guided if scale > 1 else {})

    def pack(self, states: Tensor) -> Tensor:
        return self.replay.pack(states)

    def unpack(self, packed: Tensor) -> Tensor:
        return self.replay.unpack(packed)

    def call(
        self,
        network: nn.Module,
        x_t: Tensor,
        t: Tensor,
        cond: Mapping[str, Tensor],
        *,
        w: Tensor | None = None,
        s: Tensor | None = None,
    ) -> Tensor:
        assert w is None and s is None, "an observed network takes what its pipeline gives it"
        return self.replay.call(network, x_t, t, cond)

    def add_inputs(self, inputs: Inputs) -> None:
        Family.add_inputs(self, inputs)

    def embed(self, prompts: Sequence[str], *, null: bool = False) -> Cond:
        cond = self.replay.condition(prompts)
        return self.null_cond(cond) if null else cond

    def null_cond(self, cond: Mapping[str, Tensor]) -> Cond:
        if not self.null:
            raise ValueError(
                f"guidance: expected guidance_scale: 1: {type(self.pipe).__name__}, observed: {self._why_unguided}"
            )
        return super().null_cond(cond)

    def encode(self, raw: RawBatch) -> Batch:
        """Embed prompts; raise ``ValueError`` for images, which nobody saw being encoded."""
        if raw.images is not None:
            raise ValueError("data.name: expected 'prompts' or 'pairs': an observed teacher encodes no images")
        return Batch(None, self.condition(raw), len(raw.indices))

    def decode(self, x0: Tensor) -> Tensor:
        for module in self.frozen_modules:  # the VAE may have stayed on another device, and the call embeds a prompt
            module.to(x0.device)
        return self.replay.decode(x0, "").clamp(0, 1)

    def make_scheduler(self, sampler: Sampler) -> Any:
        own = self.replay.makes_grid and torch.equal(sampler.times, self.schedule.grid(sampler.steps))
        if own and type(self.schedule) is RectifiedFlow and "sigmas" not in self.replay.watched.parameters:
            scheduler = to_diffusers(sampler, self.scheduler_config)
            return type(scheduler).from_config(scheduler.config, shift=self.schedule.shift)
        return super().make_scheduler(sampler)

    def check_sampler(self, sampler: Sampler) -> None:
        super().check_sampler(sampler)
        watched = Watched(self.pipeline(self.network, sampler), self.component, {})
        call = {"num_inference_steps": sampler.steps, **self.guidance_arguments(1.0), **sampler.pipeline_kwargs}
        call |= {**self.pipeline_kwargs, **sampler.schedule.explicit_sigmas(sampler.times[:-1])}
        watched.lists = self.replay.watched.lists
        asked = watched.rehearse({"prompt": [""]}, self.replay.output, sampler.steps, **call)
        self.replay.check_grid(asked, watched.pipe.scheduler, sampler)


def hands_on(pipe: Any, record: Record) -> bool:
    """Return whether a call passes its generators to a scheduler whose steps take them, as a student's do."""
    if "generator" in inspect.signature(pipe.scheduler.step).parameters:
        return record.steps[0].handed_on
    return hasattr(pipe, "prepare_extra_step_kwargs")


def size_arguments(resolution: Resolution | None, frames: int | None) -> dict[str, int]:
    """Return the arguments of a call that ask for a size, which a call may know by other names or not at all."""
    size: dict[str, int] = {}
    if resolution is not None:
        height, width = sides_of(resolution)
        size |= {"height": height, "width": width}
    if frames is not None:
        size |= {"num_frames": frames, "video_length": frames}
    return size


def component_of(pipe: Any) -> str:
    """Return the name of a pipeline's network.

    Raises:
        ValueError: if it has none, or several.
    """
    names = ("transformer", "unet", "transformer_2", "unet_2", "prior", "decoder", "transformer_3")
    found = [name for name in names if getattr(pipe, name, None) is not None]
    if len(found) != 1 or found[0] not in ("transformer", "unet"):
        raise ValueError(
            f"teacher.family: {type(pipe).__name__} cannot be observed: expected one network, transformer or unet, got "
            f"{', '.join(found) or 'none'}"
        )
    return found[0]


def takes_lora(pipeline: type, component: str) -> bool:
    """Return whether a class of pipelines saves and loads adapters of its network."""
    save: Any = getattr(pipeline, "save_lora_weights", None)
    return save is not None and f"{component}_lora_layers" in inspect.signature(save).parameters
