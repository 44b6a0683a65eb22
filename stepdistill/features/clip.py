"""CLIP score: how well an image fits its caption, by a CLIP of any path (Hessel et al. 2021, arXiv 2104.08718).

The score is 100 cos(image, caption), as torchmetrics computes it, on embeddings that CMMD uses too, so that an image
passes the network once. Images are bytes; a processor that gets floats in [0, 1] divides them by 255 again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stepdistill.assets import CLIPS
from stepdistill.features.loading import load_features
from stepdistill.features.transformers import TransformersFeatures


class Clip:
    """Both towers of a CLIP.

    Args:
        images: the whole network, as features of images.
        tokenizer: for its text half.
    """

    def __init__(self, images: TransformersFeatures, tokenizer: Any) -> None:
        self.images, self.tokenizer = images, tokenizer
        self.limit: int = images.network.config.text_config.max_position_embeddings

    @classmethod
    def open(cls, path: str, device: torch.device | str = "cpu") -> Clip:
        """Open ``"faces"``, or a folder or hub id that holds both towers, an image processor and a tokenizer.

        Raises:
            ValueError: if one of them is missing.
        """
        import transformers

        path = str(CLIPS.get(path, path))
        images = load_features(path)
        if not isinstance(images, TransformersFeatures) or not hasattr(images.network, "get_text_features"):
            raise ValueError(f"clip {path!r}: expected a whole CLIP, but {images.name!r} has no text half")
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"clip {path!r}: expected a tokenizer, got none\n{error}") from error
        known = images.network.config.text_config.vocab_size
        if len(tokenizer) != known:  # transformers makes an empty tokenizer where the files are missing
            raise ValueError(f"clip {path!r}: expected a tokenizer of {known} tokens, got {len(tokenizer)}")
        return cls(images.to(device), tokenizer)

    @torch.no_grad()
    def embed_captions(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return embeddings (N, d) of captions, and which (N,) were too long for the network and have been cut.

        A cut caption keeps its end token, at which CLIP takes the embedding.
        """
        texts = list(captions)
        full = self.tokenizer(texts)["input_ids"]
        cut = torch.tensor([len(ids) > self.limit for ids in full])
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.limit, return_tensors="pt"
        )
        device = next(self.images.parameters()).device
        output = self.images.network.get_text_features(
            tokens["input_ids"].to(device), attention_mask=tokens["attention_mask"].to(device)
        )
        pooled = getattr(output, "pooler_output", output)  # transformers 5, and 4
        return pooled.float().cpu(), cut


def clip_scores(images: Tensor, captions: Tensor) -> Tensor:
    """Return 100 cos of image embeddings (N, d) and caption embeddings (N, d), (N,) in [-100, 100].

    torchmetrics cuts their mean at 0, which is far below the scores of a trained CLIP.
    """
    return 100 * torch.nn.functional.cosine_similarity(images.double(), captions.double())
