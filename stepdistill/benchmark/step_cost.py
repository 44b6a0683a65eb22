"""The cost of a training step on this machine: seconds and peak memory of a configuration, by memory policy.

Both depend on the sizes of networks and not on their values, so the teacher has the architecture of Stable Diffusion
1.5 or XL with random weights, latents and embeddings are random, and nothing is downloaded. VAE and text encoders are
miniatures, as if the data came from a cache. The trainer's own step is timed.
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import nn

from stepdistill.batch import Batch
from stepdistill.benchmark.tables import markdown_table
from stepdistill.config import read_config
from stepdistill.data.datasets import NoiseDataset
from stepdistill.data.inventory import Inventory
from stepdistill.evaluation.cost import peak_memory
from stepdistill.families.base import Family
from stepdistill.families.config import TeacherConfig, sides_of
from stepdistill.families.flux import Flux
from stepdistill.families.latent import rebuild
from stepdistill.families.sd import SD
from stepdistill.families.sdxl import SDXL
from stepdistill.families.tiny import tiny_clip, tiny_t5, tiny_vae
from stepdistill.files.words import nearest
from stepdistill.methods import find_method
from stepdistill.methods.base import Distiller
from stepdistill.training.config import EvalConfig, RunConfig, resolve
from stepdistill.training.evaluation import Evaluation
from stepdistill.training.identity import RunIdentity
from stepdistill.training.memory import memory_plan
from stepdistill.training.run import make_bank, quantize
from stepdistill.training.trainer import Trainer

WARMUP = 2
"""Steps before the clock starts, in which kernels are chosen and optimisers allocate their states."""

FLUX_SIDE = 128
"""Side in pixels with the miniature VAE, whose factor is 2: 64 by 64 latents, 1024 tokens, as FLUX at 512 pixels."""

CPU = torch.device("cpu")


HEADER = ("config", "bank", "batch", "teacher's parameters", "all roles", "s / step", "peak memory MB")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepCost:
    """Cost of a step of one configuration under one memory policy.

    Attributes:
        config: the configuration's name.
        bank: the memory policy.
        batch_size: images per step.
        parameters: number of parameters of the teacher's network.
        held: parameters of all roles, including the teacher, in units of ``parameters``.
        seconds: mean seconds per step; None if the device ran out of memory.
        peak_memory_mb: peak of the GPU allocator, or of the process on a CPU.
    """

    config: str
    bank: str
    batch_size: int
    parameters: int
    held: float
    seconds: float | None
    peak_memory_mb: float

    def cells(self) -> tuple[str, ...]:
        """Return the row under :data:`HEADER`."""
        seconds = "out of memory" if self.seconds is None else f"{self.seconds:.3g}"
        sizes = (str(self.batch_size), f"{self.parameters:,}", f"{self.held:.2f}x")
        return (self.config, self.bank, *sizes, seconds, f"{self.peak_memory_mb:,.0f}")


def step_cost_table(
    configs: Sequence[Path], banks: Sequence[str], overrides: Sequence[str], steps: int, tiny: bool
) -> str:
    """Return a Markdown table with a row for every configuration and memory policy.

    Args:
        configs: files ``<family>_<method>.yaml``.
        banks: memory policies, ``copy`` or ``adapter``.
        overrides: further ``section.key=value`` for all of them.
        steps: number of timed steps, a multiple of the method's ``student_update_interval``.
        tiny: whether to take miniatures of the networks.

    Raises:
        ValueError: for networks of full size without a GPU.
    """
    if not tiny and not torch.accelerator.is_available():
        raise ValueError(
            "networks of full size need a GPU, and there is none; --plan shows their memory, --tiny uses miniatures"
        )
    lines = [HEADER, ("---",) * len(HEADER)]
    for path, bank in itertools.product(configs, banks):
        # in a process of its own, because the peak is that of a process
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            case = process.submit(measure, path, [*overrides, f"bank.name={bank}"], steps, tiny)
            lines.append(case.result().cells())
    return f"{markdown_table(lines)}\n\n{machine()}"


def measure(path: Path, overrides: Sequence[str], steps: int, tiny: bool) -> StepCost:
    """Train a few steps of a configuration, on random networks of its family's size."""
    config = resolve(read_config(path, overrides))
    family = make_family(path.stem.partition("_")[0], tiny, CPU)
    nn.Module.to(family.network, dtype=getattr(torch, config.teacher.dtype))
    parameters = count_parameters([family.network])
    distiller = make_distiller(config, family, CPU)
    try:
        seconds = time_steps(make_trainer(config, distiller), config.data.batch_size, steps)
    except torch.OutOfMemoryError:
        seconds = None
    held = count_parameters(distiller.bank.distinct_networks())
    device = torch.accelerator.current_accelerator() or CPU
    return StepCost(
        config=path.stem, bank=config.bank.name, batch_size=config.data.batch_size, parameters=parameters,
        held=held / parameters, seconds=seconds, peak_memory_mb=peak_memory(device)["peak_memory_mb"],
    )  # fmt: skip


def count_parameters(networks: Iterable[nn.Module]) -> int:
    """Return the number of parameters of all networks together."""
    count = 0
    for network in networks:
        count += sum(parameter.numel() for parameter in network.parameters())
    return count


def plan(path: Path, overrides: Sequence[str]) -> str:
    """Return the memory plan of a configuration at full size; nothing is allocated."""
    config, nowhere = resolve(read_config(path, overrides)), torch.device("meta")
    family = planned_family(path.stem.partition("_")[0], config.teacher, nowhere)
    family.to(nowhere)
    nn.Module.to(family.network, dtype=getattr(torch, config.teacher.dtype))
    distiller = make_distiller(config, family, nowhere)
    family.frozen_modules = ()  # miniatures
    return f"{path.stem}, bank {config.bank.name}\n{memory_plan(distiller, config)}"


def make_distiller(config: RunConfig, family: Family, place: torch.device) -> Distiller:
    """Return the method of a configuration around an opened teacher, with new tensors on ``place``."""
    method = find_method(config.method_name)
    method.check(config.method, family)
    family.add_inputs(method.extra_inputs(config.method))
    family.widen(method.head_points(config.method))
    with place:
        bank = make_bank(family, config.bank)
        distiller = method(family, bank, config.method, ema=config.train.ema > 0)
        quantize(bank, config.teacher.quantization)
        return distiller


def make_trainer(config: RunConfig, distiller: Distiller) -> Trainer:
    """Return a trainer that reads no data and writes no file."""
    data = NoiseDataset(None, size=distiller.family.image_shape, num_classes=None)
    train = dataclasses.replace(config.train, accumulation=1, tracker="none", output_dir=tempfile.gettempdir())
    evaluation = Evaluation.open(EvalConfig(), Path(train.output_dir), distiller.family)
    identity = RunIdentity({}, {}, Inventory({}))
    return Trainer(distiller, data, dataclasses.replace(config, train=train), identity, evaluation)


def time_steps(trainer: Trainer, batch_size: int, steps: int) -> float:
    """Return the mean seconds of ``steps`` steps."""
    family, device = trainer.distiller.family, trainer.device
    images = torch.randn(batch_size, *family.sample_shape)
    batch = Batch(images, family.example_cond(range(batch_size)), batch_size).to(device)
    trainer.distiller.stage = trainer.distiller.stages(trainer.config.steps)[0]
    trainer._begin_stage()
    start = 0.0
    for step in range(WARMUP + steps):
        if step == WARMUP:
            start = now()
        trainer._step(step, [batch])
        trainer.step += 1
    seconds = (now() - start) / steps
    trainer.guard.raise_if_tripped()
    return seconds


def now() -> float:
    """Return the time at which the device has finished all its work."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def machine() -> str:
    """Return the device and software of the measurement."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} thread(s)"
    return f"{device}, torch {torch.__version__}, {platform.system()}"


# ------------------------------------------------------------------------------------------------ random teachers


def make_family(name: str, tiny: bool, device: torch.device) -> Family:
    """Return a teacher with random weights, of full size or a miniature."""
    if name not in TEACHERS:
        raise ValueError(
            f"--config: expected a file sd_*.yaml, sdxl_*.yaml or flux_*.yaml, got {name!r}{nearest(name, TEACHERS)}"
        )
    miniature, full = TEACHERS[name]
    return miniature() if tiny else full(device)


def full_sd(device: torch.device) -> SD:
    """Return the network of Stable Diffusion 1.5, with a text encoder of its width."""
    from diffusers import UNet2DConditionModel

    with torch.device(device):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    return SD(rebuild(SD.tiny().pipe, unet=unet, text_encoder=tiny_clip(width=768)[1]))


def full_sdxl(device: torch.device) -> SDXL:
    """Return the network of Stable Diffusion XL, with text encoders of its widths."""
    from diffusers import UNet2DConditionModel

    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=128, block_out_channels=(320, 640, 1280), cross_attention_dim=2048,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        )  # fmt: skip
    encoders = {"text_encoder": tiny_clip(width=768)[1], "text_encoder_2": tiny_clip(projection=True, width=1280)[1]}
    return SDXL(rebuild(SDXL.tiny().pipe, unet=unet, **encoders))


def full_flux(device: torch.device) -> Flux:
    """Return a transformer of two billion parameters, FLUX.1's in width with fewer blocks, and encoders' widths."""
    return flux_of(device, FLUX_SIDE, num_layers=3, num_single_layers=7)


def planned_family(name: str, teacher: TeacherConfig, device: torch.device) -> Family:
    """Return a teacher of full size, of which nothing is held: FLUX.1-dev with all its blocks, at its resolution."""
    if name != "flux":
        return make_family(name, False, device)
    height, _ = sides_of(teacher.resolution or 1024)
    return flux_of(device, height // 4, num_layers=19, num_single_layers=38)


def flux_of(device: torch.device, side: int, **blocks: int) -> Flux:
    """Return FLUX.1 with these numbers of blocks, for square images of ``side`` pixels with the miniature VAE."""
    from diffusers import FluxTransformer2DModel

    with torch.device(device):
        transformer = FluxTransformer2DModel(guidance_embeds=True, **blocks)
    encoders = {"text_encoder": tiny_clip(width=768)[1], "text_encoder_2": tiny_t5(width=4096)[1]}
    vae = tiny_vae(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159)
    return Flux(rebuild(Flux.tiny().pipe, transformer=transformer, vae=vae, **encoders), resolution=side)


TEACHERS: dict[str, tuple[Callable[[], Family], Callable[[torch.device], Family]]] = {
    "sd": (SD.tiny, full_sd),
    "sdxl": (SDXL.tiny, full_sdxl),
    "flux": (Flux.tiny, full_flux),
}
