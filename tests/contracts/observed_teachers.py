"""Miniatures that are observed: those of the hand-written families, and pipelines that have none."""

from __future__ import annotations

from collections.abc import Callable

from families.unknown_pipelines import UNKNOWN, make

from stepdistill.families.flux import Flux
from stepdistill.families.flux2 import Flux2
from stepdistill.families.latent import TextToImageFamily
from stepdistill.families.loading import families
from stepdistill.families.observed import Observed
from stepdistill.families.pixart import PixArt
from stepdistill.families.sd import SD
from stepdistill.families.sd3 import SD3
from stepdistill.families.wan import Wan


class Schnell(Flux):
    """With prompts as long as its pipeline's call makes them by default, which observation keeps to."""

    sequence_length = 512


KNOWN: dict[str, Callable[[], TextToImageFamily]] = {
    name: cls.tiny for name, cls in families().items() if issubclass(cls, TextToImageFamily) and cls is not Observed
}
VARIANTS: dict[str, Callable[[], TextToImageFamily]] = {
    "flux-schnell": lambda: Schnell.tiny(guidance_embeds=False), "flux2-dev": lambda: Flux2.tiny(guidance_embeds=True),
    "sd-v": lambda: SD.tiny(prediction_type="v_prediction"), "sd3.5": lambda: SD3.tiny(dual_attention=True),
    "pixart-sigma": lambda: PixArt.tiny(sigma=True), "wan-5b": lambda: Wan.tiny(residual=True),
}  # fmt: skip
"""Other kinds of them."""
KNOWN |= VARIANTS


def observe(family: TextToImageFamily) -> Observed:
    """The pipeline of a hand-written family, observed."""
    frames = family.image_shape[1] if family.makes_clips else None
    height, width = family.image_shape[-2:]
    return Observed(family.pipe, resolution=(height, width), frames=frames)


def observe_unknown(name: str) -> Observed:
    """A pipeline without a family, observed."""
    pipe, options = make(name)
    family = Observed(pipe, **options)
    if name == "cog_view4":  # it fills prompts up to the longest of a call, and sees that
        family.prompts = ("a red apple", "a blue bird", "a tall tree")
    return family


def observing(name: str) -> Callable[[], Observed]:
    """What makes the observed miniature of this name."""
    return lambda: observe_unknown(name) if name in UNKNOWN else observe(KNOWN[name]())


OBSERVED = {f"observed-{name}": observing(name) for name in (*KNOWN, *UNKNOWN)}
