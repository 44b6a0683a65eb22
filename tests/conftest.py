"""What every test may rely on: no network, one thread, the same random numbers, an environment that is whole."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from tqdm.std import TqdmDefaultWriteLock

if TYPE_CHECKING:
    from contracts.stock import StockDiffusers

    from stepdistill.features.base import FeatureExtractor

# By default progress bars share a lock with forked children, and a child that is killed while it holds it keeps it.
TqdmDefaultWriteLock.mp_lock = None
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported, which none of the above does
# for networks this small a second thread costs more than it gives; TEST_THREADS=2 shows that nothing rests on it
torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))


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


@pytest.fixture(autouse=True, scope="session")
def few_teacher_steps() -> Iterator[None]:
    """Every export draws its teacher beside it, which is no teacher to look at here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stepdistill.inference.student.TEACHER_STEPS", 2)
        yield


@pytest.fixture(autouse=True, scope="session")
def quick_precision() -> Iterator[None]:
    """``UNet2DModel.forward`` asks twice for its own precision, for which diffusers walks all modules.

    With adapters that is a third of a miniature's forward. The first parameter tells the same, where no layer is cast
    by a hook, as none is here. A network that keeps some modules in single precision is asked as before.
    """
    from diffusers.models import modeling_utils

    walk = modeling_utils.get_parameter_dtype

    def first(network: torch.nn.Module) -> torch.dtype:
        parameter = next(network.parameters(), None)
        if parameter is None or not parameter.is_floating_point() or getattr(network, "_keep_in_fp32_modules", None):
            return walk(network)
        return parameter.dtype

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_utils, "get_parameter_dtype", first)
        yield


@pytest.fixture(autouse=True, scope="session")
def one_embedded_reference() -> Iterator[None]:
    """Each feature network sees the package's ten thousand images once, which takes it seconds."""
    from stepdistill.evaluation.reference import Reference

    opened, kept = Reference.of_embedded, {}

    def of_embedded(features: FeatureExtractor, max_images: int) -> Reference:
        key = json.dumps(features.describe(), sort_keys=True), max_images
        if key not in kept:
            kept[key] = opened(features, max_images)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reference, "of_embedded", of_embedded)
        yield


@pytest.fixture(scope="session")
def stock_diffusers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StockDiffusers]:
    """A process without stepdistill, for all tests that ask for one."""
    from contracts.stock import StockDiffusers  # imports diffusers, which reads the environment that is set above

    environment = StockDiffusers(tmp_path_factory.mktemp("elsewhere"))
    yield environment
    environment.close()
