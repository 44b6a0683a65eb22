"""CLIP score: how well an image fits its caption, by a CLIP of any path (Hessel et al. 2021, arXiv 2104.08718).

The score is 100 cos(image, caption), as torchmetrics computes it, on embeddings that also serve CMMD: the image passes
once. Images go in as bytes; a processor that is given floats in [0, 1] divides them by 255 again and sees black.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stepdistill.features.loading import load_features
from stepdistill.features.transformers import TransformersFeatures


class Clip:
    """Both towers of a CLIP.

    Args:
        images: its image half.
        tokenizer: of its text half.
    """

    def __init__(self, images: TransformersFeatures, tokenizer: Any) -> None:
        self.images, self.tokenizer = images, tokenizer
        self.limit: int = images.network.config.text_config.max_position_embeddings

    @classmethod
    def open(cls, path: str, device: torch.device | str = "cpu") -> Clip:
        """From a folder or hub id that holds both towers, an image processor and a tokenizer.

        Raises:
            ValueError: something of it is missing.
        """
        import transformers

        images = load_features(path)
        if not isinstance(images, TransformersFeatures) or not hasattr(images.network, "get_text_features"):
            raise ValueError(f"clip {path!r}: {images.name!r} has no text half; wanted a whole CLIP")
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"clip {path!r}: no tokenizer there\n{error}") from error
        known = images.network.config.text_config.vocab_size
        if len(tokenizer) != known:  # transformers makes an empty tokenizer where the files are missing
            raise ValueError(f"clip {path!r}: the tokenizer has {len(tokenizer)} tokens, the network {known}")
        return cls(images.to(device), tokenizer)

    @torch.no_grad()
    def embed_captions(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings (N, d) of captions, and which of them (N,) are longer than the network reads and were cut.

        A cut caption keeps its end token, which is where CLIP reads the sentence off.
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
        pooled = output if isinstance(output, Tensor) else output.pooler_output  # transformers 4 and 5
        return pooled.float().cpu(), cut


def clip_scores(images: Tensor, captions: Tensor) -> Tensor:
    """100 cos of image embeddings (N, d) and caption embeddings (N, d), (N,) in [-100, 100].

    torchmetrics cuts their mean at 0, which no trained CLIP comes near.
    """
    return 100 * torch.nn.functional.cosine_similarity(images.double(), captions.double())
