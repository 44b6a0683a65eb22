"""A pixel-space diffusers pipeline with class labels, guidance by a null class, and a student's own grid.

Self-contained: it is copied into an export as ``pipeline.py`` and loaded with
``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)``.
"""

import inspect
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
    TCDScheduler,
    UNet2DModel,
)
from diffusers.utils.torch_utils import randn_tensor


class ClassConditionalPipeline(DiffusionPipeline):
    """Images of given classes from a ``UNet2DModel``.

    Args:
        unet: a ``UNet2DModel``, with or without class embedding.
        scheduler: the diffusers scheduler to sample with.
        null_class: the label that means "no class"; None where there is none, and then there is no guidance.
        num_inference_steps: steps of a bare call.
        guidance_scale: guidance of a bare call; 1 is none.
        sigmas: noise levels of a bare call, for schedulers that take them (flow matching).
        timesteps: timesteps of a bare call, for schedulers that take them and do not choose these by themselves.
        noise_scale: standard deviation of the initial noise; None takes the scheduler's.
        eta: share of fresh noise of a bare call, for schedulers whose step takes it; None takes the scheduler's.
        condition_embedding: what embeds class, guidance weight and target time, for a UNet that takes the vector;
            where it takes the weight, guidance costs one call a step and its scale must lie in the trained range.
    """

    model_cpu_offload_seq = "condition_embedding->unet"
    _optional_components = ["condition_embedding"]

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        null_class: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        sigmas: list[float] | None = None,
        noise_scale: float | None = None,
        eta: float | None = None,
        condition_embedding: ModelMixin | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, condition_embedding=condition_embedding)
        self.register_to_config(
            null_class=null_class,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            sigmas=None if sigmas is None else list(sigmas),
            noise_scale=noise_scale,
            eta=eta,
            timesteps=None if timesteps is None else list(timesteps),
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int] | torch.Tensor | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        eta: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        batch_size: int | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Sample.

        Args:
            class_labels: one label an image, a list or a tensor; None for an unconditional network.
            num_inference_steps: network calls; by default as the student was trained.
            guidance_scale: 1 is no guidance; by default as the student was trained.
            eta: share of fresh noise, for schedulers whose step takes it; by default as the student was trained.
            generator: a ``torch.Generator``, or one an image, which makes an image independent of its batch.
            batch_size: number of images, where there are no labels to count.
            latents: unit Gaussian initial noise (B, C, H, W) to use instead of drawing it.
            output_type: ``"pil"``, ``"np"`` (B, H, W, C) or ``"pt"`` (B, C, H, W), values in [0, 1].
            return_dict: return an ``ImagePipelineOutput`` instead of a tuple.
        """
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        self._check_guidance(scale)
        labels = self._labels(class_labels, batch_size)
        count = (batch_size or 1) if labels is None else len(labels)
        x = self._initial_noise(count, generator, latents)
        self._set_timesteps(steps)
        x = x * (self.scheduler.init_noise_sigma if self.config.noise_scale is None else self.config.noise_scale)
        eta = self.config.eta if eta is None else eta
        wanted = {"generator": generator, "eta": eta}
        taken = inspect.signature(self.scheduler.step).parameters
        extra = {name: value for name, value in wanted.items() if name in taken and value is not None}
        for t in self.progress_bar(self.scheduler.timesteps):
            scaled = self.scheduler.scale_model_input(x, t) if hasattr(self.scheduler, "scale_model_input") else x
            output = self._predict(scaled, t, self._target(t, eta), labels, scale)
            x = self.scheduler.step(output, t, x, **extra).prev_sample
        images = self._to_output((x / 2 + 0.5).clamp(0, 1), output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _labels(self, class_labels: Any, batch_size: int | None) -> torch.Tensor | None:
        if class_labels is None:
            if self.unet.config.num_class_embeds is not None:
                raise ValueError("class_labels is missing: this network is class-conditional")
            return None
        embedded = self.unet.config.num_class_embeds or 0
        labels = torch.as_tensor(class_labels, device=self.device).reshape(-1)
        if labels.is_floating_point() or labels.min() < 0 or labels.max() >= embedded:
            raise ValueError(f"class_labels: found {class_labels}, wanted whole numbers from 0 to {embedded - 1}")
        return labels.long()

    def _initial_noise(self, count: int, generator: Any, latents: torch.Tensor | None) -> torch.Tensor:
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (count, self.unet.config.in_channels, height, width)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=self.device, dtype=self.unet.dtype)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents: found shape {tuple(latents.shape)}, wanted {shape}")
        return latents.to(self.device, self.unet.dtype)

    def _set_timesteps(self, steps: int) -> None:
        if self.config.timesteps is not None and steps == len(self.config.timesteps):
            self.scheduler.set_timesteps(timesteps=self.config.timesteps, device=self.device)
            return
        if "sigmas" not in inspect.signature(self.scheduler.set_timesteps).parameters or self.config.sigmas is None:
            self.scheduler.set_timesteps(steps, device=self.device)
            return
        trained = self.config.sigmas
        sigmas = trained if steps == len(trained) else torch.linspace(1, 1 / steps, steps).tolist()
        self.scheduler.set_timesteps(sigmas=sigmas, device=self.device)

    def _takes(self, name: str) -> bool:
        return self.condition_embedding is not None and bool(self.condition_embedding.config[name])

    def _check_guidance(self, scale: float) -> None:
        if self._takes("w_range"):
            low, high = (1 + w for w in self.condition_embedding.config.w_range)
            if not low <= scale <= high:
                raise ValueError(f"guidance_scale: found {scale}, but this student was trained for {low:g} to {high:g}")
        elif scale != 1 and self.config.null_class is None:
            raise ValueError(f"guidance_scale: found {scale}, but this network knows no null class; wanted 1")

    def _target(self, t: torch.Tensor, eta: float | None) -> torch.Tensor | None:
        """The timestep that the step from ``t`` leads to, for networks that take it; the end is 0 in TCD."""
        if not self._takes("takes_s"):
            return None
        later = self.scheduler.timesteps[self.scheduler.timesteps < t]
        if isinstance(self.scheduler, TCDScheduler):
            return torch.floor((1 - (eta or 0.0)) * (later[0] if len(later) else torch.zeros_like(t)))
        return later[0] if len(later) else torch.full_like(t, self._clean_timestep())

    def _clean_timestep(self) -> float:
        """The timestep of clean data: -1 of a discrete process, 0 of a flow, a noise level of almost 0 for EDM."""
        if hasattr(self.scheduler, "precondition_noise"):
            return float(self.scheduler.precondition_noise(torch.tensor(1e-44, dtype=torch.float64)))
        return -1.0 if "beta_schedule" in self.scheduler.config else 0.0

    def _predict(
        self, x: torch.Tensor, t: torch.Tensor, s: torch.Tensor | None, labels: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        if self._takes("w_range"):
            return self._call(x, t, s, labels, torch.full((len(x),), scale - 1, device=x.device))
        if labels is None or scale == 1:
            return self._call(x, t, s, labels)
        both = torch.cat([labels, torch.full_like(labels, self.config.null_class)])
        conditional, unconditional = self._call(x.repeat(2, 1, 1, 1), t, s, both).chunk(2)
        return unconditional + scale * (conditional - unconditional)

    def _call(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        s: torch.Tensor | None,
        labels: torch.Tensor | None,
        w: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self.condition_embedding is not None:
            labels = self.condition_embedding(labels, w, None if s is None else s.expand(len(x)))
        return self.unet(x, t.expand(len(x)).to(x.device), class_labels=labels).sample

    def _to_output(self, images: torch.Tensor, output_type: str) -> Any:
        if output_type == "pt":
            return images
        arrays = images.cpu().permute(0, 2, 3, 1).float().numpy()
        if output_type == "np":
            return arrays
        if output_type == "pil":
            return self.numpy_to_pil(arrays)
        raise ValueError(f"output_type: found {output_type!r}, wanted 'pil', 'np' or 'pt'")
