"""Captions, prompts and metadata as users have them: several an image, missing, damaged; csv, tsv, json and parquet."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from contracts.cases import sections
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file

from stepdistill.data.base import DataConfig
from stepdistill.data.columns import read_label, read_texts
from stepdistill.data.datasets import open_data
from stepdistill.data.latent_cache import CacheConfig, LatentCacheDataset, make_cache
from stepdistill.data.loader import loader
from stepdistill.data.prompts import first_prompts, read_prompts
from stepdistill.evaluation.image_set import ImageSet
from stepdistill.evaluation.sources import read_captions
from stepdistill.families.config import TeacherConfig
from stepdistill.families.loading import load_teacher
from stepdistill.families.sd import SD
from stepdistill.files.schema import build
from stepdistill.files.words import visible
from stepdistill.inference.generate import collect_prompts
from stepdistill.training.config import resolve
from stepdistill.training.run import Run

ESCAPES = "red \x1b[31m\nsecond {{ line }} <b>"


def png(value=0, size=(16, 16)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def folder_of(path, count):
    path.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (path / f"{number}.png").write_bytes(png(number))
    return path


def described(path, texts, **more):
    """A folder of as many images, with these captions in metadata.jsonl."""
    rows = [{"file_name": f"{number}.png", "text": text, **more} for number, text in enumerate(texts)]
    folder_of(path, len(texts))
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def opened(path, classes=None, text=True, **options):
    config = DataConfig(name="images", path=str(path), **options)
    return open_data(config, channels=3, size=(16, 16), num_classes=classes, takes_text=text)


def refused(message, path, **options):
    with pytest.raises(ValueError, match=message) as error:
        opened(path, **options)
    return str(error.value)


# ------------------------------------------------------------------------------------------- several captions

SEVERAL = [["a cat", "a small cat", "an animal"], "one dog", ["two birds", "birds"], ["red", None, "blue"]]
ALL = [("a cat", "a small cat", "an animal"), ("one dog",), ("two birds", "birds"), ("red", "blue")]


def in_metadata(path):
    return described(path, SEVERAL)


def in_tar(path):
    path.mkdir()
    with tarfile.open(path / "a.tar", "w") as tar:
        for number, texts in enumerate(SEVERAL):
            for name, content in (("png", png(number)), ("json", json.dumps({"caption": texts}).encode())):
                (entry := tarfile.TarInfo(f"{number}.{name}")).size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return path


def in_parquet(path):
    path.mkdir()
    lists = [texts if isinstance(texts, list) else [texts] for texts in SEVERAL]
    parquet.write_table(pa.table({"image": [png(n) for n in range(4)], "text": lists}), path / "part-0.parquet")
    return path


def in_dataset(path):
    datasets = pytest.importorskip("datasets")
    lists = [texts if isinstance(texts, list) else [texts] for texts in SEVERAL]
    columns = {"image": [{"bytes": png(n), "path": None} for n in range(4)], "text": lists}
    datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).save_to_disk(str(path))
    return path


def in_npz(path):
    captions = np.array([["a cat", "a small cat"], ["one dog", "a dog"], ["two birds", "birds"], ["red", "blue"]])
    np.savez(path.with_suffix(".npz"), images=np.zeros((4, 16, 16, 3), np.uint8), captions=captions)
    return path.with_suffix(".npz")


def test_an_npz_holds_several_captions_an_image(tmp_path):
    data = opened(in_npz(tmp_path / "d"))
    assert data.captions == ["a cat", "one dog", "two birds", "red"]
    assert {text for index, text in visits(data, 80) if index == 3} == {"red", "blue"}
    images = np.zeros((4, 16, 16, 3), np.uint8)
    for captions in (np.zeros((4, 0), "U1"), np.zeros((3, 2), "U1"), np.zeros((4, 2), int), np.array("one")):
        np.savez(tmp_path / "bad.npz", images=images, captions=captions)
        refused(r"bad\.npz: captions: expected str \(4,\), got", tmp_path / "bad.npz")


def visits(data, count=40, start=0, rank=0, world=1):
    """(sample, caption) of every visit."""
    batches = loader(data, batch_size=2, seed=5, start=start, rank=rank, world=world)
    rows = [next(batches) for _ in range(count // 2)]
    return [row for batch in rows for row in zip(batch.indices, batch.captions, strict=True)]


@pytest.mark.parametrize("form", [in_metadata, in_tar, in_parquet, in_dataset])
def test_one_of_several_captions_is_drawn_on_every_visit(tmp_path, monkeypatch, form):
    """REPORTS 17: five captions an image; RELIABILITY row 22, lists."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "converted")
    data = opened(form(tmp_path / "d"))
    assert data.choices == ALL and data.captions == [texts[0] for texts in ALL]
    seen = visits(data, 160)
    assert all({text for index, text in seen if index == sample} == set(ALL[sample]) for sample in range(4))
    first = [text for index, text in seen if index == 0]
    assert all(5 <= first.count(text) <= 24 for text in ALL[0])  # a third of 40 each
    assert visits(data, 20, start=5) == seen[10:30]  # resumed
    two = [visits(data, 20, rank=rank, world=2) for rank in (0, 1)]
    assert [row for pair in range(0, 20, 2) for rank in two for row in rank[pair : pair + 2]] == seen[:40]


def test_evaluation_takes_the_first_of_several_captions(tmp_path):
    """REPORTS 17."""
    path = in_metadata(tmp_path / "d")
    assert read_captions(str(path), 4) == ["a cat", "one dog", "two birds", "red"]
    assert sorted(ImageSet(path).read(range(4)).captions) == ["a cat", "one dog", "red", "two birds"]


def test_drops_and_order_are_those_of_data_with_one_caption(tmp_path):
    """The draw of a caption moves no other draw."""
    one = opened(described(tmp_path / "one", ["a", "b", "c", "d"]), caption_dropout=0.4, flip=True)
    several = opened(in_metadata(tmp_path / "several"), caption_dropout=0.4, flip=True)
    for _, (left, right) in zip(
        range(10),
        zip(loader(one, batch_size=3, seed=1), loader(several, batch_size=3, seed=1), strict=False),
        strict=False,
    ):
        assert left.indices == right.indices and torch.equal(left.images, right.images)
        assert [not text for text in left.captions] == [not text for text in right.captions]


def test_a_cache_holds_every_caption_and_trains_alike_bit_for_bit(tmp_path):
    """REPORTS 17: also from latents and embeddings that were computed before."""
    wanted = sections(tmp_path, SD.tiny(), "lcm", steps=4)
    data = {"name": "images", "path": str(in_metadata(tmp_path / "d")), "batch_size": 2, "flip": True}
    data["caption_dropout"] = 0.2

    def trained(section, name):
        run = Run(resolve(wanted | {"data": section, "train": wanted["train"] | {"output_dir": str(tmp_path / name)}}))
        return load_file(run.train() / "unet/diffusion_pytorch_model.safetensors")

    plain = trained(data, "plain")
    family = load_teacher(TeacherConfig(path=wanted["teacher"]["path"]))
    dataset = opened(tmp_path / "d", flip=True)
    cache = make_cache(
        family, dataset, build(DataConfig, data), CacheConfig(output_dir=str(tmp_path / "c"), shard_size=3)
    )
    section = data | {"name": "cache", "path": str(cache)}
    other = trained(section, "other")
    assert all(torch.equal(plain[name], other[name]) for name in plain)
    read = LatentCacheDataset(build(DataConfig, section), family)
    assert read.choices == ALL and visits(read) == visits(opened(tmp_path / "d", caption_dropout=0.2))
    (cache / "captions.jsonl").write_text('{"name": "a", "text": "b"}\n')
    with pytest.raises(ValueError, match=r"captions\.jsonl is not what scripts/cache\.py wrote"):
        LatentCacheDataset(build(DataConfig, section), family)


def test_captions_beyond_the_first_are_counted_when_they_are_cut(tmp_path):
    """RELIABILITY row 22, longer than the tokens: counted over all captions, and said once."""
    family = SD.tiny()
    data = opened(described(tmp_path / "d", [["short", "x" * 200], "y" * 200, "z"]))
    with pytest.warns(UserWarning, match=r"2 of 4 captions are longer than the text encoder's 77 tokens") as said:
        family.use_captions(data.captions, [text for texts in data.choices for text in texts[1:]])
    assert len(said) == 1 and family.prompts == ("short", "y" * 200, "z")


# ------------------------------------------------------------------------------------ one rule for every caption


@pytest.mark.parametrize("none", [None, [], [None]])
def test_a_missing_caption_is_counted_and_never_a_word(tmp_path, none):
    """RELIABILITY row 22, missing or None; the text "None" is nobody's caption."""
    path = described(tmp_path / "d", ["one", none, "three", none])
    refused(r"2 of 4 images have no caption; the first is .*1\.png \(''", path)
    assert opened(path, text=False).captions is None
    assert ImageSet(path).read([0]).captions is None
    with pytest.raises(ValueError, match=r"captions: .*d\[1\] has no caption"):
        read_captions(str(path), 2)


def test_the_empty_caption_is_a_caption(tmp_path):
    """RELIABILITY row 22, empty."""
    assert opened(described(tmp_path / "d", ["", "b"])).load([0, 1]).captions == ("", "b")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'"\\ud83d"', r"metadata\.jsonl:1: 'text': expected text, got U\+D83D, half of a surrogate pair"),
        (b'["a", "\\udfff b"]', r"metadata\.jsonl:1: 'text': .* U\+DFFF, half of a surrogate pair"),
        (b'"na\xefve"', r"metadata\.jsonl:1: not UTF-8 \(byte 0xef\)"),
        (b'"a\x1b[31m"', r"metadata\.jsonl:1: control character U\+001B"),
        (b"7", r"metadata\.jsonl:1: 'text': expected text, or a list of texts, got 7"),
        (b'["a", 7]', r"metadata\.jsonl:1: 'text': expected text, or a list of texts, got \['a', 7\]"),
        (b'{"en": "a"}', r"metadata\.jsonl:1: 'text': expected text, or a list of texts, got \{'en'"),
    ],
)
def test_what_is_no_caption_names_file_and_row(tmp_path, line, message):
    """RELIABILITY row 22, invalid UTF-8, surrogates and control characters; REPORTS 11."""
    folder_of(tmp_path, 1)
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "0.png", "text": ' + line + b"}\n")
    refused(message, tmp_path)


@pytest.mark.parametrize("content", ['"\\ud83d"\n', '{"prompt": ["\\ud83d"]}\n'])
def test_half_a_surrogate_pair_in_prompts_names_the_line(tmp_path, content):
    """REPORTS 11: it was a ``TypeError`` of the tokenizer."""
    (tmp_path / "p.jsonl").write_text('"fine"\n' + content)
    with pytest.raises(ValueError, match=r"p\.jsonl:2: .*U\+D83D, half of a surrogate pair"):
        read_prompts(tmp_path / "p.jsonl")
    np.savez(tmp_path / "a.npz", images=np.zeros((1, 16, 16, 3), np.uint8), captions=np.array(["\ud83d"]))
    refused(r"a\.npz\[0\]: captions: .*half of a surrogate pair", tmp_path / "a.npz")


def test_odd_captions_and_file_names_stay_one_line(tmp_path):
    """RELIABILITY row 30, the data's half: nothing of a caption or name reaches a terminal or starts a line."""
    folder_of(tmp_path, 1)
    odd = "b\x1b[31m\nname.png"
    (tmp_path / odd).write_bytes(b"no image")
    rows = [{"file_name": "0.png", "text": ESCAPES}, {"file_name": odd, "text": [ESCAPES, "x"]}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = opened(tmp_path)
    assert data.load([0]).captions == (ESCAPES,)  # trained on as written
    (problem,) = data.load([1]).unreadable
    assert problem.isprintable() and "b\\x1b[31m\\nname.png" in problem and visible(ESCAPES).isprintable()
    family = SD.tiny()
    with pytest.warns(UserWarning) as warned:
        family.use_captions([ESCAPES * 40])
    assert str(warned[0].message).isprintable()


# ---------------------------------------------------------------------------------- columns that nobody wants


@pytest.mark.parametrize("label", ["cat", None, 1.5, True, ["a"]])
def test_a_text_teacher_ignores_a_column_of_odd_labels(tmp_path, label):
    """REPORTS 14."""
    path = described(tmp_path / "d", ["one", "two"], label=label)
    data = opened(path)
    assert data.labels is None and data.load([1]).captions == ("two",)
    refused(
        r"metadata\.jsonl:1: 'label': expected a whole number, got .*, but the teacher has 3 classes",
        path,
        classes=3,
        text=False,
    )
    with pytest.warns(UserWarning, match="labels are not used: .*expected a whole number"):
        assert ImageSet(path).read([0]).labels is None


@pytest.mark.parametrize("text", [3, {"a": 1}, None, ["a", "b"], ["\ud83d"]])
def test_a_class_teacher_ignores_a_column_of_odd_texts(tmp_path, text):
    """REPORTS 14."""
    data = opened(described(tmp_path / "d", [text, text], label=1), classes=2, text=False)
    assert data.load([0, 1]).labels.tolist() == [1, 1]


@pytest.mark.parametrize("labels", [["cat", "dog"], [1, None], [1.5, 2.0], [[1], [2, 3]]])
def test_columns_of_a_table_that_nobody_wants_are_ignored(tmp_path, monkeypatch, labels):
    """REPORTS 14, parquet."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "converted")
    parquet.write_table(
        pa.table({"image": [png(), png()], "text": ["a", "b"], "label": labels}), tmp_path / "a.parquet"
    )
    assert opened(tmp_path / "a.parquet").load([0, 1]).captions == ("a", "b")
    refused("column 'label': expected whole numbers, none missing", tmp_path / "a.parquet", classes=3, text=False)


def test_odd_files_beside_the_images_of_a_class_teacher_are_ignored(tmp_path):
    """REPORTS 14, texts that are not UTF-8 beside the images, and classes as words in tars."""
    for name in ("a", "b"):
        (folder_of(tmp_path / "f" / name, 1) / "0.txt").write_bytes(b"na\xefve")
    assert opened(tmp_path / "f", classes=2, text=False).labels == [0, 1]
    refused(r"0\.txt:1: not UTF-8", tmp_path / "f")
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, content in (("0.png", png()), ("0.cls", b"cat"), ("0.txt", b"a cat")):
            (entry := tarfile.TarInfo(name)).size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    assert opened(tmp_path / "t.tar").captions == ["a cat"]
    refused(r"t\.tar!0\.cls: label: expected a whole number, got 'cat'", tmp_path / "t.tar", classes=2, text=False)


def test_labels_and_texts_one_by_one():
    """What counts as a label, and as captions."""
    assert [read_label(value, "x") for value in (3, "3", " 07 ", -1)] == [3, 3, 7, -1]
    for value in (True, 3.0, "-", "", None, [3]):
        with pytest.raises(ValueError, match="^x: expected a whole number"):
            read_label(value, "x")
    assert read_texts("", "x") == ("",) and read_texts(["a", None], "x") == ("a",) and read_texts(None, "x") == ()


# ---------------------------------------------------------------------------------------------------- parquet


def structs(*names):
    kinds = {"bytes": pa.large_binary(), "path": pa.string(), "size": pa.int64()}
    rows = [{"bytes": png(number), "path": None, "size": 1} for number in (3, 4)]
    return pa.array(
        [{name: row[name] for name in names} for row in rows], pa.struct([(name, kinds[name]) for name in names])
    )


@pytest.mark.parametrize(
    "images",
    [
        pa.array([png(3), png(4)]), pa.array([png(3), png(4)], pa.large_binary()),
        pa.array([png(3), png(4)], pa.binary_view()),
        structs("bytes", "path"), structs("path", "bytes"), structs("bytes"), structs("size", "bytes"),
    ],
    ids=["bytes", "polars", "view", "struct", "other order", "no path", "more"],
)  # fmt: skip
def test_parquet_of_pandas_and_polars_is_read(tmp_path, monkeypatch, images):
    """REPORTS 18: bytes or structs instead of the hub's type; one file, or a folder of them."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "converted")
    (tmp_path / "d").mkdir()
    parquet.write_table(
        pa.table({"image": images, "text": pa.array(["a", "b"], pa.large_string())}), tmp_path / "d/x.parquet"
    )
    for path in (tmp_path / "d", tmp_path / "d/x.parquet"):
        batch = opened(path).load([1, 0])
        assert ((batch.images[:, 0, 0, 0] + 1) * 127.5).round().tolist() == [4, 3] and batch.captions == ("b", "a")
    assert len(ImageSet(tmp_path / "d/x.parquet")) == 2


def test_other_columns_are_no_images(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "converted")
    parquet.write_table(pa.table({"image": ["a.png"], "text": ["a"]}), tmp_path / "a.parquet")
    refused(r"a\.parquet: column 'image': expected a datasets\.Image, bytes, or structs", tmp_path / "a.parquet")
    refused("data.split: got 'test', but .*a.parquet is one file", tmp_path / "a.parquet", split="test")


def test_damaged_tables_are_named(tmp_path, monkeypatch):
    """FAULTS 9, RELIABILITY row 22: arrow's errors name no file."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "converted")
    parquet.write_table(pa.table({"image": [png()], "text": ["a"]}), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    for content in (b"", whole[:-9], whole[:100] + b"\xff" * 60 + whole[160:]):
        (tmp_path / "a.parquet").write_bytes(content)
        refused(r"a\.parquet: (cannot be read as parquet: |.*expected a datasets.Image)", tmp_path / "a.parquet")
    saved = in_dataset(tmp_path / "saved")
    arrow = next(saved.glob("*.arrow"))
    good = {file: file.read_bytes() for file in (arrow, saved / "state.json", saved / "dataset_info.json")}
    for file, content, message in [
        (arrow, good[arrow][:-300], r"arrow: cannot be read as a saved dataset"),
        (arrow, b"", r"arrow: cannot be read"),
        (saved / "state.json", b"{", r"state\.json: expected JSON"),
        (saved / "state.json", b"{}", r"state\.json: _data_files: "),
        (saved / "state.json", b'{"_data_files": [{"filename": "other.arrow"}]}', r"other\.arrow: no such file"),
        (saved / "dataset_info.json", b"[]", r"dataset_info\.json: .*expected a section"),
        (saved / "dataset_info.json", b'{"features": {"a": {"_type": "Nope"}}}', r"saved: cannot be read .*Nope"),
    ]:  # fmt: skip
        file.write_bytes(content)
        refused(f"(?s){message}", saved)
        file.write_bytes(good[file])
    assert len(opened(saved)) == 4


# --------------------------------------------------------------------------------------------- metadata, splits


def as_csv(folder, rows):
    lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
    (folder / "metadata.csv").write_text("\ufeff" + "\r\n".join(lines) + "\r\n")


def as_parquet(folder, rows):
    parquet.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")


def as_lines(folder, rows):
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize("write", [as_csv, as_parquet, as_lines])
@pytest.mark.parametrize("key", ["file_name", "image_file_name"])
def test_metadata_in_every_form_of_imagefolder(tmp_path, write, key):
    """REPORTS 20: metadata.csv and .parquet, and the split folder train."""
    rows = [{key: f"{number}.png", "text": f"one, {number}", "label": number} for number in range(3)]
    write(folder_of(tmp_path / "train", 3), rows)
    folder_of(tmp_path / "test", 2)
    with pytest.warns(UserWarning, match="reading the split train; left out: test"):
        data = opened(tmp_path, classes=3)
    assert data.captions == ["one, 0", "one, 1", "one, 2"] and data.labels == [0, 1, 2]
    assert opened(tmp_path / "train").captions == data.captions


def test_a_table_above_the_splits_and_classes_below_them(tmp_path):
    """REPORTS 20."""
    for split, count in (("training", 2), ("val", 1)):
        folder_of(tmp_path / "d" / split, count)
    rows = [{"file_name": f"{name}.png", "text": name} for name in ("training/0", "training/1", "val/0")]
    as_csv(tmp_path / "d", rows)
    with pytest.warns(UserWarning, match="left out: val"):
        assert opened(tmp_path / "d").captions == ["training/0", "training/1"]
    with pytest.warns(UserWarning, match="left out: training"):
        assert opened(tmp_path / "d", split="validation").captions == ["val/0"]
    refused(r"data\.split: .* has no 'tset'.*expected one of", tmp_path / "d", split="tset")
    with pytest.warns(UserWarning, match="left out: val"):
        refused(r"data\.subset: got 'a', but .* is not a Hugging Face dataset", tmp_path / "d", subset="a")
    for name in ("train/cat", "train/dog", "validation/cat"):
        folder_of(tmp_path / "c" / name, 1)
    with pytest.warns(UserWarning, match="left out: validation"):
        assert opened(tmp_path / "c", classes=2, text=False).labels == [0, 1]
    folder_of(tmp_path / "c", 2)
    with pytest.warns(UserWarning, match="left out: validation, 2 files beside the splits"):
        assert opened(tmp_path / "c", classes=2, text=False).labels == [0, 1]
    for name in ("train", "bus"):  # classes of vehicles
        folder_of(tmp_path / "v" / name, 1)
    assert opened(tmp_path / "v", classes=2, text=False).labels == [0, 1]


def test_rows_without_images_and_images_without_rows_are_counted(tmp_path):
    """REPORTS 20: said, not silently dropped."""
    path = described(tmp_path / "d", ["zero", "one", "two"])
    (path / "1.png").unlink()
    with pytest.warns(
        UserWarning,
        match=r"metadata\.jsonl: 1 of 3 rows name an image that is not there; the first is .*jsonl:2: .*1\.png",
    ):
        data = opened(path)
    assert data.captions == ["zero", "two"]
    refused(r"1 of 3 rows name an image that is not there.*bad_files=skip", path, bad_files="error")
    with pytest.raises(ValueError, match="1 of 3 rows"):
        ImageSet(path)
    folder_of(path, 5)
    with pytest.warns(UserWarning, match=r"2 images have no row and are left out; the first is .*3\.png"):
        assert len(opened(path)) == 3
    (path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": ""}\n')
    refused("1 of 1 rows name an image that is not there.*too many", path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"file_name,text\n0.png,a,b\n", r"metadata\.csv:2: expected 2 columns as in the first line, got 3"),
        (b'file_name,text\n0.png,"a\n', r"metadata\.csv:\d: unexpected end of data"),
        (b"file,text\n0.png,a\n", r"metadata\.csv:2: no key 'file_name'; did you mean 'file'"),
        (b"file_name,text\n0.png,\n", r"no captions, but the teacher takes text"),
        (b"file_name,text\n,a\n", r"metadata\.csv:2: 'file_name': expected the path of an image, got None"),
        (b"file_name,text\n0.png," + b"a" * 200_000 + b"\n", r"metadata\.csv:2: field larger than field limit"),
        (b"file_name,text\n0.png,a\x00\n", r"metadata\.csv:2: control character U\+0000"),
    ],
)
def test_damaged_metadata_is_named(tmp_path, content, message):
    folder_of(tmp_path, 1)
    (tmp_path / "metadata.csv").write_bytes(content)
    refused(message, tmp_path)


def test_blank_lines_of_a_table_are_passed_over(tmp_path):
    folder_of(tmp_path, 1)
    (tmp_path / "metadata.csv").write_text("\n\nfile_name,text\n\n0.png,a\n\n")
    assert opened(tmp_path).captions == ["a"]


def test_a_damaged_parquet_table_is_named(tmp_path):
    folder_of(tmp_path, 1)
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 no table PAR1")
    refused(r"metadata\.parquet: cannot be read as parquet", tmp_path)


# ---------------------------------------------------------------------------------------------- files of prompts

COCO = {
    "info": {},
    "images": [{"id": 1}],
    "annotations": [{"image_id": 1, "id": n, "caption": c} for n, c in enumerate(["a", "b"])],
}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.csv", "id,Prompt\r\n1,\"a, b\"\r\n2,\"say \"\"hi\"\"\"\r\n", ["a, b", 'say "hi"']),
        ("p.csv", "caption,x\na\u2028b,1\n,2\nc,3\n", ["a\u2028b", "c"]),
        ("p.tsv", "Prompt\tCategory\na b\tWorld\n\"a\tb\"\tArts\n", ["a b", "a\tb"]),
        ("p.tsv", "Prompt\tNote\n\"Stop\" on a sign\tx\na 6\" ruler\ty\n", ['"Stop" on a sign', 'a 6" ruler']),
        ("p.json", json.dumps(["a", "b\nc", ""]), ["a", "b\nc", ""]),
        ("p.json", json.dumps([{"prompt": "a", "caption": "x"}, {"text": ["b", "c"]}]), ["a", "b"]),
        ("p.json", json.dumps(COCO), ["a", "b"]),
        ("p.jsonl", '{"text": "a", "prompt": "x"}\n\n"b"\r\n{"Caption": "\u2028c"}', ["a", "b", "\u2028c"]),
        ("p.txt", "a\u2028b\x0cc\r\n\n d \n", ["a\u2028b\x0cc", "d"]),
    ],
)  # fmt: skip
def test_every_file_of_prompts_reads_the_same_everywhere(tmp_path, name, content, expected):
    """REPORTS 24: csv, tsv, json and COCO's; U+2028 ends no line."""
    file = tmp_path / name
    file.write_bytes(content.encode())
    assert first_prompts(file) == expected and collect_prompts(["x"], str(file)) == ["x", *expected]
    config = DataConfig(name="prompts", path=str(file))
    data = open_data(config, channels=3, size=(8, 8), num_classes=None, takes_text=True)
    assert data.captions == expected
    if all(expected) and "\n\n" not in content and "\n," not in content:
        assert read_captions(str(file), len(expected)) == expected


def test_one_of_several_prompts_is_drawn_as_well(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"text": ["a", "b"]}\n{"text": "c"}\n')
    config = DataConfig(name="prompts", path=str(tmp_path / "p.jsonl"))
    data = open_data(config, channels=3, size=(8, 8), num_classes=None, takes_text=True)
    assert {text for _, text in visits(data)} == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "a cat\na dog\n", r"p\.csv:1: expected a column text, prompt or caption, got a cat"),
        ("p.csv", "prompt\n", r"p\.csv: no prompts in it"),
        ("p.csv", "prompt\na,b\n", r"p\.csv:2: expected 1 columns"),
        ("p.json", "[1]", r"p\.json: "),
        ("p.json", "{}", r"p\.json: annotations: expected"),
        ("p.json", '{"annotations": [{"id": 1}]}', r"p\.json\[0\]: expected a column .*, got id"),
        ("p.json", "[" * 100_000, r"p\.json: "),
        ("p.jsonl", '{"text": null}\n', r"p\.jsonl:1: no prompt, but a null"),
        ("p.jsonl", "{\n", r"p\.jsonl:1: expected JSON"),
    ],
)
def test_damaged_files_of_prompts_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_a_pipe_is_no_file_of_prompts(tmp_path):
    """FAULTS 10: it would never end."""
    os.mkfifo(tmp_path / "p.txt")
    with pytest.raises(ValueError, match=r"p\.txt: expected a file, got a special file"):
        read_prompts(Path(tmp_path / "p.txt"))
