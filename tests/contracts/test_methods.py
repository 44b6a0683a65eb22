"""Every method with both banks: what the trainer, the checkpoints and the export promise of it."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from contracts.cases import (
    BANKS,
    STEPS,
    VARIANTS,
    case,
    checkpoint_bytes,
    make_run,
    make_trainer,
    pipeline_images,
    reference_images,
    sections,
    weights,
)
from contracts.two_processes import train_cases
from safetensors.torch import load_file
from training.processes import started

from stepdistill import load_pipeline
from stepdistill.batch import Batch
from stepdistill.config import to_yaml
from stepdistill.export.contract import read_contract
from stepdistill.families.sd import SD
from stepdistill.methods import method_names
from stepdistill.randomness import Draws
from stepdistill.training.config import resolve
from stepdistill.training.optimizers import OptimConfig
from stepdistill.training.run import Run

EVERY = [(method, bank) for method in (*method_names(), *VARIANTS) for bank in BANKS]
every_method = pytest.mark.parametrize(("method", "bank"), EVERY)
every_copy = pytest.mark.parametrize(  # with adapters it is a product test
    ("method", "bank"),
    [pytest.param(*each, marks=() if each[1] == "copy" else pytest.mark.product) for each in EVERY],
)
TESTS = Path(__file__).parents[1]
EPS = torch.finfo(torch.float32).eps


def first_batch(trainer):
    return next(trainer._batches())


# -------------------------------------------------------------------------------------------------- turns


@every_method
def test_a_turn_touches_its_own_params_only(tmp_path, method, bank):
    run = make_run(tmp_path, method, bank)
    trainer = make_trainer(run)
    batch = first_batch(trainer)
    trainer._step(0, [batch])  # at the start a fake is the teacher, and half of an adapter is zero: nothing to learn
    for turn in run.distiller.turns.values():
        trainer._train_only(turn)
        losses = run.distiller(turn.name, batch, trainer._draws(turn, 0, batch.size))
        assert all(term.ndim == 0 and term.isfinite() for term in losses.terms.values())
        sum(losses.terms.values()).backward()
        own = {id(parameter) for parameter in turn.params}
        touched = {id(p): p.grad for p in run.distiller.parameters() if p.grad is not None}
        assert touched and touched.keys() <= own
        assert all(grad.isfinite().all() for grad in touched.values())
        assert any(grad.abs().max() > 0 for grad in touched.values())
        before = weights(run)
        trainer.optimizers[turn.name].step()
        run.distiller.zero_grad(set_to_none=True)
        places = {parameter.data_ptr() for parameter in turn.params}
        ours = {name for name, tensor in run.distiller.state_dict().items() if tensor.data_ptr() in places}
        after = weights(run)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved and moved <= ours


@every_copy
def test_two_halves_of_a_batch_train_as_the_whole(tmp_path, method, bank):
    """What two processes compute adds up to what one does: their losses and gradients, each with its share of noise.

    The rest of training by several processes is the same for all methods: ``REPLICATED`` below trains some of them.
    """
    run = make_run(tmp_path, method, bank)
    trainer = make_trainer(run)
    batch = first_batch(trainer)
    trainer._step(0, [batch])
    for turn in run.distiller.turns.values():
        trainer._train_only(turn)
        whole = losses_and_gradients(run, turn, [batch])
        halves = losses_and_gradients(run, turn, [part_of(batch, 0), part_of(batch, 1)])
        assert halves.keys() == whole.keys()
        largest = max(gradient.abs().max() for gradient in whole.values())
        assert 0 < largest < torch.inf
        for name, expected in whole.items():  # float32 sums of up to a thousand numbers, in another order
            assert (halves[name] - expected).abs().max() < 1000 * EPS * largest, name


def losses_and_gradients(run, turn, parts):
    """A turn's mean loss over ``parts`` of a batch, and the gradient of every parameter that it moves, by name."""
    loss = 0.0
    for rank, part in enumerate(parts):
        draws = Draws(1, part.size, rank=rank, world=len(parts))
        loss = loss + sum(run.distiller(turn.name, part, draws).terms.values()) / len(parts)
    loss.backward()
    named = {name: p.grad for name, p in run.distiller.named_parameters() if p.grad is not None}
    run.distiller.zero_grad(set_to_none=True)
    return named | {"loss": loss.detach()}


def part_of(batch, rank):
    """The first or the second half of a batch."""
    size = batch.size // 2
    rows = slice(rank * size, (rank + 1) * size)
    images = None if batch.images is None else batch.images[rows]
    return Batch(images, {name: tensor[rows] for name, tensor in batch.cond.items()}, size)


@every_copy
def test_one_batch_can_be_overfitted(tmp_path, method, bank):
    """From weights that noise has led away from the teacher's, with the same noise in every step."""
    first, last = fall(make_run(tmp_path, method, bank), case(method))
    assert 0 < last < 0.7 * first


def fall(run, wanted, steps=12):
    """What a turn's training must lower on one batch, by its case, before and after ``steps`` steps."""
    trainer = make_trainer(run)
    name = wanted.overfits or run.distiller.turn_names[0]
    turn, batch = run.distiller.turns[name], first_batch(trainer)
    with torch.no_grad():
        for parameter in turn.params:
            spread = parameter.std() if parameter.numel() > 1 else 0.0
            parameter += max(spread, 0.1) * torch.randn_like(parameter)
        terms = [wanted.falls] if wanted.falls else run.distiller(name, batch, Draws(1, batch.size)).terms
    run.distiller.stage = dataclasses.replace(run.distiller.stage, steps=steps)
    trainer.optim[name] = OptimConfig(lr=wanted.overfit_lr, schedule="linear")
    trainer._make_optimizers(turn)
    trainer._draws = lambda turn, micro, size: Draws(1, size)
    losses = []
    for step in range(steps):
        logs = trainer._move(turn, step, [batch])
        losses.append(sum(float(logs[f"{name}/{term}"]) for term in terms))
    return losses[0], losses[-1]


# ------------------------------------------------------------------------------------------- whole trainings


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Each of two processes has one thread; another number would round differently, and Adam enlarges that."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The finished straight run of a method and bank (few steps over all its stages, an average)."""
    finished = {}

    def train(method, bank, accumulation=None):
        options = large(method, bank, accumulation)
        key = method, bank, options["accumulation"]
        if key not in finished:
            run = make_run(tmp_path_factory.mktemp(f"{method}-{bank}"), method, bank, **options)
            before = run.teacher_fingerprint, untouched(run), teacher_output(run)
            run.train()
            finished[key] = run, before
        return finished[key]

    return train


def large(method, bank, accumulation=None):
    """A run with an average and checkpoints; its batch is that of two processes where they train it, too."""
    every = math.gcd(*case(method).resumed_at)
    accumulation = accumulation or (2 if (method, bank) in {*REPLICATED, *SHARDED} else 1)
    return {"accumulation": accumulation, "ema": 0.9, "save_every": every, "keep": STEPS}


def untouched(run):
    """The teacher's own weights."""
    named = run.family.network.named_parameters()
    return {name: parameter.detach().clone() for name, parameter in named if "lora_" not in name}


@torch.no_grad()
def teacher_output(run):
    x_t = torch.randn((3, *run.family.sample_shape), generator=torch.Generator().manual_seed(0))
    return run.distiller.teacher.raw(x_t, torch.full((3,), 0.5), run.family.example_cond(range(3)))


@every_method
def test_the_teacher_never_changes(straight, method, bank):
    run, (_, before, output) = straight(method, bank)
    after = untouched(run)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(teacher_output(run), output)


@pytest.mark.parametrize(
    ("method", "bank", "step"),
    [  # with adapters only the first is no product test
        pytest.param(*each, step, marks=pytest.mark.product if each[1] == "adapter" and nth else ())
        for each in EVERY
        for nth, step in enumerate(case(each[0]).resumed_at)
    ],
)
def test_resumed_from_its_own_checkpoints_it_ends_in_the_same_bits(tmp_path, monkeypatch, straight, method, bank, step):
    """Inside a stage, and at every boundary. That a stop saves such a checkpoint too, ``test_trainer`` proves."""
    run, _ = straight(method, bank)
    boundaries = set(accumulate(stage.steps for stage in run.distiller.stages(STEPS))) - {STEPS}
    assert boundaries <= set(case(method).resumed_at)
    expected = checkpoint_bytes(run.folder, STEPS)
    assert "weights.safetensors" in expected
    monkeypatch.setattr(Run, "export", lambda run, folder, cost: folder)  # the weights are compared
    shutil.copytree(run.folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    make_run(run.folder.parent, method, bank, **large(method, bank), output_dir=str(tmp_path)).train()
    assert logged_steps(tmp_path) == [*range(step + 1, STEPS + 1)]
    assert checkpoint_bytes(tmp_path, STEPS) == expected


def logged_steps(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@every_method
def test_the_exported_pipeline_samples_like_the_trainer(straight, method, bank):
    run, _ = straight(method, bank)
    pipeline = load_pipeline(run.folder / "pipeline")
    images = pipeline_images(pipeline, run.distiller.family, 5, seed=7)
    assert (images - reference_images(run, 5, seed=7)).abs().max() < 1e-5
    assert images.std() > 0.01


# --------------------------------------------------------------------------------------------- two processes

REPLICATED = [
    ("progressive", "copy"),  # stages, and a stop that is resumed
    ("lcm", "copy"),  # a target that follows the student
    ("add", "copy"),  # a critic with features
    ("scm", "adapter"),  # forward differentiation, and a small network beside the student
    ("dmd2", "adapter"),  # several networks in turn, on one frozen base
    ("imagine_flash", "adapter"),  # a rollout of its own
]
"""What two processes train: every kind of method once. All others: ``test_every_method_trains_in_two_processes``."""
SHARDED = [("dmd2", "copy")]
"""A stop that is resumed, several networks, features with gradient, and a head beside a network in one optimiser."""


def train_in_two_processes(folder, *, replicated=(), sharded=()):
    """Train the (method, bank) of both lists by two processes, in one launch; returns the folder of the runs."""
    with started(folder, lambda: train_cases(folder, replicated, sharded), world=2) as processes:
        codes = processes.wait(1800)
    assert codes == [0, 0], processes.output(0)[-3000:] + processes.output(1)[-3000:]
    return folder


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return train_in_two_processes(tmp_path_factory.mktemp("two"), replicated=REPLICATED, sharded=SHARDED)


@pytest.mark.parametrize(("method", "bank"), REPLICATED)
def test_two_processes_train_to_the_weights_of_one(straight, two_processes, method, bank):
    run, _ = straight(method, bank)  # two micro-batches, as large a batch as the two processes have
    check_same_training(run.folder, two_processes / f"replicated/{method}-{bank}/run")


@pytest.mark.parametrize(("method", "bank"), SHARDED)
def test_two_processes_that_share_every_network_train_to_the_weights_of_one(straight, two_processes, method, bank):
    run, _ = straight(method, bank)
    check_same_training(run.folder, two_processes / f"sharded/{method}-{bank}/run")


def check_same_training(one, two):
    for file in (f"checkpoint-{STEPS}/weights.safetensors", "pipeline/unet/diffusion_pytorch_model.safetensors"):
        expected, found = load_file(one / file), load_file(two / file)
        assert expected.keys() == found.keys()
        assert max((expected[name] - found[name]).abs().max() for name in expected) < 1e-5
    costs = [read_contract(folder / "pipeline").origin.training for folder in (one, two)]
    assert all(costs[0][name] == costs[1][name] > 0 for name in ("steps", "images", "teacher_forwards"))


@pytest.mark.product
def test_every_method_trains_in_two_processes(straight, tmp_path):
    train_in_two_processes(tmp_path, replicated=EVERY)
    for method, bank in EVERY:
        check_same_training(straight(method, bank, 2)[0].folder, tmp_path / f"replicated/{method}-{bank}/run")


@pytest.mark.product
def test_every_method_trains_sharded(straight, tmp_path):
    train_in_two_processes(tmp_path, sharded=EVERY)
    for method, bank in EVERY:
        check_same_training(straight(method, bank, 2)[0].folder, tmp_path / f"sharded/{method}-{bank}/run")


@pytest.mark.product
@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("file", ["multi_gpu", "fsdp2"])
def test_a_shipped_launcher_file_trains_and_goes_on(tmp_path, file, bank):
    """The command of the README, without a GPU: what its two processes train and export is what one does."""
    one = sections(tmp_path, SD.tiny(), "dmd2", bank, ema=0.9, accumulation=2)
    run = Run(resolve(one))
    run.train()
    folder = tmp_path / "launched"
    two = one | {"train": one["train"] | {"accumulation": 1, "save_every": 2, "output_dir": str(folder)}}
    (tmp_path / "launched.yaml").write_text(to_yaml(two))
    launch(file, "scripts/train.py", "--config", str(tmp_path / "launched.yaml"))
    for done in ("pipeline", f"checkpoint-{STEPS}"):
        shutil.rmtree(folder / done)
    assert (folder / "checkpoint-2").is_dir()
    launch(file, "scripts/train.py", "--config", str(tmp_path / "launched.yaml"))
    check_same_training(run.folder, folder)
    images = [pipeline_images(load_pipeline(f / "pipeline"), run.family, 3, seed=5) for f in (run.folder, folder)]
    assert (images[0] - images[1]).abs().max() < 1e-5


def launch(file, *command):
    root = TESTS.parent
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port=0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [*launcher, "--config_file", f"configs/accelerate/{file}.yaml", *command],
        cwd=root, env=environment, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
