"""From a configuration to a student: the one path, and everything that is refused before its first step."""

import dataclasses
import warnings
from pathlib import Path

import pytest
import torch
from contracts.cases import STEPS, pipeline_images, save_images, save_teacher, sections, teacher_for
from safetensors.torch import load_file

import stepdistill
from stepdistill.config import read_config
from stepdistill.data.opening import check_apart
from stepdistill.diffusion.samplers import DDIM
from stepdistill.export.contract import Origin, read_contract
from stepdistill.export.pipeline import export_pipeline
from stepdistill.families.pixel import Pixel
from stepdistill.files.reading import parse_yaml
from stepdistill.files.schema import ConfigError
from stepdistill.training.checkpoint import Checkpoint
from stepdistill.training.config import RENAMED, resolve
from stepdistill.training.cost import TrainingCost
from stepdistill.training.run import Run
from stepdistill.training.run_state import SavedState


@pytest.fixture
def mapping(tmp_path):
    return sections(tmp_path, Pixel.tiny(), "progressive")


def test_every_problem_of_every_section_is_reported_at_once(mapping):
    mapping["train"] = {"steps": 0, "output_dri": "run"}
    mapping["optim"] = {"studnt": {}}
    mapping["bank"] = {"name": "adaptor"}
    mapping["metod"] = {}
    with pytest.raises(ConfigError) as error:
        resolve(mapping)
    text = str(error.value)
    for part in ("train.output_dri", "output_dir", "optim.studnt", "student", "bank.name", "metod", "method"):
        assert part in text
    assert len(error.value.problems) >= 4


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({}, "method.name: missing"),
        ({"name": "progresive"}, "progressive"),
        ({"name": "progressive", "stpes": 4}, "method.stpes"),
        ({"name": "progressive", "steps": 3, "start": 8}, "start: expected steps times"),
    ],
)
def test_a_wrong_method_section_names_what_is_wrong(mapping, method, message):
    with pytest.raises(ConfigError, match=message):
        resolve(mapping | {"method": method})


def test_a_turn_has_the_methods_defaults_under_what_is_given(mapping):
    from stepdistill.methods.progressive import Progressive
    from stepdistill.training.optimizers import OptimConfig

    mapping["optim"] = {"student": {"lr": 0.5}}
    given = {**Progressive.optim_defaults["student"], "lr": 0.5}
    assert resolve(mapping).optim["student"] == OptimConfig(**given)


def test_a_resolved_configuration_written_and_read_is_itself(mapping):
    from stepdistill.config import to_yaml

    config = resolve(mapping)
    assert resolve(parse_yaml(to_yaml(config.as_sections()))) == config


def test_a_teacher_that_is_moved_while_it_is_distilled_is_no_longer_needed(tmp_path):
    mapping = sections(tmp_path, Pixel.tiny(), "lcm", steps=1)
    (tmp_path / "teacher/README.md").write_text("---\nlicense: mit\n---\n")
    run = Run(resolve(mapping))
    (tmp_path / "teacher").rename(tmp_path / "moved")
    assert read_contract(run.train()).origin.license == {"license": "mit"}


# ---------------------------------------------------------------------------- refused before the first step


def refused(mapping, message):
    with pytest.raises(ValueError, match=message):
        Run(resolve(mapping))


def test_a_teacher_that_is_not_there(mapping, tmp_path):
    refused(mapping | {"teacher": {"path": str(tmp_path / "teachr")}}, "teacher.path: no folder.*teacher")


def test_a_teacher_without_a_scheduler(mapping, tmp_path):
    (tmp_path / "teacher/scheduler/scheduler_config.json").unlink()
    refused(mapping, "scheduler_config.json is missing")


def test_guidance_without_a_null_class(mapping, tmp_path):
    save_teacher(Pixel.tiny(num_classes=None), tmp_path / "bare")
    mapping["teacher"] = {"path": str(tmp_path / "bare")}
    mapping["method"]["guidance_scale"] = 2.0
    refused(mapping, "null_class")


def test_a_step_count_that_no_scheduler_has(mapping):
    mapping["method"] = {"name": "progressive", "steps": 3, "start": 12}
    refused(mapping, "steps must divide")


def test_epsilon_at_zero_terminal_snr(mapping, tmp_path):
    """RELIABILITY row 26."""
    family = Pixel.tiny()
    family.scheduler_config |= {"prediction_type": "epsilon", "rescale_betas_zero_snr": True}
    mapping["teacher"] = {"path": str(save_teacher(family, tmp_path / "impossible"))}
    refused(mapping, "epsilon.*zero terminal SNR")


def test_data_of_another_size(mapping, tmp_path):
    mapping["data"]["path"] = str(save_images(Pixel.tiny(size=12), tmp_path / "larger.npz"))
    refused(mapping, "12, 12, 1")


def test_labels_that_the_teacher_does_not_have(mapping, tmp_path):
    mapping["data"]["path"] = str(save_images(Pixel.tiny(num_classes=7), tmp_path / "classes.npz"))
    refused(mapping, "expected 0 to 2")


def test_training_on_images_without_images(mapping):
    refused(mapping | {"data": {"name": "noise"}}, "trains on images")


def test_an_output_that_is_a_file(mapping, tmp_path):
    (tmp_path / "run").write_text("")
    refused(mapping, "expected a folder, got the file")


# -------------------------------------------------------------------------------------------- plan and distill


def test_the_plan_counts_what_a_role_holds(mapping):
    copy = Run(resolve(mapping))
    count = sum(parameter.numel() for parameter in copy.family.network.parameters())
    plan = copy.plan()
    assert parse_yaml(plan.partition("memory, ")[0])["train"]["steps"] == STEPS
    table = {row.split()[0]: row.split()[1:] for row in plan.partition("counted:\n")[2].splitlines()}
    assert table["teacher"][:2] == [f"{count:,}", "False"] and table["student"][:2] == [f"{count:,}", "True"]
    assert table["mentor"][-1] == "0.0"
    assert plan.splitlines()[-1].endswith("as full copies 3.00x")
    assert not copy.folder.exists()


def test_dmd2_under_adapters_holds_little_more_than_its_teacher_and_the_plan_says_so(mapping):
    """Student, fake score and average of rank 1; at the embedded teacher's size, rank 3 is below 1.15."""
    method = {"name": "dmd2", "gan_weight": 0.0, "student_update_interval": 2}
    mapping |= {"method": method, "bank": {"name": "adapter", "rank": 1}, "optim": {}}
    run = Run(resolve(mapping))
    base = sum(p.numel() for name, p in run.distiller.bank.named_parameters() if "lora_" not in name)
    held = sum(p.numel() for p in run.distiller.bank.parameters())
    last = run.plan().splitlines()[-1]
    roles = len(run.distiller.bank.roles)
    assert last == f"networks: {held / base:.2f}x the teacher's parameters; as full copies {roles}.00x"


def test_the_shipped_config_of_adapters_holds_at_most_1_15_networks():
    mapping = read_config(Path(__file__).parents[2] / "configs/pixel_dmd2_lora.yaml")
    del mapping["bank"]["init_from"]
    run = Run(resolve(mapping))
    held = sum(p.numel() for name, p in run.distiller.named_parameters())
    base = sum(p.numel() for p in run.distiller.bank.params("teacher"))
    assert held <= 1.15 * base and run.distiller.bank.roles == ("teacher", "student", "fake")


def test_an_adapter_bank_trains_less_than_a_copy(mapping):
    mapping["bank"] = {"name": "adapter", "rank": 2}
    run = Run(resolve(mapping))
    adapters = sum(parameter.numel() for parameter in run.distiller.bank.params("student"))
    base = sum(p.numel() for name, p in run.family.network.named_parameters() if "lora_" not in name)
    assert 0 < adapters < base
    assert f"{adapters:,}" in run.plan()


@pytest.mark.parametrize("channels", [1, 4])
def test_distill_returns_a_pipeline_that_samples(tmp_path, channels):
    family = Pixel.tiny(size=12, channels=channels, num_classes=None)
    teacher = save_teacher(family, tmp_path / "teacher")
    images = save_images(family, tmp_path / "images.npz")
    method = {"name": "progressive", "steps": 1, "start": 2}
    data = {"name": "images", "path": str(images), "batch_size": 2}
    folder = stepdistill.distill(
        teacher=teacher, method=method, data=data, output_dir=tmp_path / "run", train={"steps": 2}
    )
    assert folder == tmp_path / "run/pipeline"
    pipeline = stepdistill.load_pipeline(folder)
    shown = pipeline_images(pipeline, family, 2, seed=0)
    assert shown.shape == (2, channels, 12, 12) and torch.isfinite(shown).all()
    assert (folder / "samples.png").is_file() and (tmp_path / "run/config.yaml").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher": None}, r"teacher\.path: expected text, got None"),
        ({"teacher": object()}, r"teacher\.path: expected text, got <object"),
        ({"output_dir": None}, r"train\.output_dir: expected text, got None"),
        ({"method": 3}, r"method\.name: missing"),
        ({"data": None}, r"data\.name: missing"),
        ({"data": ["images"]}, "data: expected a section of keys"),
        ({"train": "2000"}, "train: expected a section of keys"),
        ({"teacher_options": ["bfloat16"]}, "teacher: expected a section of keys"),
    ],
)
def test_distill_refuses_other_types_by_the_name_of_the_key(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    usual = {"teacher": "none", "method": "lcm", "data": "none", "output_dir": "run"}
    with pytest.raises(ValueError, match=f"^{message}"):
        stepdistill.distill(**usual | arguments)
    assert not any(tmp_path.iterdir())


def test_a_run_does_not_write_its_pictures_among_its_images(mapping, tmp_path):
    (tmp_path / "images").mkdir()
    mapping["data"] = {"name": "images", "path": str(tmp_path / "images")}
    mapping["train"] = {**mapping["train"], "output_dir": str(tmp_path / "other/../images/run")}
    refused(mapping, r"train\.output_dir: expected a folder outside data\.path")
    (tmp_path / "images/train-0-of-1.parquet").touch()
    check_apart(resolve(mapping).data, tmp_path / "images/run")  # only the table is read
    (tmp_path / "images/train-0-of-1.parquet").unlink()
    check_apart(resolve(mapping).data, tmp_path / "images/.runs/run")  # hidden folders are not read
    (tmp_path / "images/metadata.jsonl").write_text("")  # a table says which they are
    refused(mapping, r"data\.path: .*no images")


def test_a_student_may_start_from_a_finished_one(mapping, tmp_path):
    first = Run(resolve(mapping)).train()
    weights = load_file(first / "unet/diffusion_pytorch_model.safetensors")
    method = {"name": "dmd2", "steps": 1, "student_update_interval": 2}
    sections = mapping | {"method": method, "optim": {}, "bank": {"init_from": str(first)}}
    sections["train"] = {**mapping["train"], "output_dir": str(tmp_path / "second"), "ema": 0.9}
    run = Run(resolve(sections))
    bank, name = run.distiller.bank, "conv_in.weight"
    for role in ("student", "ema"):
        assert torch.equal(bank.state(role)[name], weights[name])
    assert torch.equal(bank.state("fake")[name], bank.state("teacher")[name])
    assert not torch.equal(bank.state("teacher")[name], weights[name])
    contract, before = read_contract(run.train()), read_contract(first)
    assert contract.origin.start == {"path": str(first), "training": before.origin.training}
    assert contract.origin.training["steps"] == 2 * before.origin.training["steps"]


def test_what_a_start_has_cost_is_read_before_the_training(mapping, tmp_path):
    family, training = Pixel.tiny(), dict.fromkeys(("steps", "images", "teacher_forwards", "wall_minutes"), 7)
    sampler = DDIM(family.schedule, family.schedule.grid(2))
    start = mapping | {"bank": {"init_from": str(tmp_path / "student")}}
    export_pipeline(family, family.network, sampler, tmp_path / "student", origin=Origin(training=training))
    assert Run(resolve(start)).start_cost == TrainingCost(**training)
    export_pipeline(family, family.network, sampler, tmp_path / "student", origin=Origin(training={"step": "7"}))
    refused(start, r"student/stepdistill\.json: training\.step: unknown key; did you mean 'steps'")


def test_a_student_as_the_teacher_is_asked_at_its_own_steps_or_warned_of(mapping, tmp_path):
    family = Pixel.tiny()
    sampler, origin = DDIM(family.schedule, family.schedule.grid(2)), Origin(method="progressive")
    export_pipeline(family, family.network, sampler, tmp_path / "student", origin=origin)
    teacher = {"teacher": {"path": str(tmp_path / "student")}}
    with pytest.warns(UserWarning, match=r"teacher\.path: .*student: expected a model that denoises at every time"):
        Run(resolve(mapping | teacher | {"method": {"name": "lcm"}, "optim": {}}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Run(resolve(mapping | teacher | {"method": {"name": "progressive", "steps": 1, "start": 2}}))


def test_a_start_that_is_no_student_of_this_teacher(mapping, tmp_path):
    """RELIABILITY row 26."""
    refused(mapping | {"bank": {"init_from": str(tmp_path / "studnt")}}, "^bank.init_from: no folder")
    other = save_teacher(Pixel.tiny(prediction_type="epsilon"), tmp_path / "epsilon")
    refused(
        mapping | {"bank": {"init_from": str(other)}},
        "bank.init_from: .*, which predicts v_prediction, got one that predicts epsilon",
    )
    other = save_teacher(Pixel.tiny(num_classes=5), tmp_path / "classes")
    refused(
        mapping | {"bank": {"init_from": str(other)}},
        "bank.init_from: .*class_embedding.weight: expected .* got \\(6, ",
    )


def test_a_checkpoint_of_a_version_without_a_key_has_its_default(mapping):
    run = Run(resolve(mapping))
    before = {
        key: value for key, value in run.identity.values.items() if key not in ("bank.init_from", "train.precision")
    }
    checkpoint = Checkpoint(Path("checkpoint"), 1, SavedState(stage=0, stage_name="train", done=1, config=before))
    run.identity.check(checkpoint)
    checkpoint.state.config.update({"bank.init_from": "a student"})
    with pytest.raises(ValueError, match="bank.init_from: was 'a student', is None"):
        run.identity.check(checkpoint)


def test_a_run_that_kept_the_home_in_the_path_of_its_start_is_resumed(mapping, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run = Run(resolve(mapping))
    before = run.identity.values | {"bank.init_from": "~/student"}
    identity = dataclasses.replace(run.identity, values=before | {"bank.init_from": str(tmp_path / "student")})
    identity.check(Checkpoint(Path("checkpoint"), 1, SavedState(stage=0, stage_name="train", done=1, config=before)))


def test_a_run_that_had_no_heads_optimiser_is_resumed_by_one_that_has_its_owners_settings(tmp_path):
    mapping = sections(tmp_path, teacher_for("tcd"), "tcd", steps=2)
    mapping["optim"]["student"]["lr"] = 0.002
    run = Run(resolve(mapping))
    before = {key: value for key, value in run.identity.values.items() if not key.startswith("optim.head")}
    assert "method.adversarial_weight" in before and before != run.identity.values
    del before["method.adversarial_weight"], before["method.adversarial"]
    run.identity.check(
        Checkpoint(Path("checkpoint"), 1, SavedState(stage=0, stage_name="train", done=1, config=before))
    )


def test_a_checkpoint_may_hold_an_option_that_only_the_sampler_reads(tmp_path):
    """As ``ict``'s middle level was once checked."""
    run = Run(resolve(sections(tmp_path / "ict", teacher_for("ict"), "ict", steps=1)))
    before = {**run.identity.values, "method.mid_sigma": 0.821}
    run.identity.check(
        Checkpoint(Path("checkpoint"), 1, SavedState(stage=0, stage_name="train", done=1, config=before))
    )


# -------------------------------------------------------------------------------------- keys of older versions

OLD_KEYS = {
    "dmd2": {
        "student_update_interval": ("every", 2),
        "fake_update": ("turns", "alternate"),
        "first_time": ("first", 1.0),
    },
}


@pytest.mark.parametrize("method", OLD_KEYS)
def test_former_keys_train_to_the_same_bits_and_warn_once_each(method, tmp_path):
    trained = []
    for name in ("now", "then"):
        mapping = sections(tmp_path / name, teacher_for(method), method, steps=2)
        for key, (former, value) in OLD_KEYS[method].items():
            mapping["method"].pop(key, None)
            mapping["method"][key if name == "now" else former] = value
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run = Run(resolve(mapping))
        messages = sorted(str(warning.message) for warning in caught if warning.category is FutureWarning)
        former_keys = OLD_KEYS[method].items() if name == "then" else ()
        assert messages == sorted(f"method.{old} is now called method.{key}" for key, (old, _) in former_keys)
        run.train()
        trained.append(load_file(run.folder / "checkpoint-2/weights.safetensors"))
    now, then = trained
    assert all(torch.equal(now[key], then[key]) for key in now)


@pytest.mark.parametrize("former", RENAMED)
def test_a_key_under_both_names_is_refused(former, mapping):
    section, _, key = RENAMED[former].partition(".")
    mapping = mapping | {section: {**mapping.get(section, {}), key: 1, former.partition(".")[2]: 1}}
    with pytest.raises(ConfigError, match=f"{former}: the former name of {section}.{key}, which is also given"):
        resolve(mapping)


def test_the_former_name_of_a_student_to_start_from_is_read(mapping):
    with pytest.warns(FutureWarning, match=r"bank\.start is now called bank\.init_from"):
        config = resolve(mapping | {"bank": {"start": "runs/student/pipeline"}})
    assert config.bank.init_from == "runs/student/pipeline"
