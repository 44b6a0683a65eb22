"""What stock diffusers alone makes of exports, in a process of its own, which reads jobs from standard input.

The jobs are those of :class:`contracts.stock.StockDiffusers`: one JSON object a line, answered by one line.
"""

import contextlib
import copy
import importlib
import json
import sys
from pathlib import Path


class Absent:
    """Finds no stepdistill, however it is installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "stepdistill":
            raise ModuleNotFoundError(f"No module named {name!r}: this machine does not have it")


def generate_images(pipeline, job, output):
    pipeline.set_progress_bar_config(disable=True)
    if job["seeds_globally"]:  # as the model card says
        torch.manual_seed(job["seed"] + 1)
    generator = [torch.Generator().manual_seed(job["seed"] + index) for index in range(job["count"])]
    call = copy.deepcopy(job["call"])  # Z-Image's pipeline writes into the list of prompts that it is given
    images, *_ = pipeline(**call, generator=generator, output_type="np", return_dict=False)
    np.save(output, images)


def do(job):
    export, output = Path(job["export"]), job["output"]
    student = DiffusionPipeline.from_pretrained(export, use_safetensors=True, trust_remote_code=job["own_code"])
    generate_images(student, job, f"{output}.npy")
    if job["teacher"] is not None:
        teacher = DiffusionPipeline.from_pretrained(job["teacher"], scheduler=student.scheduler)
        generate_images(teacher, job, f"{output}-without-lora.npy")
        teacher.load_lora_weights(export / "lora")
        generate_images(teacher, job, f"{output}-lora.npy")


if __name__ == "__main__":
    sys.meta_path.insert(0, Absent())
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module("stepdistill")
        sys.exit("stepdistill can be imported: nothing is proved here")

    import numpy as np
    import torch
    from diffusers import DiffusionPipeline

    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr  # nothing that a pipeline prints is taken for an answer
    for line in sys.stdin:
        do(json.loads(line))
        assert "stepdistill" not in sys.modules
        print("done", file=answers, flush=True)
