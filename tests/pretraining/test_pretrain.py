"""Teachers trained here: the parts of a text-to-image one, and the pipeline they make."""

import contextlib
import dataclasses
import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from contracts.cases import save_teacher
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.models.unets.unet_2d import UNet2DOutput
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from stepdistill.assets import TEACHERS
from stepdistill.config import read_config
from stepdistill.families.config import TeacherConfig
from stepdistill.families.loading import load_teacher
from stepdistill.families.pixel import Pixel
from stepdistill.families.sd import SD
from stepdistill.features.attributes import AttributeReader
from stepdistill.features.clip import Clip
from stepdistill.features.vocabulary import Vocabulary
from stepdistill.files.schema import ConfigError, build
from stepdistill.pretraining import pixel, text_to_image
from stepdistill.pretraining.classifier import check_sets, read_labelled_images
from stepdistill.pretraining.clip import shifted, train_tokenizer
from stepdistill.pretraining.fit import FitConfig, fit, flow_matching_loss
from stepdistill.pretraining.parts import FIRST_PARTS
from stepdistill.pretraining.reader import train_reader
from stepdistill.pretraining.text_to_image import TextTeacherConfig, train_text_teacher
from stepdistill.pretraining.vae import encode, train_vae, whiten

CONFIG = "configs/teacher_faces.yaml"


class Ranks:
    """An accelerator that is one of two processes, and prepares nothing."""

    num_processes, is_main_process, device = 2, False, torch.device("cpu")
    autocast = staticmethod(contextlib.nullcontext)
    clip_grad_norm_ = staticmethod(lambda *args: None)

    def __init__(self, rank):
        self.process_index = rank

    def prepare(self, *parts):
        return parts

    def backward(self, loss):
        loss.backward()


def test_every_process_trains_on_noise_of_its_own(tmp_path):
    seen = {0: [], 1: []}
    for rank, noise in seen.items():

        def loss(network, index, generator, noise=noise):
            noise.append(torch.randn(3))
            return network.weight.square().sum()

        torch.manual_seed(0)
        config = FitConfig(model={}, steps=2, batch_size=2)
        fit(torch.nn.Linear(1, 1), loss, count=8, config=config, accelerator=Ranks(rank), log=tmp_path / "log.jsonl")
    assert all((mine != other).all() for mine, other in zip(seen[0], seen[1], strict=True))


class Counting(Ranks):
    """An accelerator of one process, whose prepared module counts its calls."""

    num_processes, calls = 1, 0

    def prepare(self, module, optimizer):
        return lambda *inputs: self.count(module, *inputs), optimizer

    def count(self, module, *inputs):
        self.calls += 1
        return module(*inputs)


def test_autoencoders_and_readers_are_called_as_they_were_prepared(tmp_path):
    """Several processes share a gradient only through the module that accelerate wrapped."""
    config = FitConfig(model=read_config(CONFIG)["vae"]["model"], steps=2, batch_size=2)
    images, counting = torch.rand(4, 3, 16, 16) * 2 - 1, Counting(0)
    vae = train_vae(images, torch.zeros(4, 1, dtype=torch.long), [2], config, counting, tmp_path / "log.jsonl")
    assert isinstance(vae, AutoencoderKL) and counting.calls == 2
    train_vae(images, torch.zeros(4, 0, dtype=torch.long), [], config, counting, tmp_path / "log.jsonl")
    assert counting.calls == 4
    reader = AttributeReader(Vocabulary(attributes={"hat": {"no": None, "yes": "hat"}}), width=4, num_features=4)
    pixels = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    train_reader(reader, pixels, torch.zeros(4, 1, dtype=torch.long), config, counting, tmp_path / "log.jsonl")
    assert counting.calls == 6


PARTS = ("vae", "clip", "judge", "unet", "together")


def test_whitened_latents_have_unit_variance_and_images_come_back_as_before():
    torch.manual_seed(0)
    vae = AutoencoderKL(**read_config(CONFIG)["vae"]["model"]).eval()
    images = torch.rand(8, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        before = vae.encode(images).latent_dist
        back = vae.decode(before.mean).sample
        whiten(vae, encode(vae, images, torch.device("cpu")))
        after = vae.encode(images).latent_dist
        torch.testing.assert_close(vae.decode(after.mean).sample, back, atol=1e-4, rtol=0)
    torch.testing.assert_close(after.mean.mean((0, 2, 3)), torch.zeros(vae.config.latent_channels), atol=1e-4, rtol=0)
    torch.testing.assert_close(after.mean.std((0, 2, 3)), torch.ones(vae.config.latent_channels), atol=1e-4, rtol=0)
    scale = before.mean.std((0, 2, 3)).view(1, -1, 1, 1)
    torch.testing.assert_close(after.std * scale, before.std, atol=1e-4, rtol=1e-4)  # the posterior's width, too


def test_the_tokenizer_joins_frequent_words_and_reads_any_text():
    tokenizer = train_tokenizer(["flat red apple", "3d red apple", "flat red car"] * 5, 560, 16)
    assert tokenizer.tokenize("red apple") == ["red</w>", "apple</w>"]
    for text in ("pineapple", "crème 日本"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert len(tokenizer("red " * 30, truncation=True).input_ids) == 16


def test_the_same_captions_give_the_same_tokens():
    """The ends of words had the order of a hash table: resumed, a teacher read other tokens than its CLIP had."""
    captions = ["flat red apple", "3d red apple", "flat blue car"] * 5
    tokenizers = [train_tokenizer(captions, 560, 16) for _ in range(3)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab() == tokenizers[2].get_vocab()
    assert len(tokenizers[0]) <= 560


def test_shifted_images_keep_what_is_inside_and_are_white_outside():
    images = -torch.ones(64, 1, 8, 8)
    moved = shifted(images, 3, torch.Generator().manual_seed(0))
    white = (moved == 1).sum((1, 2, 3))
    assert moved.shape == images.shape and set(moved.unique().tolist()) == {-1.0, 1.0}
    assert white.max() <= 64 - (8 - 3) ** 2 and white.unique().numel() > 4


def test_fit_finds_a_least_squares_solution(tmp_path):
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]])
    config = FitConfig(model={}, steps=600, batch_size=32, lr=0.03, ema=0.95, log_every=300)
    torch.manual_seed(0)
    network = fit(
        torch.nn.Linear(3, 1), lambda net, index, _: (net(x[index]) - y[index]).square().mean(), count=64,
        config=config, accelerator=Accelerator(cpu=True), log=tmp_path / "log.jsonl",
    )  # fmt: skip
    assert (network(x) - y).abs().max() < 0.02
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [300, 600]


def test_one_command_makes_a_pipeline_that_stock_diffusers_loads(tmp_path):
    small = [f"{part}.{key}" for part in PARTS for key in ("steps=2", "batch_size=4", "log_every=1")]
    overrides = [*small, f"output_dir={tmp_path}", "data.max_samples=8"]
    config = build(TextTeacherConfig, read_config(CONFIG, overrides))
    folder = train_text_teacher(config)
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    assert size < 8e6  # of the shipped configuration's architecture

    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a face", num_inference_steps=1, output_type="np").images.shape == (1, 16, 16, 3)
    family = load_teacher(TeacherConfig(path=str(folder)))
    assert isinstance(family, SD) and family.image_shape == (3, 16, 16) and family.prediction_type == "v_prediction"
    assert {value.dtype for value in load_file(folder / "text_encoder/model.safetensors").values()} == {torch.float16}
    assert pipeline.text_encoder.dtype == pipeline.unet.dtype == torch.float32
    clip, judge = (Clip.open(str(tmp_path / name)) for name in ("clip", "judge"))
    assert not torch.equal(clip.embed_captions(["a face"])[0], judge.embed_captions(["a face"])[0])

    parts = (
        "tokenizer/tokenizer.json", "vae/diffusion_pytorch_model.safetensors", "clip/model.safetensors",
        "pipeline/unet/diffusion_pytorch_model.safetensors",
    )  # fmt: skip
    kept = [(tmp_path / part).stat().st_mtime_ns for part in parts]
    train_text_teacher(config)
    assert [(tmp_path / part).stat().st_mtime_ns for part in parts] == kept
    train_text_teacher(dataclasses.replace(config, unet=dataclasses.replace(config.unet, save_every=7)))
    with pytest.raises(ValueError, match=r"^together\.steps: .*pipeline was made with 2, now 3; move it"):
        train_text_teacher(dataclasses.replace(config, together=dataclasses.replace(config.together, steps=3)))
    with pytest.raises(ValueError, match=r"^vocabulary: .*tokenizer was made with 700, now 500; move it and what was"):
        train_text_teacher(dataclasses.replace(config, vocabulary=500))
    smaller = {key: value for key, value in config.vae.model.items() if key != "mid_block_add_attention"}
    with pytest.raises(ValueError, match=r"^vae\.model\.mid_block_add_attention: .*vae was made with False, now None"):
        train_text_teacher(dataclasses.replace(config, vae=dataclasses.replace(config.vae, model=smaller)))
    (tmp_path / "vae").rename(tmp_path / "old")
    with pytest.raises(ValueError, match=r"unet was made from 'vae', which is missing; move it away, too"):
        train_text_teacher(config)
    (tmp_path / "old").rename(tmp_path / "vae")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert tokenizer.get_vocab() == pipeline.tokenizer.get_vocab()


def test_every_key_of_a_text_teacher_belongs_to_a_part():
    keys = {field.name for field in dataclasses.fields(TextTeacherConfig)}
    assert keys - {"output_dir"} == FIRST_PARTS.keys()


def test_a_stopped_last_training_leaves_no_pipeline(tmp_path, monkeypatch):
    small = [f"{part}.{key}" for part in PARTS for key in ("steps=2", "batch_size=4", "save_every=1")]
    config = build(TextTeacherConfig, read_config(CONFIG, [*small, f"output_dir={tmp_path}", "data.max_samples=8"]))
    halve = text_to_image.halve

    def stopped(file):
        halve(file)
        raise KeyboardInterrupt

    monkeypatch.setattr(text_to_image, "halve", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_text_teacher(config)
    assert (tmp_path / "unet").is_dir() and not (tmp_path / "pipeline").exists()
    monkeypatch.setattr(text_to_image, "halve", halve)
    assert (train_text_teacher(config) / "model_index.json").is_file() and not (tmp_path / "pipeline.partial").exists()


def test_long_captions_are_cut_and_counted_before_anything_is_trained(tmp_path, monkeypatch):
    """REPORTS 27: it was a traceback of the CLIP, after the autoencoder was trained; RELIABILITY row 22."""
    small = [f"{part}.{key}" for part in PARTS for key in ("steps=1", "batch_size=4")]
    options = [*small, f"output_dir={tmp_path}", "data.max_samples=6", "max_tokens=5", "vocabulary=600"]
    config = build(TextTeacherConfig, read_config(CONFIG, options))
    with pytest.warns(UserWarning, match=r"\d+ of 48 captions are longer than the text encoder's 5 tokens"):
        folder = train_text_teacher(config)
    assert SD(DiffusionPipeline.from_pretrained(folder)).embed(["a face"])["encoder_hidden_states"].shape[1] == 5

    def first_training(*options):
        raise RuntimeError("the first training")

    monkeypatch.setattr("stepdistill.pretraining.text_to_image.train_vae", first_training)
    config = dataclasses.replace(config, output_dir=str(tmp_path / "other"))
    with pytest.warns(UserWarning, match="of 48 captions"), pytest.raises(RuntimeError, match="the first training"):
        train_text_teacher(config)


def colour_archive(path, labels):
    images = np.zeros((8, 8, 8, 3), np.uint8)
    images[..., 0] = 255
    np.savez(path, images=images, labels=np.array(labels))
    return path


def test_colours_stay_in_their_channels_and_labels_in_their_range(tmp_path, monkeypatch):
    """A pixel teacher of colour images once saw the channels of a pixel as its neighbours."""
    seen = []

    def loss(network, scheduler, x0, **cond):
        seen.append(x0)
        return network(x0, torch.zeros(len(x0)), **cond).sample.mean()

    monkeypatch.setattr(pixel, "denoising_loss", loss)
    model = {"sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": [8], "norm_num_groups": 4,
             "layers_per_block": 1, "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"],
             "num_class_embeds": 3}  # fmt: skip
    path = colour_archive(tmp_path / "a.npz", [0, 1] * 4)
    options = {"model": model, "scheduler": {}, "steps": 1, "batch_size": 2, "output_dir": str(tmp_path / "t")}
    pixel.train_teacher(pixel.PretrainConfig(data=str(path), **options))
    assert (seen[0][:, 0] == 1).all() and (seen[0][:, 1:] == -1).all()
    with pytest.raises(ValueError, match=r"^output_dir: .*t/pipeline is a finished teacher; move it, or choose"):
        pixel.train_teacher(pixel.PretrainConfig(data=str(path), **options))
    options["output_dir"] = str(tmp_path / "u")
    path = colour_archive(tmp_path / "b.npz", [0, 2] * 4)
    with pytest.raises(ValueError, match=r"b\.npz: labels: expected 0 to 1, the network's classes, got 0 to 2"):
        pixel.train_teacher(pixel.PretrainConfig(data=str(path), **options))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"b\.npz: expected an \.npz of plain arrays"):
        pixel.train_teacher(pixel.PretrainConfig(data=str(path), **options))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": {"block_out_chanels": [8]}},
            r"model: UNet2DModel takes no 'block_out_chanels'; did you mean 'block_o",
        ),
        ({"model": {"num_class_embeds": "none"}}, "^model: it makes no UNet2DModel: TypeError"),
        (
            {"model": {"sample_size": 16}},
            r"images: expected \(C, H, W\) \(1, 16, 16\), as 'model' says, got \(1, 8, 8\)",
        ),
        ({"model": {"in_channels": 3, "out_channels": 3}}, r"images: expected \(C, H, W\) \(3, 8, 8\)"),
        ({"scheduler": {"prediction_type": "foo"}}, "^scheduler: .*prediction_type: expected one of"),
        ({"scheduler": {"num_train_timesteps": 0}}, r"^scheduler\.num_train_timesteps: expected at least 1"),
        ({"scheduler": {"beta_schedule": "foo"}}, "^scheduler: with 'model' it makes no teacher"),
        ({"scheduler": {"beta_start": "low"}}, "^scheduler: with 'model' it makes no teacher"),
        ({"output_dir": "pipeline"}, "output_dir: expected a folder of its own, got the pipeline"),
    ],
)
def test_a_teacher_that_cannot_be_is_refused_before_the_first_step(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline/model_index.json").write_text("{}")
    monkeypatch.setattr(pixel, "fit", None)
    options = {
        "model": dict(Pixel.tiny(num_classes=2, size=8).network.config), "scheduler": {}, "output_dir": "new",
        "data": str(grey_archive(tmp_path / "a.npz")),
    }  # fmt: skip
    for key, value in changes.items():
        options[key] = {**options[key], **value} if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=message):
        pixel.train_teacher(pixel.PretrainConfig(**options))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("labels", "side", "asked", "batch_size", "message"),
    [
        ([-1, 0, 1], 8, [0], 2, r"--train: labels: expected 0, 1, 2, \.\.\. without a gap, got \[-1, 0, 1\]"),
        ([0, 2, 0], 8, [0], 2, r"--train: labels: expected 0, 1, 2, \.\.\. without a gap, got \[0, 2\]"),
        ([0, 1, 0], 8, [0], 4, "--batch_size: expected at most 3, the images of --train, got 4"),
        ([0, 1, 0], 12, [0], 2, r"--test: images: expected \(C, H, W\) \(1, 8, 8\), as in --train, got \(1, 12, 12\)"),
        ([0, 1, 0], 8, [2], 2, "--test: labels: expected 0 to 1, as in --train, got 2 to 2"),
    ],
)
def test_sets_of_a_classifier_that_do_not_fit_are_refused(labels, side, asked, batch_size, message):
    train = torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8), torch.tensor(labels)
    with pytest.raises(ValueError, match=message):
        check_sets(train, (torch.zeros(1, 1, side, side, dtype=torch.uint8), torch.tensor(asked)), batch_size)


def test_an_archive_without_images_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((0, 8, 8), np.uint8), labels=np.zeros(0, int))
    with pytest.raises(ValueError, match=r"a\.npz: images: expected at least one, got none"):
        read_labelled_images(tmp_path / "a.npz")


def test_the_loss_of_a_flow_is_zero_for_the_velocity_of_a_point():
    x0, asked = torch.full((64, 1, 2, 2), 0.5), []

    def network(x_t, timesteps, class_labels):
        asked.append(timesteps)
        return UNet2DOutput((x_t - 0.5) / (timesteps / 1000).view(-1, 1, 1, 1))

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert flow_matching_loss(network, scheduler, x0, class_labels=None) < 1e-6
    assert 0 <= asked[0].min() < 100 and 900 < asked[0].max() < 1000  # evenly, whatever the shift


def test_a_flow_begins_from_the_weights_of_any_teacher(tmp_path):
    begun = save_teacher(Pixel.tiny(num_classes=2, size=8), tmp_path / "begun")
    network = load_teacher(TeacherConfig(path=str(begun))).network
    options = {"model": dict(network.config), "scheduler": {"shift": 2.0}, "steps": 1, "batch_size": 2, "lr": 1e-9}
    config = pixel.PretrainConfig(
        **options, scheduler_class="FlowMatchEulerDiscreteScheduler", init_from=str(begun),
        data=str(grey_archive(tmp_path / "a.npz")), output_dir=str(tmp_path / "t"),
    )  # fmt: skip
    folder = pixel.train_teacher(config)
    family, whole = (load_teacher(TeacherConfig(path=str(path))) for path in (folder, folder / "pipeline"))
    assert family.prediction_type == whole.prediction_type == "flow" and whole.schedule.shift == 2
    assert (family.null_class, whole.null_class) == (None, 2)  # a guided student needs the whole one
    for name, value in network.state_dict().items():
        torch.testing.assert_close(family.network.state_dict()[name], value, atol=1e-6, rtol=0)
    config = dataclasses.replace(config, output_dir=str(tmp_path / "u"))
    wider = dataclasses.replace(config, model={**options["model"], "block_out_channels": [8, 24]})
    with pytest.raises(ValueError, match=r"init_from: expected the weights of a network of 'model', got others in"):
        pixel.train_teacher(wider)
    with pytest.raises(ValueError, match=r"^init_from: no folder or file 'nowhere'"):
        pixel.train_teacher(dataclasses.replace(config, init_from="nowhere"))
    with pytest.raises(ValueError, match=r"scheduler: FlowMatchEulerDiscreteScheduler takes no 'beta_start'"):
        dataclasses.replace(config, scheduler={"beta_start": 1e-4})


def test_the_embedded_flow_is_small_and_knows_its_null_class():
    family = load_teacher(TeacherConfig(path="embedded-flow"))
    assert (family.prediction_type, family.schedule.shift, family.null_class) == ("flow", 1.0, 10)
    assert sum(file.stat().st_size for file in TEACHERS["embedded-flow"].rglob("*")) < 1.6e6


def grey_archive(path):
    np.savez(path, images=np.zeros((4, 8, 8), np.uint8), labels=np.array([0, 1, 0, 1]))
    return path


def test_the_judge_is_of_another_seed():
    with pytest.raises(ConfigError, match="judge.seed: expected another seed than clip.seed, got 0"):
        build(TextTeacherConfig, read_config(CONFIG, ["judge.seed=0"]))
