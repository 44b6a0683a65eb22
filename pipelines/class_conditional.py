"""A pixel-space diffusers pipeline with class labels, guidance by a null class, and a student's own grid.

Self-contained: it is copied into an export as ``pipeline.py`` and loaded with
``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)``.
"""

import inspect
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel
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
        noise_scale: standard deviation of the initial noise; None takes the scheduler's.
    """

    model_cpu_offload_seq = "unet"

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        null_class: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        sigmas: list[float] | None = None,
        noise_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(
            null_class=null_class,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            sigmas=None if sigmas is None else list(sigmas),
            noise_scale=noise_scale,
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int] | torch.Tensor | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
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
            generator: a ``torch.Generator``, or one an image, which makes an image independent of its batch.
            batch_size: number of images, where there are no labels to count.
            latents: unit Gaussian initial noise (B, C, H, W) to use instead of drawing it.
            output_type: ``"pil"``, ``"np"`` (B, H, W, C) or ``"pt"`` (B, C, H, W), values in [0, 1].
            return_dict: return an ``ImagePipelineOutput`` instead of a tuple.
        """
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        labels = self._labels(class_labels, batch_size)
        count = (batch_size or 1) if labels is None else len(labels)
        x = self._initial_noise(count, generator, latents)
        self._set_timesteps(steps)
        x = x * (self.scheduler.init_noise_sigma if self.config.noise_scale is None else self.config.noise_scale)
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generator} if takes_generator else {}
        for t in self.progress_bar(self.scheduler.timesteps):
            scaled = self.scheduler.scale_model_input(x, t) if hasattr(self.scheduler, "scale_model_input") else x
            x = self.scheduler.step(self._predict(scaled, t, labels, scale), t, x, **extra).prev_sample
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
        if "sigmas" not in inspect.signature(self.scheduler.set_timesteps).parameters or self.config.sigmas is None:
            self.scheduler.set_timesteps(steps, device=self.device)
            return
        trained = self.config.sigmas
        sigmas = trained if steps == len(trained) else torch.linspace(1, 1 / steps, steps).tolist()
        self.scheduler.set_timesteps(sigmas=sigmas, device=self.device)

    def _predict(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None, scale: float) -> torch.Tensor:
        timestep = t.expand(len(x)).to(x.device)
        if labels is None:
            return self.unet(x, timestep).sample
        if scale == 1:
            return self.unet(x, timestep, class_labels=labels).sample
        if self.config.null_class is None:
            raise ValueError(f"guidance_scale: found {scale}, but this network knows no null class; wanted 1")
        both = torch.cat([labels, torch.full_like(labels, self.config.null_class)])
        conditional, unconditional = self.unet(
            x.repeat(2, 1, 1, 1), timestep.repeat(2), class_labels=both
        ).sample.chunk(2)
        return unconditional + scale * (conditional - unconditional)

    def _to_output(self, images: torch.Tensor, output_type: str) -> Any:
        if output_type == "pt":
            return images
        arrays = images.cpu().permute(0, 2, 3, 1).float().numpy()
        if output_type == "np":
            return arrays
        if output_type == "pil":
            return self.numpy_to_pil(arrays)
        raise ValueError(f"output_type: found {output_type!r}, wanted 'pil', 'np' or 'pt'")
