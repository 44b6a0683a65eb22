"""What each of two processes does: train methods and banks, the first with a stop that one of them was asked for."""

import os
from pathlib import Path

from contracts.cases import make_run, stopping_after

SHARDING = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def train_cases(folder: Path, replicated, sharded) -> None:
    """Train (method, bank) of both lists, in ``folder/replicated`` and ``folder/sharded``."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    state = PartialState(cpu=True)
    train_each(state, folder / "replicated", replicated)
    os.environ.update(SHARDING)
    AcceleratorState._reset_state()
    train_each(state, folder / "sharded", sharded)


def train_each(state, folder: Path, cases) -> None:
    for method, bank in cases:
        place = folder / f"{method}-{bank}"
        with state.main_process_first():  # who comes first writes teacher and data
            run = make_run(place, method, bank, ema=0.9)
        if (method, bank) == cases[0]:
            stop_on_one(run, state.process_index)
            run = make_run(place, method, bank, ema=0.9)
        run.train()


def stop_on_one(run, rank: int) -> None:
    with stopping_after(2 if rank == 1 else -1):
        try:
            run.train()
        except SystemExit as leaving:
            assert leaving.code == 143
            assert (run.folder / "checkpoint-2").is_dir()
        else:
            raise AssertionError("the other process did not stop")
