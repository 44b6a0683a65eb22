"""Prompts in, images out: where prompts come from, what a file remembers, and the teacher on the right."""

import dataclasses
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from contracts.cases import save_teacher
from diffusers import DDIMScheduler, StableDiffusionPipeline
from families.unknown_pipelines import cog_video_x
from PIL import Image

from stepdistill.cli import main, make_parser
from stepdistill.data.base import DataConfig
from stepdistill.data.listing import list_samples
from stepdistill.diffusion.samplers import DDIM, ConsistencySampler
from stepdistill.export.contract import Contract, Origin
from stepdistill.export.pipeline import export_pipeline
from stepdistill.families.base import Inputs
from stepdistill.families.config import TeacherConfig
from stepdistill.families.dit import DiT
from stepdistill.families.flux import Flux
from stepdistill.families.loading import load_teacher
from stepdistill.families.pixel import Pixel
from stepdistill.families.qwen_image import QwenImage
from stepdistill.families.sd import SD
from stepdistill.families.sd3 import SD3
from stepdistill.families.wan import Wan
from stepdistill.families.zimage import ZImage
from stepdistill.inference import generate as inference
from stepdistill.inference import saving
from stepdistill.inference.generate import Request, check_negative_prompt, collect_prompts, open_pipeline
from stepdistill.inference.grids import make_grid, to_uint8
from stepdistill.inference.sampling import Images
from stepdistill.inference.saving import check_places, save_images, side_by_side
from stepdistill.inference.solvers import teacher_pipeline


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "sd"
    SD.tiny().pipe.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def student(tmp_path_factory, teacher):
    """The teacher itself, exported as a student of two steps."""
    family = SD.tiny()
    sampler = DDIM(family.schedule, family.schedule.grid(2))
    origin = Origin(method="progressive", teacher=teacher, guidance_distilled=3.0)
    return str(
        export_pipeline(family, family.network, sampler, tmp_path_factory.mktemp("s") / "pipeline", origin=origin)
    )


def generate(*arguments):
    main(["generate", *map(str, arguments)])


def test_single_files_carry_what_repeats_them(tmp_path, student):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a crème brûlée\n\na 日本 map\n", encoding="utf-8")
    generate(
        "--pipeline", student, "--prompt", "a cat", "--prompt_file", prompts, "--seed", 3, "--batch_size", 2,
        "--output", tmp_path / "all", tmp_path / "all.png",
    )  # fmt: skip
    files = sorted((tmp_path / "all").glob("*.png"))
    found = [Image.open(file) for file in files]
    assert [image.text["prompt"] for image in found] == ["a cat", "a crème brûlée", "a 日本 map"]
    assert {image.text["seed"] for image in found} == {"3"} and found[1].text["index"] == "1"
    assert Image.open(tmp_path / "all.png").width > 3 * found[0].width

    generator = torch.Generator().manual_seed(int(found[1].text["generator_seed"]))
    pipeline = StableDiffusionPipeline.from_pretrained(student, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    again = pipeline("a crème brûlée", num_inference_steps=2, guidance_scale=1.0, generator=generator).images[0]
    assert max(abs(a - b) for a, b in zip(again.tobytes(), found[1].tobytes(), strict=True)) <= 1


def test_a_folder_of_samples_is_data_with_what_they_were_asked_for(tmp_path, student):
    generate("--pipeline", student, "--prompt", "a crème brûlée", "a dog", "--output", tmp_path / "text")
    listing = list_samples(DataConfig(name="images", path=str(tmp_path / "text")))
    assert listing.captions == [("a crème brûlée",), ("a dog",)] and listing.labels is None
    family = Pixel.tiny()
    folder = export_pipeline(family, family.network, DDIM(family.schedule, family.schedule.grid(1)), tmp_path / "p")
    generate("--pipeline", folder, "--num_images", 4, "--output", tmp_path / "classes")
    listing = list_samples(DataConfig(name="images", path=str(tmp_path / "classes")))
    assert listing.labels.tolist() == [0, 1, 2, 0] and len(listing.images) == 4
    with pytest.raises(ValueError, match=r"--class_labels: expected 0 to 2, the classes of .*, got 7"):
        open_pipeline(str(folder), Request(labels=[0, 7]), {})
    open_pipeline(str(folder), Request(labels=[3]), {})  # the class that means none
    with pytest.raises(ValueError, match=r"--class_labels: .* \(StableDiffusionPipeline\) takes none"):
        open_pipeline(student, Request(prompts=["a cat"], labels=[1]), {})


# --------------------------------------------------------------------------------------------- where they are written


def test_what_is_no_place_for_images_is_refused_and_stays_as_it_is(tmp_path):
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    for name in ("grid.jpg", "clip.mp4", "notes", "folder.png"):
        with pytest.raises(ValueError, match=f"--output: expected a .png for a grid, or a folder .*{name}"):
            check_places([tmp_path / "grid.png", tmp_path / name])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.png", "notes"]


def test_images_of_the_user_and_their_table_are_never_replaced(tmp_path):
    images = Images(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    save_images(images, tmp_path / "ours", seed=0, about={})
    save_images(images, tmp_path / "ours/GRID.PNG", seed=0, about={})
    check_places([tmp_path / "ours", tmp_path / "ours/GRID.PNG", tmp_path / "new"])
    (tmp_path / "ours/metadata.jsonl").unlink()
    check_places([tmp_path / "ours"])  # as a killed process leaves it
    Image.new("RGB", (8, 8)).save(tmp_path / "ours/000000.png")
    with pytest.raises(ValueError, match=r"000000\.png: is an image that was made elsewhere"):
        check_places([tmp_path / "ours"])
    (tmp_path / "ours/metadata.jsonl").write_text('{"file_name": "000000.png", "text": "named as ours are"}\n')
    with pytest.raises(ValueError, match=r"000000\.png: is an image that was made elsewhere"):
        check_places([tmp_path / "ours"])
    (tmp_path / "ours/metadata.jsonl").write_text('{"file_name": "cat.png", "text": "a cat"}\n')
    with pytest.raises(ValueError, match=r"metadata\.jsonl:1: is of images that were made elsewhere"):
        check_places([tmp_path / "ours"])


def test_an_interrupted_call_leaves_no_table_of_the_images_before(tmp_path, monkeypatch):
    images = Images(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), captions=["a cat", "a cat"])
    save_images(images, tmp_path / "ours", seed=0, about={})
    monkeypatch.setattr(saving, "save_sample", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_images(dataclasses.replace(images, captions=["a dog", "a dog"]), tmp_path / "ours", seed=0, about={})
    assert not (tmp_path / "ours/metadata.jsonl").exists()
    check_places([tmp_path / "ours"])


def test_a_teacher_with_a_null_class_is_compared_class_by_class(tmp_path, capsys):
    """The student's weights are the teacher's, so a column that differs has another class."""
    folder = tmp_path / "teacher"
    Pixel.tiny(size=64).network.save_pretrained(folder / "unet")
    DDIMScheduler.from_config(Pixel.tiny().scheduler_config).save_pretrained(folder / "scheduler")
    config = TeacherConfig(path=str(folder), null_class=3)
    family = load_teacher(config)
    origin = Origin(method="progressive", teacher=str(folder), teacher_options=config.options())
    student = export_pipeline(
        family, family.network, DDIM(family.schedule, family.schedule.grid(2)), tmp_path / "student", origin=origin
    )
    compare = ("--pipeline", student, "--num_images", 5, "--compare_steps", 2, "--compare")
    generate(*compare, "teacher", "--output", tmp_path / "both")
    for index in range(5):
        ours, theirs = np.split(np.asarray(Image.open(tmp_path / f"both/{index:06d}.png")).astype(int), 2, axis=1)
        assert abs(ours - theirs).max() <= 1
    with pytest.raises(SystemExit):
        generate(*compare, folder, "--output", tmp_path / "other")  # by its path alone it has one class more
    assert "which has 3 classes, got" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (3, "--class_labels: expected 0 to 2, the classes of .*teacher, got 5"),
        (None, "--class_labels: .*teacher .*takes none"),
    ],
)
def test_a_teacher_is_asked_whether_it_has_the_labels_before_the_student_is_sampled(tmp_path, classes, message):
    teacher = str(save_teacher(Pixel.tiny(num_classes=classes), tmp_path / "teacher"))
    with pytest.raises(ValueError, match=message):
        inference.open_teacher(str(tmp_path), teacher, Request(labels=[5]), 2, None, {})


def test_clips_of_unknown_length_are_sampled(tmp_path):
    """CogVideoX's call names no number of frames, nor its network a size."""
    cog_video_x().save_pretrained(tmp_path / "cog")
    generate("--pipeline", tmp_path / "cog", "--prompt", "a cat", "--num_images", 1, "--num_inference_steps", 1,
             "--output", tmp_path / "cog.png")  # fmt: skip
    assert (tmp_path / "cog.png").is_file()


def test_a_folder_of_other_files_gets_no_table_beside_them(tmp_path):
    (tmp_path / "photos").mkdir()
    check_places([tmp_path / "photos"])
    (tmp_path / "photos/.hidden").touch()
    check_places([tmp_path / "photos"])
    (tmp_path / "photos/cat.png").touch()
    with pytest.raises(ValueError, match=r"--output: expected a new folder or one of an earlier call, .*with cat\.png"):
        check_places([tmp_path / "photos"])


@pytest.mark.parametrize("flag", ["compare_steps", "compare_guidance_scale"])
def test_what_is_said_of_a_teacher_needs_one(tmp_path, capsys, flag):
    with pytest.raises(SystemExit):
        generate("--pipeline", "none", f"--{flag}", 2, "--output", tmp_path / "grid.png")
    assert f"--{flag}: expected --compare, which names the teacher, got none" in capsys.readouterr().err


def test_the_teacher_is_on_the_right_at_the_guidance_that_was_distilled(tmp_path, student, teacher):
    common, scale = ("--prompt", "a cat", "--num_images", 2), "--compare_guidance_scale"
    compare = ("--compare", "teacher", "--compare_steps", 3)
    for name, more in [("same", ()), ("explicit", (scale, 3.0)), ("other", (scale, 1.0))]:
        generate("--pipeline", student, *common, *compare, *more, "--output", tmp_path / name)
    generate("--pipeline", student, *common, "--output", tmp_path / "alone")
    alone, same, explicit, other = (
        Image.open(tmp_path / name / "000001.png") for name in ("alone", "same", "explicit", "other")
    )
    left, right = (0, 0, *alone.size), (alone.width, 0, 2 * alone.width, alone.height)
    assert same.size == (2 * alone.width, alone.height) and same.crop(left).tobytes() == alone.tobytes()
    assert same.tobytes() == explicit.tobytes() and same.crop(right).tobytes() != other.crop(right).tobytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--compare", "moved/away/teacher"), "--compare: .*teacher"),
        (("--compare", "embedded"), "--compare: expected a teacher of .*, got embedded, which takes no text"),
        (("--compare", "teacher", "--compare_steps", 1001), "--compare_steps: expected at most 1000, .*got 1001"),
    ],
)
def test_a_teacher_that_cannot_be_shown_is_said_before_images_are_made(
    tmp_path, student, monkeypatch, capsys, flags, message
):
    (tmp_path / "moved").mkdir()
    monkeypatch.chdir(tmp_path / "moved")
    monkeypatch.setattr(inference, "generate_images", lambda *arguments: pytest.fail("sampled"))
    with pytest.raises(SystemExit):
        generate("--pipeline", student, "--prompt", "a cat", *flags, "--output", tmp_path / "x.png")
    assert re.search(message, capsys.readouterr().err)


def test_clips_are_shown_beside_as_many_frames_of_the_teachers(monkeypatch):
    clips = Images(torch.zeros(1, 3, 5, 16, 32, dtype=torch.uint8))
    contract = Contract(call={"num_frames": 5, "height": 16}, origin=Origin(teacher="wan"))
    monkeypatch.setattr(inference, "read_contract", lambda folder: contract)
    monkeypatch.setattr(inference, "load_to_call", lambda config: Wan.tiny())
    monkeypatch.setattr(inference, "pipeline_under", lambda *opened: Wan.tiny().pipe)
    _, request = inference.open_teacher("student", "teacher", Request(prompts=["a cat"]), 3, None, {})
    assert (request.call["num_frames"], request.call["num_inference_steps"]) == (5, 3)
    assert side_by_side(clips, clips).pixels.shape == (1, 3, 5, 16, 64)


@pytest.mark.parametrize(
    ("family", "negative", "expected"),
    [
        (ZImage, None, {"guidance_scale": 1.5}),
        (QwenImage, None, {"true_cfg_scale": 2.5, "negative_prompt": " "}),
        (SD, "mud", {"guidance_scale": 2.5}),
    ],
)
def test_the_teacher_beside_a_student_is_asked_for_guidance_in_its_pipelines_words(
    monkeypatch, family, negative, expected
):
    teacher = family.tiny()
    monkeypatch.setattr(inference, "read_contract", lambda folder: Contract(origin=Origin(teacher="it")))
    monkeypatch.setattr(inference, "load_to_call", lambda config: teacher)
    monkeypatch.setattr(inference, "pipeline_under", lambda *opened: teacher.pipe)
    asked = Request(prompts=["a cat"], negative_prompt=negative)
    _, request = inference.open_teacher("student", "teacher", asked, 3, 2.5, {})
    assert request.call == {"num_inference_steps": 3, **expected}


def test_the_teacher_beside_a_student_is_guided_by_the_rule_of_the_distillation(tmp_path, teacher):
    """The picture is that of the teacher's own pipeline, asked for the rescaling."""
    family = SD.tiny()
    sampler = DDIM(family.schedule, family.schedule.grid(1))
    options = TeacherConfig(path=teacher, guidance_rescale=0.7).options()
    origin = Origin(teacher=teacher, guidance_distilled=9.0, teacher_options=options)
    student = export_pipeline(family, family.network, sampler, tmp_path / "student", origin=origin)
    compare = ("--prompt", "a cat", "--num_images", 1, "--compare", "teacher", "--compare_steps", 2)
    generate("--pipeline", student, *compare, "--output", tmp_path / "out")
    both = Image.open(tmp_path / "out/000000.png")
    found = np.asarray(both.crop((both.height, 0, *both.size))).astype(int)
    pipeline = teacher_pipeline(TeacherConfig(path=teacher), "DDIM")

    def drawn(**call):
        generator = torch.Generator().manual_seed(int(both.text["generator_seed"]))
        image = pipeline("a cat", num_inference_steps=2, guidance_scale=9.0, generator=generator, **call).images[0]
        return np.asarray(image).astype(int)

    assert abs(found - drawn(guidance_rescale=0.7)).max() <= 1 < abs(found - drawn()).max()


def test_a_teacher_under_a_solver_paints_at_its_sections_size_whatever_its_precision(teacher):
    config = TeacherConfig(path=teacher, resolution=32, dtype="bfloat16")
    images = teacher_pipeline(config, "UniPC")("a cat", num_inference_steps=1, output_type="np").images
    assert images.shape == (1, 32, 32, 3) and images.std() > 0.01


@pytest.mark.filterwarnings("ignore:guidance_scale. got 3")  # on top of the guidance that is baked in
def test_guidance_leads_away_from_the_negative_prompt_on_both_sides(tmp_path, student, teacher):
    common = ("--pipeline", student, "--prompt", "a cat", "a dog", "--guidance_scale", 3.0, "--batch_size", 1)
    compare = ("--compare", "teacher", "--compare_steps", 2)
    for name, more in [("plain", compare), ("mud", (*compare, "--negative_prompt", "mud"))]:
        generate(*common, *more, "--output", tmp_path / name)
    plain, mud = (np.asarray(Image.open(tmp_path / name / "000001.png")).astype(int) for name in ("plain", "mud"))
    half = plain.shape[1] // 2
    assert all((plain[:, side] != mud[:, side]).any() for side in (slice(half), slice(half, None)))
    text = Image.open(tmp_path / "mud/000001.png").text
    assert (text["prompt"], text["negative_prompt"]) == ("a dog", "mud")
    assert "negative_prompt" not in Image.open(tmp_path / "plain/000001.png").text

    pipeline = StableDiffusionPipeline.from_pretrained(student, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    again = pipeline(
        "a dog", negative_prompt="mud", num_inference_steps=2, guidance_scale=3.0,
        generator=torch.Generator().manual_seed(int(text["generator_seed"])),
    ).images[0]  # fmt: skip
    for side in (slice(half), slice(half, None)):  # the student is the teacher, at DDIM's grid
        assert abs(np.asarray(again).astype(int) - mud[:, side]).max() <= 1


@pytest.mark.filterwarnings("ignore:guidance_scale. got 3")
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), r"expected --guidance_scale above 1: .*is called without guidance \(1\)"),
        (
            ("--guidance_scale", 3, "--compare", "teacher", "--compare_guidance_scale", 1),
            r"expected --compare_guidance_scale above 1: .*teacher.*is called without guidance \(1\)",
        ),
    ],
)
def test_a_negative_prompt_without_guidance_is_refused(tmp_path, student, more, message, capsys):
    with pytest.raises(SystemExit):
        generate(
            "--pipeline", student, "--prompt", "a cat", "--num_images", 1, "--negative_prompt", "mud", *more,
            "--output", tmp_path / "x.png",
        )  # fmt: skip
    assert re.search(message, capsys.readouterr().err) and not (tmp_path / "x.png").exists()


def test_pipelines_that_read_no_negative_prompt_say_so():
    request = Request(prompts=["a cat"], negative_prompt="mud", call={"guidance_scale": 3.0})
    embedded = SD.tiny()
    embedded.add_inputs(Inputs(w=(0.0, 2.0)))
    for pipeline, message in [
        (Flux.tiny().pipe, "it is called with true_cfg_scale 1; nothing reads it"),
        (Flux.tiny(guidance_embeds=False).pipe, "it is called with true_cfg_scale 1; nothing reads it"),
        (embedded.pipe, "guidance is an input of its network"),
        (DiT.tiny().pipe, r"it \(DiTPipeline\) takes none"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_negative_prompt(pipeline, "it", request, "--guidance_scale", request.call)
    check_negative_prompt(SD.tiny().pipe, "it", request, "--guidance_scale", request.call)


def test_a_flow_is_compared_by_its_own_scheduler_at_the_students_size_and_guidance(tmp_path):
    """FluxPipeline's own grid of two steps is the student's, which is the teacher here: both sides are one image."""
    family = Flux.tiny()  # of 16 pixels, where its pipeline paints 256 unless told; asked with a guidance of 3.5
    family.pipe.save_pretrained(tmp_path / "teacher")
    sampler = DDIM(family.schedule, family.schedule.grid(2))
    origin = Origin(teacher=str(tmp_path / "teacher"), guidance_distilled=1.0)
    student = export_pipeline(family, family.network, sampler, tmp_path / "student", origin=origin)
    generate(
        "--pipeline", student, "--prompt", "a cat", "--num_images", 1, "--compare", "teacher", "--compare_steps", 2,
        "--output", tmp_path / "out",
    )  # fmt: skip
    both = np.asarray(Image.open(tmp_path / "out/000000.png")).astype(int)
    assert both.shape == (16, 32, 3) and both.std() > 1
    assert abs(both[:, :16] - both[:, 16:]).max() <= 1


def test_a_flag_that_is_given_twice_adds_to_itself():
    args = make_parser().parse_args(
        ["generate", "--pipeline", "p", "--prompt", "a", "b", "--output", "x.png", "--class_labels", "1"]
        + ["--prompt", "c", "--output", "images", "--class_labels", "3"]
    )
    assert args.prompt == ["a", "b", "c"] and args.output == [Path("x.png"), Path("images")]
    assert args.class_labels == [1, 3]


def test_prompts_come_from_standard_input(monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO("\ufeffone\r\n  two \n\n".encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert collect_prompts(["zero"], "-") == ["zero", "one", "two"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"fine\nna\xefve\n", r"p\.txt:2: not UTF-8 \(byte 0xef\)"),
        ("a\nb".encode("utf-16"), r"p\.txt:1: not UTF-8 \(byte 0xff\)"),
        ("a\nb".encode("utf-16-le"), r"p\.txt:1: control character U\+0000"),
        (b"a\nred \x1b[31m\n", r"p\.txt:2: control character U\+001B"),
        (b"\n \n", r"p\.txt: no prompts in it"),
    ],
)
def test_odd_prompt_files_are_named_with_the_line(tmp_path, content, message):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        collect_prompts([], str(tmp_path / "p.txt"))


def test_odd_bytes_of_the_command_line_are_named():
    assert collect_prompts(["crème brûlée"], None) == ["crème brûlée"]
    with pytest.raises(ValueError, match=r"--prompt:1: not UTF-8 \(byte 0xff\)"):
        collect_prompts(["a cat", os.fsdecode(b"a \xff cat")], None)


def test_long_prompts_are_counted(tmp_path, student):
    with pytest.warns(UserWarning, match="1 of 2 prompts are longer than the text encoder's 77 tokens"):
        generate("--pipeline", student, "--prompt", "x" * 90, "ok", "--output", tmp_path / "a.png")


def test_a_request_must_fit_the_pipeline(tmp_path, student, capsys):
    family = Pixel.tiny()
    sampler = DDIM(family.schedule, family.schedule.grid(1))
    pixel = export_pipeline(family, family.network, sampler, tmp_path / "pixel")
    for arguments, message in [
        (("--pipeline", student), "generates images from text; give --prompt or --prompt_file"),
        (("--pipeline", pixel, "--prompt", "a cat"), "takes no text; give --class_labels"),
        (("--pipeline", pixel, "--compare", "teacher"), "names no teacher"),
        (("--pipeline", student, "--prompt_file", tmp_path / "none.txt"), "--prompt_file: no such file"),
        (("--pipeline", pixel, "--num_images", 0), "--num_images: expected at least 1, got 0"),
    ]:
        with pytest.raises(SystemExit):
            generate(*arguments, "--output", tmp_path / "x.png")
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_the_seed_alone_makes_the_images_of_a_pipeline_that_keeps_its_generators_to_itself(tmp_path):
    """REPORTS 1: SD3's pipeline does not hand them to its scheduler, which noises again in every step."""
    family = SD3.tiny()
    sampler = ConsistencySampler(family.schedule, family.schedule.grid(2))
    student = export_pipeline(family, family.network, sampler, tmp_path / "student")
    for name, size in (("four", 4), ("two", 2)):
        generate(
            "--pipeline", student, "--prompt", *"abcd", "--seed", 5, "--batch_size", size, "--output", tmp_path / name
        )
    for image in sorted((tmp_path / "four").glob("*.png")):
        assert image.read_bytes() == (tmp_path / "two" / image.name).read_bytes()


@pytest.mark.parametrize(
    ("file", "changed", "message"),
    [
        ("unet/config.json", {"norm_eps": []}, "a call of it fails: TypeError"),
        (
            "stepdistill.json",
            {"call": {"num_inference_step": 2}},
            "takes no argument 'num_inference_step'; did you mean",
        ),
    ],
)
def test_settings_with_which_no_call_works_are_a_sentence_with_the_folder(
    tmp_path, student, capsys, file, changed, message
):
    """Found by fuzzing: settings that fit the weights, and still do not work together."""
    folder = tmp_path / "pipeline"
    shutil.copytree(student, folder)
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changed))
    with pytest.raises(SystemExit) as left:
        generate("--pipeline", folder, "--prompt", "a cat", "--output", tmp_path / "a.png")
    printed = capsys.readouterr().err.replace("\n  ", " ")
    assert left.value.code == 2 and str(folder) in printed and message in printed


@pytest.mark.parametrize(("side", "times"), [(16, 4), (28, 3), (32, 2), (64, 1), (100, 1)])
def test_small_images_are_shown_enlarged_by_whole_pixels(side, times):
    images = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    grid = make_grid(images, columns=2, gap=0)
    assert grid.size == (2 * side * times, 2 * side * times)
    shown = torch.from_numpy(np.array(grid)).permute(2, 0, 1)[:, ::times, ::times]
    assert torch.equal(shown[:, :side, side:], to_uint8(images[1]))
    assert (shown[:, side:, side:] == 255).all()  # no fourth image
