"""Run by torchrun: methods and banks for a few steps, and for the first of them a stop that one process was asked for.

``two_processes.py FOLDER lcm-copy ... sharded dmd2-copy ...``: replicated what comes before the word, sharded the rest.
"""

import os
import sys
from pathlib import Path

from contracts.cases import make_run, stopping_after

SHARDING = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def main(folder: Path, cases: list[str]) -> None:
    import torch
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    torch.set_num_threads(1)
    state, place = PartialState(cpu=True), cases.index("sharded")
    train_each(state, folder / "replicated", cases[:place])
    os.environ.update(SHARDING)
    AcceleratorState._reset_state()
    train_each(state, folder / "sharded", cases[place + 1 :])


def train_each(state, folder: Path, cases: list[str]) -> None:
    for case in cases:
        method, bank = case.split("-")
        with state.main_process_first():  # who comes first writes teacher and data
            run = make_run(folder / case, method, bank, ema=0.9)
        if case == cases[0]:
            stop_on_one(run, state.process_index)
            run = make_run(folder / case, method, bank, ema=0.9)
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


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
