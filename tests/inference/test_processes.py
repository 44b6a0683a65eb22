"""Several processes generate what one would."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stepdistill.diffusion.samplers import ConsistencySampler
from stepdistill.export.pipeline import export_pipeline
from stepdistill.families.pixel import Pixel
from stepdistill.inference import processes
from stepdistill.inference.generate import collect_prompts
from stepdistill.inference.processes import own_part, together
from stepdistill.inference.sampling import Images

ROOT = Path(__file__).parents[2]


class State:
    device = torch.device("cpu")

    def __init__(self, rank, world):
        self.process_index, self.num_processes = rank, world


@pytest.mark.parametrize(("count", "world"), [(10, 3), (2, 4), (1, 1)])
def test_parts_are_consecutive_and_all_there(monkeypatch, count, world):
    parts = []
    for rank in range(world):
        monkeypatch.setattr(processes, "open_state", lambda rank=rank: State(rank, world))
        parts += own_part(count)
    assert parts == list(range(count))


def test_parts_of_images_are_one_set(monkeypatch):
    first = Images(torch.zeros(1, 3, 2, 2), torch.tensor([4]), 2.0, 0.5, ["a"])
    rest = Images(torch.ones(3, 3, 2, 2), torch.tensor([5, 6, 7]), 4.0, 0.7, ["b", "c", "d"])
    monkeypatch.setattr(processes, "gather_object", lambda part: [*part, rest])
    whole = together([first])
    assert whole.pixels.mean() == 0.75 and whole.labels.tolist() == [4, 5, 6, 7]
    assert whole.captions == ["a", "b", "c", "d"] and whole.calls == 3.5
    assert together([]) is rest


def test_prompts_of_several_processes_come_from_a_file(monkeypatch):
    monkeypatch.setattr("stepdistill.inference.generate.open_state", lambda: State(0, 2))
    with pytest.raises(ValueError, match="--prompt_file: expected a file for several processes, got standard input"):
        collect_prompts([], "-")


@pytest.mark.product
def test_two_processes_write_the_files_of_one(tmp_path):
    family = Pixel.tiny()
    export_pipeline(
        family, family.network, ConsistencySampler(family.schedule, family.schedule.grid(2)), tmp_path / "p"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes"]
    command = ["scripts/generate.py", "--pipeline", str(tmp_path / "p"), "--num_images", "5", "--output"]
    for world in ("1", "2"):
        alone = ["--main_process_port=0"]
        done = subprocess.run([*launch, world, *alone, *command, str(tmp_path / world)], cwd=ROOT, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout.count(b"5 images") == 1
    for name in ("metadata.jsonl", *(f"{index:06d}.png" for index in range(5))):
        one, two = (tmp_path / world / name for world in ("1", "2"))
        if name.endswith("png"):
            assert np.array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(two)))
        else:
            assert list(map(json.loads, one.open())) == list(map(json.loads, two.open()))
