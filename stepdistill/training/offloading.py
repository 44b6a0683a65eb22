"""Where a run holds what does not train: on the device, or on the host until it is used."""

from __future__ import annotations

import torch

from stepdistill.batch import Batch, RawBatch
from stepdistill.data.base import Dataset
from stepdistill.families.visiting import hold_on_host, tensors_of
from stepdistill.methods.base import Distiller
from stepdistill.networks.bank import EMA
from stepdistill.training.config import TrainConfig


class Encoding:
    """What turns raw samples into batches of a run.

    Args:
        dataset: the run's.
        distiller: its method, of which the VAE, the text encoders and the average are put where they are held.
        config: the ``train`` section.
        device: where the run trains.
        world: number of its processes.

    Raises:
        ValueError: if the average is to be held on the host by several processes.
    """

    def __init__(
        self, dataset: Dataset, distiller: Distiller, config: TrainConfig, device: torch.device, world: int
    ) -> None:
        self.dataset, self.family, self.device = dataset, distiller.family, device
        self.visits = config.offload_encoders and not dataset.is_encoded
        """Whether what encodes is on the device while it encodes only; of encoded data, while it samples only."""
        if config.offload_ema and world > 1:
            raise ValueError(f"train.offload_ema: expected false for {world} processes, got true")
        if config.offload_ema:
            distiller.bank.hold_on_host(EMA)
        if self.visits:
            hold_on_host(tensors_of(self.family.frozen_modules))
        elif not dataset.is_encoded:
            self.family.to(device)

    def __call__(self, raw: RawBatch) -> Batch:
        """Return a batch on the device, where what was stored in half precision becomes single."""
        if self.dataset.is_encoded:
            return self.dataset.encode(self.family, raw).to(self.device).widened()
        if not self.visits:
            return self.dataset.encode(self.family, raw).to(self.device)
        with self.family.on_device(self.device):
            return self.dataset.encode(self.family, raw).to(self.device)
