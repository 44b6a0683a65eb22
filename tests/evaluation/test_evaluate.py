"""Evaluation end to end on tiny pipelines: the same numbers however it is run, settings that travel, bad input."""

import functools
import json
import os
import tarfile

import fsspec
import numpy as np
import PIL.Image
import pyarrow.parquet
import pytest
import torch
from accelerate import PartialState
from contracts.cases import save_teacher
from diffusers import DDIMScheduler, DiTPipeline, UNet2DModel

from stepdistill.assets import FASHION
from stepdistill.cli import main
from stepdistill.evaluation.compare import compare
from stepdistill.evaluation.cost import flops_per_image, parameter_count
from stepdistill.evaluation.evaluate import evaluate
from stepdistill.evaluation.extraction import CHUNK
from stepdistill.evaluation.image_set import ImageSet
from stepdistill.evaluation.networks import Networks
from stepdistill.evaluation.protocol import PRESETS, Protocol, read_protocol
from stepdistill.evaluation.reference import Reference
from stepdistill.evaluation.sources import FileSource, PipelineSource, describe_pipeline, read_captions
from stepdistill.evaluation.suite import MetricSuite
from stepdistill.evaluation.summary import lines
from stepdistill.families.pixel import Pixel
from stepdistill.families.qwen_image import QwenImage
from stepdistill.families.sd import SD
from stepdistill.features.classifier import SmallConvNet
from stepdistill.inference.rows import fixed_rows
from stepdistill.inference.sampling import Images, class_count, sample_images
from stepdistill.pipelines.class_conditional import ClassConditionalPipeline

EVERYTHING = (
    "fd",
    "kd",
    "precision_recall",
    "density_coverage",
    "spread",
    "accuracy",
    "inception_score",
    "cmmd",
    "copying",
)


def evaluate_pipeline(piped, suite, *, metrics=("fd",), work=None, **sampling):
    return evaluate(PipelineSource(pipeline=piped, **sampling), suite, metrics=metrics, name="pipeline", work=work)


def evaluate_files(images, suite, metrics=("fd",), work=None):
    return evaluate(FileSource(images), suite, metrics=metrics, name="images", work=work)


TIMED = ("seconds_per_image", "peak_memory_mb", "timing")


def pipeline(seed=0, **options):
    family = Pixel.tiny(seed, **options)
    for name, tensor in family.network.state_dict().items():
        if name.startswith("class_embedding"):
            tensor.mul_(5)
    scheduler = DDIMScheduler.from_config(family.scheduler_config, timestep_spacing="trailing")
    return ClassConditionalPipeline(family.network, scheduler, null_class=family.null_class, num_inference_steps=2)


def archive(path, count=120, size=8, channels=1, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, size, size, channels), dtype=np.uint8)
    np.savez(path, images=pixels[..., 0] if channels == 1 else pixels, labels=np.arange(count) % 3)
    return path


def pngs(folder, count=6, size=8, mode="L"):
    folder.mkdir(parents=True)
    for index in range(count):
        noise = np.random.default_rng(index).integers(0, 256, (size, size, len(mode)), dtype=np.uint8)
        PIL.Image.fromarray(noise.squeeze()).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("features")
    SmallConvNet(num_classes=3, width=4, num_features=8).eval().save_pretrained(folder)
    return folder


@pytest.fixture
def suite(tmp_path, network):
    return MetricSuite.open(str(network), str(archive(tmp_path / "real.npz")))


def plain(result):
    """What must not depend on how a result was made."""
    return {key: value for key, value in result.items() if key not in TIMED}


# ------------------------------------------------------------------------------------- the same, however it is run


def test_samples_of_guided_diffusion_give_the_number_of_our_own_files(tmp_path, network):
    """REPORTS 19: ``arr_0`` and ``arr_1``, as the images that are measured and as the reference."""
    numbers = []
    for name in ("ours", "adm"):
        for role, seed in (("real", 0), ("made", 1)):
            with np.load(archive(tmp_path / f"{name}-{role}.npz", seed=seed)) as arrays:
                images, labels = arrays["images"], arrays["labels"]
            if name == "adm":
                np.savez(tmp_path / f"adm-{role}.npz", images[..., None], labels)
        opened = MetricSuite.open(str(network), str(tmp_path / f"{name}-real.npz"))
        result = evaluate_files(ImageSet(tmp_path / f"{name}-made.npz"), opened, ("fd", "accuracy", "precision_recall"))
        numbers.append([result[key] for key in ("fd", "accuracy", "precision", "recall")])
        assert opened.reference.about["kind"] == "images" and len(opened.reference.labels) == 120
    assert numbers[0] == numbers[1] and numbers[0][0] > 0


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_images_are_the_same_bytes_for_every_batch_size(guidance_scale):
    call = {"guidance_scale": guidance_scale}
    sets = [sample_images(pipeline(), 70, batch_size=b, num_classes=3, call=call, rows=16) for b in (7, 64)]
    assert torch.equal(sets[0].pixels, sets[1].pixels)
    assert {images.calls for images in sets} == {2 * guidance_scale}  # two steps; a guided call counts as two


def test_a_part_of_a_set_is_that_part():
    whole = sample_images(pipeline(), 20, num_classes=3, rows=16)
    part = sample_images(pipeline(), 6, num_classes=3, first=9, rows=16)
    assert torch.equal(whole.pixels[9:15], part.pixels) and torch.equal(whole.labels[9:15], part.labels)


def test_fixed_rows_change_the_order_of_nothing():
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4, num_class_embeds=3,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    ).eval()  # fmt: skip
    x, labels = torch.randn(37, 1, 8, 8), torch.arange(37) % 3
    with torch.no_grad():
        expected = unet(x, torch.tensor(5), class_labels=labels).sample
        with fixed_rows(unet, 16):
            found = unet(x, torch.tensor(5), class_labels=labels).sample
    torch.testing.assert_close(found, expected)
    assert "forward" not in vars(unet)


class Rotated(torch.nn.Module):
    """Takes cosines and sines of its places, as the networks of Hunyuan-DiT and CogVideoX do."""

    def forward(self, hidden_states, image_rotary_emb):
        cosines, sines = image_rotary_emb
        return hidden_states * cosines + hidden_states.flip(1) * sines


def test_what_all_rows_share_is_not_cut_if_it_is_as_long_as_the_batch():
    network, x, angles = Rotated(), torch.randn(6, 6), torch.randn(6)
    expected = network(x, image_rotary_emb=(angles.cos(), angles.sin()))
    with fixed_rows(network, 4):
        assert torch.equal(network(hidden_states=x, image_rotary_emb=(angles.cos(), angles.sin())), expected)


def test_results_are_equal_for_every_batch_size(suite):
    results = [evaluate_pipeline(pipeline(), suite, metrics=EVERYTHING, count=70, batch_size=b) for b in (7, 64)]
    assert plain(results[0]) == plain(results[1])


def in_two_processes(network, real, output):
    PartialState(cpu=True)
    torch.set_num_threads(1)  # accelerate has just set another number
    result = evaluate_pipeline(
        pipeline(), MetricSuite.open(network, real), metrics=("fd", "accuracy"), count=60, batch_size=7
    )
    (output / f"{PartialState().process_index}.json").write_text(json.dumps(plain(result)))


def test_two_processes_give_the_result_of_one(tmp_path, network, suite, monkeypatch):
    from accelerate import debug_launcher

    monkeypatch.setattr(
        "stepdistill.evaluation.extraction.CHUNK", 25
    )  # three chunks for two processes, the last one short
    one = plain(evaluate_pipeline(pipeline(), suite, metrics=("fd", "accuracy"), count=60))
    PartialState._reset_state()
    debug_launcher(in_two_processes, (str(network), str(tmp_path / "real.npz"), tmp_path), num_processes=2)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == json.loads(json.dumps(one))


def test_an_interrupted_evaluation_goes_on_and_ends_the_same(tmp_path, suite, monkeypatch):
    monkeypatch.setattr("stepdistill.evaluation.extraction.CHUNK", 20)
    expected = evaluate_pipeline(pipeline(), suite, count=50)
    calls, paint = [], ClassConditionalPipeline.__call__

    @functools.wraps(paint)
    def stopping_at_the_third(*args, **kwargs):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return paint(*args, **kwargs)

    monkeypatch.setattr(ClassConditionalPipeline, "__call__", stopping_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        evaluate_pipeline(pipeline(), suite, count=50, work=tmp_path / "work")
    assert len(list(tmp_path.glob("work/*/chunk-*.safetensors"))) == 2
    calls.clear()
    found = evaluate_pipeline(pipeline(), suite, count=50, work=tmp_path / "work")
    assert len(calls) == 1
    assert plain(found) == plain(expected)


def test_chunks_of_another_setting_are_not_used(tmp_path, suite):
    for seed in (0, 1):
        evaluate_pipeline(pipeline(), suite, count=10, seed=seed, work=tmp_path / "work")
    evaluate_pipeline(pipeline(1), suite, count=10, work=tmp_path / "work")
    evaluate_pipeline(pipeline(), suite, count=10, call={"guidance_scale": 2.0}, work=tmp_path / "work")
    assert len(list(tmp_path.glob("work/*/chunk-*.safetensors"))) == 4


def test_chunks_of_other_images_in_the_same_files_are_not_used(tmp_path, suite):
    made, work = archive(tmp_path / "made.npz", 30, seed=1), tmp_path / "work"
    first, again = (evaluate_files(ImageSet(made), suite, work=work)["fd"] for _ in range(2))
    assert first == again and len(list(work.glob("*/chunk-*.safetensors"))) == 1
    archive(made, 30, seed=2)
    other = evaluate_files(ImageSet(made), suite, work=work)["fd"]
    assert other == evaluate_files(ImageSet(made), suite)["fd"] != first


def as_tar(folder):
    with tarfile.open(folder.with_suffix(".tar"), "w") as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, file.name)
    return folder.with_suffix(".tar")


def as_parquet(folder):
    cells = [{"bytes": file.read_bytes(), "path": file.name} for file in sorted(folder.glob("*.png"))]
    pyarrow.parquet.write_table(pyarrow.table({"image": cells}), folder.with_suffix(".parquet"))
    return folder.with_suffix(".parquet")


@pytest.mark.parametrize("form", [None, as_tar, as_parquet], ids=["folder", "tar", "parquet"])
def test_a_set_of_files_is_another_once_one_of_them_was_written_again(tmp_path, form):
    folder = pngs(tmp_path / "some")
    path = folder if form is None else form(folder)
    before = ImageSet(path).fingerprint()
    (tmp_path / "some" / "result.json").write_text("{}")  # no image
    assert ImageSet(path).fingerprint() == before
    os.utime(folder / "3.png" if form is None else path, ns=(0, 0))
    assert ImageSet(path).fingerprint() != before


def test_a_set_of_files_is_another_with_other_captions(tmp_path):
    folder, found = pngs(tmp_path / "some"), []
    for text in ("a", "a", "b"):
        rows = [{"file_name": f"{i}.png", "text": f"{text} {i}"} for i in range(6)]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        found.append(ImageSet(folder))
    first, same, other = (images.fingerprint() for images in found)
    assert first == same != other


def test_a_pipeline_is_another_with_another_decoder_or_text_encoder():
    piped = SD.tiny().pipe
    seen = [describe_pipeline(piped, {})]
    for part in (piped.vae, piped.text_encoder):
        with torch.no_grad():
            next(part.parameters()).mul_(2)
        seen.append(describe_pipeline(piped, {}))
    assert seen[0] != seen[1] != seen[2] != seen[0]
    assert len({about["weights_sha256"] for about in seen}) == 1


def test_a_damaged_chunk_is_made_again(tmp_path, suite):
    expected = evaluate_pipeline(pipeline(), suite, count=10, work=tmp_path / "work")
    (chunk,) = tmp_path.glob("work/*/chunk-*.safetensors")
    chunk.write_bytes(chunk.read_bytes()[:-9])
    assert plain(evaluate_pipeline(pipeline(), suite, count=10, work=tmp_path / "work")) == plain(expected)


def test_each_image_passes_the_feature_network_once(suite, monkeypatch):
    seen = []
    embed = SmallConvNet.embed
    monkeypatch.setattr(SmallConvNet, "embed", lambda self, images: (seen.append(len(images)), embed(self, images))[1])
    evaluate_pipeline(pipeline(), suite, metrics=EVERYTHING, count=70)
    assert sum(seen) == 70


# ----------------------------------------------------------------------------------------------------- what it says


def test_a_set_measured_against_itself_is_perfect(tmp_path, network):
    suite = MetricSuite.open(str(network), str(archive(tmp_path / "real.npz")))
    result = evaluate_files(ImageSet(tmp_path / "real.npz"), suite, metrics=EVERYTHING)
    assert result["fd"] == pytest.approx(0, abs=1e-9) and result["mmd"] == pytest.approx(0, abs=1e-9)
    assert result["precision"] == result["recall"] == result["coverage"] == 1
    assert result["spread"] == pytest.approx(1) and result["authenticity"] == result["nearest_min"] == 0
    dark = suite.score(Images(ImageSet(tmp_path / "real.npz").read(range(120)).pixels // 4), ("kd",))
    assert abs(result["kd"]) < 0.1 * dark["kd"] and dark["kd_low"] < dark["kd"] < dark["kd_high"]


def test_class_means_are_caught_though_their_accuracy_is_perfect():
    """The embedded classifier judges the mean image of each class that it is surest of."""
    suite = MetricSuite.open("embedded", "embedded", max_images=1000)
    files = ImageSet(FASHION / "train_subset.npz", limit=2000)
    held_out = files.read(range(1000, 2000))
    logits = suite.logits(suite.features.extract(held_out.pixels))
    best = [int(logits[:, label].argmax()) for label in range(10)]
    labels = torch.arange(1000) % 10
    collapsed = Images(held_out.pixels[torch.tensor(best)][labels], labels)
    fresh = Images(held_out.pixels, held_out.labels)
    metrics = ("precision_recall", "density_coverage", "spread", "accuracy")
    bad, good = suite.score(collapsed, metrics), suite.score(fresh, metrics)
    assert bad["accuracy"] == 1 > good["accuracy"]
    for name, low, high in [("recall", 0.05, 0.5), ("coverage", 0.1, 0.85), ("spread", 1e-6, 0.8)]:
        assert bad[name] < low and good[name] > high


def test_intervals_of_means_are_as_wide_as_fresh_samples_spread():
    from stepdistill.evaluation.metrics.bootstrap import mean_interval
    from stepdistill.evaluation.metrics.kernel import cmmd, cmmd_influence, kernel_distance, kernel_influence

    def sample(seed, shift):
        return torch.randn(300, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift

    def kd(real, fake):
        return kernel_distance(real, fake, subsets=1, subset_size=300).mean

    real = sample(999, 0.0)
    for shift, value, pull in ((0.3, kd, kernel_influence), (0.6, kd, kernel_influence), (0.6, cmmd, cmmd_influence)):
        fresh = torch.tensor([value(real, sample(s, shift)) for s in range(80)])
        width = (fresh.quantile(0.975) - fresh.quantile(0.025)).item()
        found = [mean_interval(pull(real, sample(s, shift))) for s in (101, 102, 103)]
        assert sum(i.high - i.low for i in found) / 3 == pytest.approx(width, rel=0.4)
    flips = (torch.rand(400, generator=torch.Generator().manual_seed(5)) < 0.3).double()
    low, high, _ = mean_interval(flips)
    assert high - low == pytest.approx(2 * 1.96 * (0.3 * 0.7 / 400) ** 0.5, rel=0.15)


def test_cost_is_counted(suite):
    piped = pipeline()
    one, guided = (flops_per_image(piped, {"guidance_scale": g}) for g in (1.0, 2.0))
    assert guided == 2 * one and flops_per_image(piped, {"num_inference_steps": 4}) == 2 * one
    assert parameter_count(piped) == sum(p.numel() for p in piped.unet.parameters())
    result = evaluate_pipeline(piped, suite, count=40, batch_size=10)
    assert result["calls"] == 2
    assert result["seconds_per_image"] > 0 and result["peak_memory_mb"] > 10


def test_flops_of_known_layers_are_two_a_multiply_add(monkeypatch):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    q = torch.randn(1, 2, 5, 4)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert counter.get_total_flops() == 2 * (2 * 2 * 5 * 5 * 4)


def test_a_result_holds_what_its_numbers_depend_on(suite):
    """RELIABILITY row 33: the result records the number of images, the feature network's hash and its resizing."""
    result = evaluate_pipeline(pipeline(), suite, count=10)
    setting, subject = result["setting"], result["subject"]
    assert setting["num_samples"] == 10 and setting["features"]["sha256"] == suite.features.sha256
    assert "preprocessing" in setting["features"]
    assert setting["reference"]["images"] == 120 and len(setting["reference"]["sha256"]) == 64
    assert {"torch", "diffusers", "stepdistill", "python"} <= setting["versions"].keys()
    assert subject["scheduler"] == "DDIMScheduler" and len(subject["weights_sha256"]) == 64
    assert evaluate_pipeline(pipeline(1), suite, count=10)["subject"]["weights_sha256"] != subject["weights_sha256"]
    json.dumps(result)


def test_compare_says_what_chance_does_not_allow_to_say():
    setting = {"num_samples": 10, "seed": 0}
    row = {"name": "a", "fd": 1.0, "fd_low": 0.8, "fd_high": 1.2, "recall": 0.5, "recall_low": 0.4, "recall_high": 0.6}
    a, b = row | {"setting": setting}, row | {"name": "b", "fd": 1.1, "fd_low": 0.9, "fd_high": 1.3, "setting": setting}
    better = b | {"recall": 0.8, "recall_low": 0.7, "recall_high": 0.9}
    assert "fd: a 1, b 1.1: not distinguishable" in compare([b, a])
    assert "recall: b 0.8, a 0.5: b is better" in compare([a, better])
    with pytest.raises(ValueError, match="not comparable: num_samples is 10 in 'a', 20 in 'b'"):
        compare([a, b | {"setting": {"num_samples": 20}}])


def test_images_are_compared_with_a_pipeline_on_the_same_captions(tmp_path):
    prompts = ["a cat", "a dog", "a bird"]
    piped = PipelineSource(pipeline=SD.tiny().pipe, count=3, captions=prompts)
    folder, settings = pngs(tmp_path / "some", 3), [piped.setting()]
    for texts in (prompts, [*prompts[:2], "a fish"]):
        rows = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(texts)]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        settings.append(FileSource(ImageSet(folder)).setting())
    row = {"clip_score": 20.0, "clip_score_low": 19.0, "clip_score_high": 21.0}
    first, same, other = ({"name": name, "setting": found, **row} for name, found in zip("abc", settings, strict=True))
    assert "clip_score: a 20, b 20: not distinguishable" in compare([first, same])
    with pytest.raises(ValueError, match="not comparable: captions is '.*' in 'b', '.*' in 'c'"):
        compare([same, other])


# ------------------------------------------------------------------------------------------------------- protocols


@pytest.mark.parametrize("file", sorted(PRESETS.glob("*.yaml")), ids=lambda file: file.stem)
def test_presets_are_whole_once_what_they_need_is_given(file):
    from stepdistill.evaluation.metrics.table import METRICS

    needs = {key: "x" for key in ("reference", "captions")}
    protocol, about = read_protocol(file.stem, {**needs, "seed": None})
    assert set(protocol.metrics) <= METRICS.keys()
    assert about["overridden"].keys() <= {"reference", "captions"}
    if protocol.needs:
        with pytest.raises(ValueError, match=f"{file.stem}.*give --"):
            read_protocol(file.stem, {})


def test_a_flag_in_place_of_the_protocols_is_said():
    protocol, about = read_protocol("embedded", {"num_samples": 100, "seed": 0, "guidance_scale": None})
    assert (protocol.num_samples, protocol.seed) == (100, 0)
    assert about == {"name": "embedded", "overridden": {"num_samples": [5000, 100]}}
    with pytest.raises(ValueError, match="protocol: 'embeded' is unknown; did you mean 'embedded'"):
        read_protocol("embeded", {})


def test_images_bring_the_captions_that_a_protocol_needs():
    assert read_protocol("coco30k", {"reference": "x"}, of_files=True)[0].captions is None


def test_a_teacher_is_asked_for_no_more_steps_than_it_has(tmp_path, capsys):
    steps = ["--solver", "Heun", "--num_inference_steps", "1001", "--output", str(tmp_path / "result.json")]
    with pytest.raises(SystemExit):
        main(["evaluate", "--teacher", "embedded", *steps])
    assert "num_inference_steps: expected at most 1000, on which embedded was trained" in capsys.readouterr().err


def test_a_teacher_is_asked_for_guidance_in_the_words_of_its_pipeline(tmp_path, monkeypatch, capsys):
    save_teacher(QwenImage.tiny(), tmp_path / "teacher")
    calls = []
    monkeypatch.setattr("stepdistill.evaluation.evaluate.run_protocol", lambda *args, call, **_: calls.append(call))
    monkeypatch.setattr("stepdistill.evaluation.summary.summary", str)
    asked = [str(tmp_path / "teacher"), "--output", str(tmp_path / "result.json"), "--num_inference_steps", "2"]
    main(["evaluate", "--teacher", *asked, "--guidance_scale", "4"])
    main(["evaluate", "--pipeline", *asked, "--guidance_scale", "1"])
    assert calls[0] == {"num_inference_steps": 2, "true_cfg_scale": 4.0, "negative_prompt": " "}
    assert calls[1] == {"num_inference_steps": 2, "guidance_scale": 1.0}
    with pytest.raises(SystemExit):
        main(["evaluate", "--pipeline", *asked, "--guidance_scale", "4"])
    assert "guidance_scale: expected none, since QwenImagePipeline reads true_cfg_scale" in capsys.readouterr().err


def test_the_console_measures_pipeline_teacher_and_folder(tmp_path, network, capsys):
    real = archive(tmp_path / "real.npz", 60, 28)
    common = ["--features", str(network), "--reference", str(real), "--metrics", "fd", "recall"]
    common[-2:] = ["fd", "precision_recall"]
    for name, subject in [
        ("teacher", ["--teacher", "embedded", "--solver", "DDIM", "--num_inference_steps", "1"]),
        ("folder", ["--images", str(pngs(tmp_path / "generated", 12, 28))]),
    ]:
        output = tmp_path / f"{name}.json"
        main(["evaluate", *subject, *common, "--num_samples", "12", "--output", str(output)])
        result = json.loads(output.read_text())
        assert result["protocol"]["overridden"]["num_samples"] == [5000, 12]
        assert ("flops_per_image" in result) == (name == "teacher")
        assert result["fd"] > 0 and "recall_low" in result and result["setting"]["num_samples"] == 12
        assert not output.with_suffix(".work").exists()
        said = capsys.readouterr()
        shown = {tuple(row.split()) for row in said.out.splitlines()}  # the table; the JSON is in the file alone
        assert {tuple(" ".join(line).split()) for line in lines(result)} < shown and "{" not in said.out
        assert said.out.endswith(f"result: {output}\n")
        assert "num_samples: 12 overrides 5000 of protocol 'embedded'" in said.err
    main(["compare", str(tmp_path / "teacher.json"), str(tmp_path / "folder.json")])
    assert "fd: " in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- references


def test_a_written_reference_gives_every_number_again(tmp_path, network, suite):
    suite.statistics().write(tmp_path / "statistics.npz")
    again = MetricSuite.open(str(network), str(tmp_path / "statistics.npz"))
    images = ImageSet(archive(tmp_path / "fake.npz", 90, seed=1))
    results = [evaluate_files(images, each, metrics=EVERYTHING) for each in (suite, again)]
    assert results[0]["setting"]["reference"]["sha256"] == results[1]["setting"]["reference"]["sha256"]
    for key, value in results[0].items():
        if isinstance(value, float):
            assert results[1][key] == pytest.approx(value, rel=1e-6), key


def test_adms_file_brings_images_for_recall(tmp_path, network):
    suite = MetricSuite.open(str(network), str(archive(tmp_path / "real.npz")))
    pixels = np.load(tmp_path / "real.npz")["images"][..., None]
    mean, cov = suite.reference.moments.mean.numpy(), suite.reference.moments.cov.numpy()
    np.savez(tmp_path / "adm.npz", mu=mean, sigma=cov, arr_0=pixels, mu_s=mean, sigma_s=cov)
    suite.features.name = "inception"
    read = Reference.of_statistics(suite.features, tmp_path / "adm.npz", 100)
    assert read.rows.shape == (100, 8)
    assert torch.equal(read.moments.mean, suite.reference.moments.mean)


def test_a_reference_at_an_address_is_that_of_its_files(tmp_path, network, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    system, folder = fsspec.filesystem("memory"), f"/{tmp_path.name}"
    images, packed = archive(tmp_path / "real.npz"), tmp_path / "real.tar"
    with tarfile.open(packed, "w") as tar:
        for file in sorted(pngs(tmp_path / "pngs").iterdir()):
            tar.add(file, file.name)
    suite = MetricSuite.open(str(network), str(images))
    suite.statistics().write(tmp_path / "statistics.npz")
    for file in (images, packed, tmp_path / "statistics.npz"):
        system.pipe_file(f"{folder}/{file.name}", file.read_bytes())
        here, there = (Reference.open(suite.features, spec) for spec in (str(file), f"memory://{folder}/{file.name}"))
        assert torch.equal(there.moments.cov, here.moments.cov) and there.about == here.about
    assert len(ImageSet(f"memory://{folder}/real.tar", limit=4)) == 4
    assert ImageSet(images.rename(tmp_path / "real?.npz")).path == f"{tmp_path}/real?.npz"  # no signature
    with pytest.raises(ValueError, match=r"^memory://.*/none\.npz: no such file$"):
        Reference.open(suite.features, f"memory://{folder}/none.npz")


def test_reference_images_are_fingerprinted(tmp_path, network):
    first, second = (MetricSuite.open(str(network), str(archive(tmp_path / f"{s}.npz", seed=s))) for s in (0, 1))
    assert first.reference.about["sha256"] != second.reference.about["sha256"]
    assert first.reference.about["shape"] == [1, 8, 8]


# -------------------------------------------------------------------------------------------------------- bad input


def test_too_few_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"few: expected at least 5000 images \(--num_samples\), got 6"):
        ImageSet(pngs(tmp_path / "few"), limit=5000)


def test_broken_files_are_named_at_once(tmp_path):
    folder = pngs(tmp_path / "some")
    (folder / "1.png").write_bytes(b"nonsense")
    (folder / "4.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 images cannot be read: .*\.png.*, .*\.png"):
        ImageSet(folder)
    whole = (folder / "2.png").read_bytes()
    for name in ("1.png", "4.png"):
        (folder / name).write_bytes(whole)
    (folder / "3.png").write_bytes(whole[: len(whole) // 2])  # a good header, and then nothing
    files = ImageSet(folder)
    with pytest.raises(ValueError, match=r"1 images cannot be read: .*3\.png"):
        files.read(range(6))


@pytest.mark.parametrize(("size", "mode", "named"), [(9, "L", "9x9 grey"), (8, "RGB", "8x8 colour")])
def test_images_that_differ_are_named(tmp_path, size, mode, named):
    folder = pngs(tmp_path / "mixed")
    pngs(tmp_path / "odd", 1, size, mode)
    (tmp_path / "odd" / "0.png").rename(folder / "odd.png")
    with pytest.raises(ValueError, match="expected images of one size .*; --size resizes") as error:
        ImageSet(folder)
    assert named in str(error.value) and "8x8 grey" in str(error.value) and "odd.png" in str(error.value)
    assert ImageSet(folder, size=8).shape[1:] == (8, 8)


def test_samples_unlike_the_reference_are_refused(tmp_path, network):
    """RELIABILITY row 33: images of another size."""
    other = MetricSuite.open(str(network), str(archive(tmp_path / "big.npz", size=16)))
    with pytest.raises(ValueError, match="images are 8x8 grey, the reference's are 16x16 grey: give --size"):
        evaluate_pipeline(pipeline(), other, count=4)
    assert evaluate_pipeline(pipeline(), other, count=4, size=16)["setting"]["size"] == 16


def test_metrics_that_cannot_be_had_are_refused_before_any_work(suite):
    for metrics, message in [
        ("fdd", "'fdd' is unknown; did you mean 'fd'"),
        ("fid", "'fid' is 'fd' on Inception's features; these are.*--features inception"),
        ("clip", "'clip' needs a CLIP: give --clip"),
    ]:
        with pytest.raises(ValueError, match=message):
            suite.check([metrics])
    suite.reference.rows = None
    with pytest.raises(ValueError, match="statistics only"):
        suite.check(["kd"])


def test_captions_are_counted_and_checked(tmp_path):
    file = tmp_path / "captions.txt"
    file.write_text("a red apple\na blue house\n", encoding="utf-8")
    assert read_captions(str(file), 2) == ["a red apple", "a blue house"]
    for content, count, message in [
        (b"a\nb\n", 3, "expected 3, one an image, got 2"),
        (b"a\n\nb\n", 2, "captions.txt:2 is empty"),
        (b"\xff\xfe\x00", 1, "not UTF-8"),
    ]:
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_captions(str(file), count)
    with pytest.raises(ValueError, match="no file or folder"):
        read_captions(str(tmp_path / "absent"), 1)


def test_classes_of_other_pipelines():
    class Network:
        config = {"num_embeds_ada_norm": 1000}

    class Piped:
        __call__ = DiTPipeline.__call__
        transformer, config = Network(), {}

    assert class_count(Piped()) == 1000
    assert class_count(pipeline()) == 3 and CHUNK == 500
    assert Protocol().num_samples == 5000


# -------------------------------------------------------------------------------------------------------- CLIP score


WORDS = ("a", "red", "blue", "apple", "house", "very")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP of the real classes in miniature: random weights, whole words as tokens."""
    import tokenizers
    import transformers

    folder = tmp_path_factory.mktemp("clip")
    vocabulary = {word: number for number, word in enumerate(("<|startoftext|>", "<|endoftext|>", "[UNK]", *WORDS))}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[("<|startoftext|>", 0), ("<|endoftext|>", 1)]
    )
    marks = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **marks).save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(vocabulary), "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={**text, "pad_token_id": 1},
        vision_config={**small, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        model.text_projection.weight.neg_()  # this seed's scores are negative, where torchmetrics says 0
    model.save_pretrained(folder)
    square = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    transformers.CLIPImageProcessor(**square).save_pretrained(folder)
    return folder


def torchmetrics_score(folder, pixels, captions):
    """torchmetrics' CLIPScore on the same weights; it wants tensors where transformers 5 gives outputs."""
    import transformers
    from torchmetrics.multimodal.clip_score import CLIPScore

    class Unwrapped(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.config = model, model.config

        def get_image_features(self, pixels):
            output = self.model.get_image_features(pixels)
            return output if isinstance(output, torch.Tensor) else output.pooler_output

        def get_text_features(self, ids, mask):
            output = self.model.get_text_features(ids, mask)
            return output if isinstance(output, torch.Tensor) else output.pooler_output

    def processor(text=None, images=None, **options):
        if images is None:
            return transformers.AutoTokenizer.from_pretrained(folder)(text, **options)
        del options["padding"]
        return transformers.AutoImageProcessor.from_pretrained(folder)(images=images, **options)

    model = Unwrapped(transformers.CLIPModel.from_pretrained(folder).eval())
    metric = CLIPScore(model_name_or_path=lambda: (model, processor))
    metric.update(pixels, captions)
    return metric.compute().item()


def test_clip_score_equals_torchmetrics(clip_folder):
    from stepdistill.features.clip import Clip, clip_scores

    pixels = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    captions = ["a red apple", "a blue house", "a very red house", "apple", "blue", "a house"]
    clip = Clip.open(str(clip_folder))
    texts, cut = clip.embed_captions(captions)
    found = clip_scores(clip.images.extract(pixels), texts)
    assert found.mean().item() == pytest.approx(torchmetrics_score(clip_folder, pixels, captions), abs=1e-4)
    assert found.std() > 0.1 and not cut.any()


def test_long_captions_are_counted_and_keep_their_end(clip_folder):
    from stepdistill.features.clip import Clip

    clip = Clip.open(str(clip_folder))
    texts, cut = clip.embed_captions(
        ["a red apple", "a " + "very " * 5 + "red apple", "a " + "very " * 5 + "blue house"]
    )
    assert cut.tolist() == [False, True, True]
    torch.testing.assert_close(texts[1], texts[2])  # both are "a very very very very very" and the end
    assert not torch.allclose(texts[0], texts[1])


def test_clip_score_and_cmmd_come_with_the_other_metrics(tmp_path, clip_folder, network):
    folder = pngs(tmp_path / "generated", 8, 8, "RGB")
    lines = [{"file_name": f"{i}.png", "text": "a red apple" if i else "a " + "very " * 9} for i in range(8)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    real = str(archive(tmp_path / "real.npz", 20, channels=3))
    protocol = Protocol(
        features=str(clip_folder), clip=str(clip_folder), reference=real, metrics=("fd", "clip", "cmmd"), num_samples=8
    )
    suite = MetricSuite.of_protocol(protocol, Networks.of_protocol(protocol))
    result = evaluate_files(ImageSet(folder), suite, metrics=protocol.metrics)
    assert result["clip_score_low"] <= result["clip_score"] <= result["clip_score_high"]
    assert result["captions_cut"] == 1 and result["cmmd"] > 0
    assert len(result["setting"]["clip"]["sha256"]) == 64
    with pytest.raises(ValueError, match="'clip' needs captions"):
        evaluate_files(ImageSet(pngs(tmp_path / "bare", 8, 8, "RGB")), suite, metrics=protocol.metrics)
    assert evaluate_files(ImageSet(tmp_path / "bare"), suite, metrics=("cmmd",))["cmmd"] > 0  # which reads none


def test_a_clip_without_its_halves_is_refused(clip_folder, tmp_path, network):
    import shutil

    from stepdistill.features.clip import Clip

    with pytest.raises(ValueError, match="expected a whole CLIP, but .* has no text half"):
        Clip.open(str(network))
    shutil.copytree(clip_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("token*", "special*"))
    with pytest.raises(ValueError, match="expected a tokenizer of 9 tokens, got"):
        Clip.open(str(tmp_path / "bare"))


def test_a_text_pipeline_gets_its_prompts_by_index():
    class Network(torch.nn.Module):
        def forward(self, sample):
            return sample

    class Painter:
        device, unet = torch.device("cpu"), Network()

        def __call__(self, prompt, generator, output_type, return_dict):
            asked.append(prompt)
            grey = torch.stack([torch.rand(4, 4, 3, generator=g) for g in generator])
            return (self.unet(grey).numpy(),)

        def set_progress_bar_config(self, **options):
            pass

    asked = []
    captions = ["one", "two", "three", "four", "five"]
    images = sample_images(Painter(), 3, first=2, batch_size=2, captions=captions)
    assert asked == [["three", "four"], ["five"]] and images.captions == captions[2:]
    with pytest.raises(ValueError, match="Painter: expected a file of prompts, or images with captions, got none"):
        sample_images(Painter(), 3)
    with pytest.raises(ValueError, match="ClassConditionalPipeline: expected none, got some"):
        sample_images(pipeline(), 3, num_classes=3, captions=captions)
