"""What callers do by habit with a few-step student of a text teacher: it works, or a sentence says why not."""

import warnings

import numpy as np
import pytest
from PIL import Image

from stepdistill.cli import main
from stepdistill.diffusion.samplers import DDIM, ConsistencySampler
from stepdistill.export.contract import Contract, Origin
from stepdistill.export.habits import check_habits
from stepdistill.export.pipeline import export_pipeline, load_pipeline
from stepdistill.families.base import Inputs
from stepdistill.families.flux import Flux
from stepdistill.families.qwen_image import QwenImage
from stepdistill.families.sd import SD
from stepdistill.losses.consistency import skip_grid

SOLVER_STEPS = 20


def exported(folder, family, guidance_scale=1.0, **origin):
    sampler = ConsistencySampler(family.schedule, skip_grid(family.schedule, 4, SOLVER_STEPS))
    origin = Origin(method="lcm", teacher="faces", **origin)
    return export_pipeline(family, family.network, sampler, folder, origin=origin, guidance_scale=guidance_scale)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A student of four steps with guidance 2 baked in."""
    return exported(tmp_path_factory.mktemp("habits") / "pipeline", SD.tiny(), guidance_distilled=2.0)


@pytest.fixture(scope="module")
def scaled(tmp_path_factory):
    """A student that takes the guidance scale as an input, from 1 to 4."""
    family = SD.tiny()
    family.add_inputs(Inputs(w=(0.0, 3.0)))
    folder = tmp_path_factory.mktemp("scaled") / "pipeline"
    return exported(folder, family, 2.0, method_facts={"guidance_range": [1.0, 4.0]})


def generate(output, student, *arguments):
    main(["generate", "--pipeline", str(student), "--num_images", "1", "--output", str(output), *map(str, arguments)])
    with Image.open(output) as picture:
        return np.asarray(picture)


def refusal(capsys, output, student, *arguments):
    with pytest.raises(SystemExit) as leaving:
        generate(output, student, *arguments)
    assert leaving.value.code == 2 and not output.exists()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("stepdistill generate: ")]
    assert len(lines) == 1
    return lines[0]


def test_guidance_on_top_of_guidance_is_done_and_told(tmp_path, student):
    with pytest.warns(UserWarning, match=r"guidance_scale: got 7\.5, but a scale of 2 is baked into this student"):
        guided = generate(tmp_path / "a.png", student, "--prompt", "a face", "--guidance_scale", 7.5)
    assert not np.array_equal(guided, generate(tmp_path / "b.png", student, "--prompt", "a face"))


def test_guidance_out_of_an_inputs_range_is_refused(tmp_path, scaled, capsys):
    message = refusal(capsys, tmp_path / "a.png", scaled, "--prompt", "a face", "--guidance_scale", 7.5)
    assert "guidance_scale: got 7.5, but this student was trained for 1 to 4" in message
    generate(tmp_path / "b.png", scaled, "--prompt", "a face", "--guidance_scale", 3)


def test_a_negative_prompt_that_nothing_reads_is_refused_or_told(tmp_path, student, capsys):
    message = refusal(capsys, tmp_path / "a.png", student, "--prompt", "a face", "--negative_prompt", "a hat")
    assert "--negative_prompt: expected --guidance_scale above 1" in message
    with pytest.warns(UserWarning, match="negative_prompt: nothing reads it in a call without guidance"):
        load_pipeline(student)("a face", negative_prompt="a hat", output_type="np")


def test_other_numbers_of_steps_are_done_and_told_and_too_many_refused(tmp_path, student, capsys):
    with pytest.warns(UserWarning, match=r"--num_inference_steps: got 8; .* was made for 4"):
        generate(tmp_path / "a.png", student, "--prompt", "a face", "--num_inference_steps", 8)
    with pytest.warns(UserWarning, match="got 2000"):
        message = refusal(capsys, tmp_path / "b.png", student, "--prompt", "a face", "--num_inference_steps", 2000)
    assert "2000" in message and "cannot be larger than" in message


@pytest.mark.parametrize("prompt", ["", "a face with a zxqv \N{GRINNING FACE}"])
def test_an_empty_prompt_and_an_unknown_word_are_prompts(tmp_path, student, prompt):
    assert generate(tmp_path / "a.png", student, "--prompt", prompt).std() > 0


def test_a_prompt_of_200_words_is_cut_and_told(tmp_path, student):
    words = "a face with green hair " * 40
    with pytest.warns(UserWarning, match="longer than the text encoder's 77 tokens"):
        generate(tmp_path / "a.png", student, "--prompt", words)


def test_a_student_in_stages_takes_another_number_of_steps(tmp_path):
    family = SD.tiny()
    sampler = DDIM(family.schedule, family.schedule.grid(4))
    origin = Origin(method="progressive", teacher="faces")
    folder = export_pipeline(family, family.network, sampler, tmp_path / "pipeline", origin=origin)
    with pytest.warns(UserWarning, match="was made for 4"):
        generate(tmp_path / "a.png", folder, "--prompt", "a face", "--num_inference_steps", 8)


def test_guidance_is_told_in_the_words_of_the_pipeline():
    """Z-Image counts from 0; Qwen-Image's is another argument, which does nothing without a negative prompt."""
    origin = Origin(method="dmd2", teacher="t", guidance_distilled=4.0)
    z_image = Contract(call={"guidance_scale": 0.0}, origin=origin)
    qwen = Contract(call={"true_cfg_scale": 1.0}, origin=origin)
    for scale in (1.0, 4.0):
        with pytest.warns(UserWarning, match=rf"guidance_scale: got {scale:g}, .* guided twice, .* or give 0$"):
            check_habits(z_image, {"guidance_scale": scale, "negative_prompt": "mud"})
    with pytest.warns(UserWarning, match="negative_prompt: nothing reads it"):
        check_habits(z_image, {"guidance_scale": 0.0, "negative_prompt": "mud"})
    with pytest.warns(UserWarning, match=r"true_cfg_scale: got 4, .* guided twice, .* or give 1$"):
        check_habits(qwen, {"true_cfg_scale": 4.0, "negative_prompt": " "})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_habits(qwen, {"true_cfg_scale": 4.0, "guidance_scale": 4.0})
        check_habits(z_image, {"guidance_scale": 0.0})


def test_a_negative_prompt_is_read_where_the_pipelines_own_call_guides(tmp_path, capsys):
    QwenImage.tiny().pipe.save_pretrained(tmp_path / "qwen")
    generate(tmp_path / "a.png", tmp_path / "qwen", "--prompt", "a cat", "--negative_prompt", "mud",
             "--num_inference_steps", 1)  # fmt: skip
    Flux.tiny().pipe.save_pretrained(tmp_path / "flux")
    message = refusal(capsys, tmp_path / "b.png", tmp_path / "flux", "--prompt", "a cat", "--negative_prompt", "mud")
    assert message.endswith("is called with true_cfg_scale 1; nothing reads it")
