"""What every test may rely on: no network, one thread, the same random numbers, an environment that is whole."""

import importlib
import importlib.util
import os
import random

import numpy as np
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported, which none of the above does
torch.set_num_threads(1)  # for networks this small a second thread costs more than it gives, and sums keep their order


def pytest_configure() -> None:
    """A torchvision that does not fit torch breaks transformers' imports far from the cause: say it first."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:
        raise pytest.UsageError(
            f"torchvision is installed but does not fit torch {torch.__version__}: {error}"
        ) from error


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Every test starts from the same global random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
