"""Hugging Face datasets: parquet folders as the hub has them, ids of the hub, and what is said where there is none."""

import io
import os
import re
from pathlib import Path

import pytest
from contracts.cases import sections
from PIL import Image

from stepdistill.data.base import DataConfig
from stepdistill.data.datasets import open_data
from stepdistill.data.latent_cache import files
from stepdistill.families.sd import SD
from stepdistill.files.schema import ConfigError, build
from stepdistill.training.checkpoint import CheckpointError
from stepdistill.training.config import resolve
from stepdistill.training.run import Run

datasets = pytest.importorskip("datasets")

COMMIT, NEWER = "1f3e" * 10, "2a4b" * 10
OWN = "someone/pictures"


@pytest.fixture(autouse=True)
def converted(tmp_path, monkeypatch):
    """Where ``load_dataset`` keeps what it has converted."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "converted")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "converted"


def table(values):
    """Images of 4 x 4 with these grey values, and ``text``."""

    def png(value):
        file = io.BytesIO()
        Image.new("RGB", (4, 4), (value, value, value)).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    columns = {"image": [png(value) for value in values], "text": [f"grey {value}" for value in values]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    return datasets.Dataset.from_dict(columns, features=features)


def write(folder, name, values):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    table(values).to_parquet(str(file))


def test_the_columns_of_a_table_without_captions_are_named(tmp_path):
    table([0, 10]).rename_column("text", "texts").to_parquet(str(tmp_path / "a.parquet"))
    for path in (tmp_path / "a.parquet", f"file://{tmp_path}/a.parquet"):
        config = DataConfig(name="images", path=str(path))
        with pytest.raises(ValueError, match=r"a\.parquet: no column 'text'; did you mean 'texts'\?; data\.caption"):
            open_data(config, channels=3, size=(4, 4), num_classes=None, takes_text=True)


def test_hidden_files_are_no_parquet(tmp_path):
    write(tmp_path / "data", "train-00000-of-00001.parquet", [0, 10])
    (tmp_path / "data/._train-00000-of-00001.parquet").write_bytes(b"what macOS adds")
    config = DataConfig(name="images", path=str(tmp_path / "data"))
    assert len(open_data(config, channels=3, size=(4, 4), num_classes=None)) == 2


@pytest.fixture
def hub_layout(tmp_path):
    """A repository with two splits, a picture for its page, and no subsets."""
    folder = tmp_path / "clone"
    write(folder, "data/train-00000-of-00002.parquet", [0, 10])
    write(folder, "data/train-00001-of-00002.parquet", [20])
    write(folder, "data/test-00000-of-00001.parquet", [30, 40, 50])
    table([9])[0]["image"].save(folder / "preview.png")
    return folder


def opened(path, **options):
    config = DataConfig(name="images", path=str(path), **options)
    return open_data(config, channels=3, size=(4, 4), num_classes=None, takes_text=True)


def seen(path, **options):
    """Grey values and captions, in order."""
    batch = (dataset := opened(path, **options)).load(range(len(dataset)))
    greys = ((batch.images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    assert batch.captions == tuple(f"grey {grey}" for grey in greys)
    return greys


def refused(message, path, **options):
    with pytest.raises(ValueError, match=message):
        opened(path, **options)


# ------------------------------------------------------------------------------------------------------- folders


def test_a_parquet_folder_gives_the_split_that_is_asked_for(hub_layout):
    assert seen(hub_layout) == seen(hub_layout, split="train") == [0, 10, 20]
    assert seen(Path("clone"), split="test") == [30, 40, 50]
    assert opened(hub_layout).name(1) == f"{hub_layout}[1]"
    refused(r"'val', subset None: Unknown split \"val\".*\['train', 'test'\]", hub_layout, split="val")
    refused("subset 'big'.*'big' not found.*default", hub_layout, subset="big")
    refused("data.revision: got '1f3e.*is a folder", hub_layout, revision=COMMIT)


def test_a_subset_is_chosen_where_there_are_several(tmp_path):
    for subset, value in [("light", 200), ("dark", 10)]:
        write(tmp_path / "many", f"{subset}/train-00000-of-00001.parquet", [value])
    lines = [f"- config_name: {name}\n  data_files: {name}/*.parquet" for name in ("light", "dark")]
    (tmp_path / "many/README.md").write_text("---\nconfigs:\n" + "\n".join(lines) + "\n---\n")
    assert seen(tmp_path / "many", subset="dark") == [10] and seen(tmp_path / "many", subset="light") == [200]
    refused("Config name is missing.*'light', 'dark'", tmp_path / "many")


def test_parquet_files_beside_images_are_not_the_images(tmp_path):
    """img2dataset writes 00000.parquet, what it knows of the images, beside the folder 00000."""
    write(tmp_path / "crawl", "00000.parquet", [1, 2, 3])
    assert seen(tmp_path / "crawl") == [1, 2, 3]
    (tmp_path / "crawl/00000").mkdir()
    table([70])[0]["image"].save(tmp_path / "crawl/00000/0.png")
    (tmp_path / "crawl/00000/0.txt").write_text("grey 70")
    assert seen(tmp_path / "crawl") == [70]
    refused("data.split: got 'train', but .*crawl is not a Hugging Face dataset", tmp_path / "crawl", split="train")


def test_splits_saved_on_disk_are_chosen_by_name(tmp_path):
    datasets.DatasetDict(train=table([0]), test=table([5, 6])).save_to_disk(str(tmp_path / "saved"))
    assert seen(tmp_path / "saved") == [0] and seen(tmp_path / "saved", split="test") == [5, 6]
    assert seen(tmp_path / "saved/test") == [5, 6] and opened(tmp_path / "saved/test").version is None
    refused("data.split: .* has no 'tset'; did you mean 'test'", tmp_path / "saved", split="tset")
    refused("data.split: got 'train', but .*test is one split", tmp_path / "saved/test", split="train")
    refused("data.subset: got 'x', but .*saved on disk", tmp_path / "saved", subset="x")


def test_a_datasets_script_does_not_run(hub_layout, tmp_path):
    (hub_layout / "clone.py").write_text(f"open({str(tmp_path / 'it-ran')!r}, 'w').close()\n")
    refused("data.path: .*clone.*scripts are no longer supported, but found clone.py", hub_layout)
    assert not (tmp_path / "it-ran").exists()


def test_a_damaged_parquet_file_is_one_error(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/train-00000-of-00001.parquet").write_bytes(b"PAR1 not really PAR1")
    refused("train-00000-of-00001.parquet: cannot be read as parquet", tmp_path / "broken")


# ------------------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(hub_layout, converted, monkeypatch):
    """``load_dataset`` of one id: the folder's content, converted to where a commit's would be; asked: its calls."""
    load, asked = datasets.load_dataset, []

    def stand_in(path, name=None, *, split, revision, **options):
        asked.append((path, name, split, revision))
        assert "trust_remote_code" not in options
        found = load(str(hub_layout), name, split=split, **options)
        (source,) = {Path(file["filename"]) for file in found.cache_files}
        folder = converted / "someone___pictures/default/0.0.0" / (revision or stand_in.newest)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / source.name).exists():
            os.link(source, folder / source.name)
        return datasets.Dataset.from_file(str(folder / source.name), info=found.info, split=found.split)

    stand_in.newest, stand_in.asked = COMMIT, asked
    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    return stand_in


def test_an_id_of_the_hub_is_asked_of_load_dataset(hub):
    assert seen(OWN) == [0, 10, 20] and seen(OWN, split="test", revision=NEWER) == [30, 40, 50]
    assert set(hub.asked) == {(OWN, None, "train", None), (OWN, None, "test", NEWER)}
    assert opened(OWN).version == f"{COMMIT} default/train" and opened(OWN).name(2) == f"{OWN}[2]"


def test_offline_datasets_has_what_it_fetched_and_no_other_commit(hub_layout, converted):
    """No stand-in, but for the fetching. ``datasets`` takes what it has, whatever the revision; we do not."""
    datasets.load_dataset(str(hub_layout.rename(hub_layout.with_name("pictures"))))
    (fetched,) = (path.parent for path in converted.glob("pictures/default/0.0.0/*/dataset_info.json"))
    place = converted / "someone___pictures/default/0.0.0" / COMMIT
    place.parent.mkdir(parents=True)
    fetched.rename(place)
    assert seen(OWN) == seen(OWN, revision=COMMIT) == [0, 10, 20] and seen(OWN, split="test") == [30, 40, 50]
    assert opened(OWN).version == f"{COMMIT} default/train"
    refused(f"data.revision: expected {NEWER}, which is not available.*got {OWN} at {COMMIT}", OWN, revision=NEWER)


def test_without_the_hub_the_error_says_what_was_tried_and_what_to_do():
    """No stand-in: the tests run with HF_HUB_OFFLINE."""
    refused(
        re.escape(f"data.path: {OWN}: no such file or folder here, and datasets.load_dataset('{OWN}', None, split='x')")
        + r" failed: Couldn't reach.*\.save_to_disk\('pictures'\), and give that folder",
        OWN, split="x",
    )  # fmt: skip


def test_a_mistyped_path_is_not_asked_of_the_hub(hub, hub_layout):
    refused("clone/dta: no such file or folder; did you mean 'data'", "clone/dta")
    refused("nowhere/x.npz: no such file or folder$", "nowhere/x.npz")
    refused("a/b/c: no such file or folder$", "a/b/c")
    assert not hub.asked


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "noise", "split": "test"}, "split: got 'test', but 'noise' reads no dataset"),
        ({"name": "prompts", "path": "p.txt", "subset": "x"}, "subset: got 'x', but 'prompts' reads no dataset"),
        (
            {"name": "images", "path": OWN, "revision": "main"},
            "revision: expected a commit .*got 'main'",
        ),
    ],
)
def test_keys_that_nothing_would_read(section, message):
    with pytest.raises(ConfigError, match=message):
        build(DataConfig, section, "data")


# ------------------------------------------------------------------------------------------------------- identity


def test_a_cache_names_the_split_and_the_content(hub_layout, hub):
    found = [files(opened(path, **options), str(path)) for path, options in [
        (hub_layout, {}), (hub_layout, {"split": "test"}), (OWN, {}), (OWN, {"revision": NEWER})
    ]]  # fmt: skip
    assert len(set(found)) == 4
    write(hub_layout, "data/train-00001-of-00002.parquet", [20, 21])
    assert files(opened(hub_layout, max_samples=3), str(hub_layout)) != found[0]


def test_a_moved_folder_is_the_same_content(hub_layout, tmp_path):
    before = opened(hub_layout)
    moved = hub_layout.rename(tmp_path / "elsewhere")
    os.utime(moved / "data/test-00000-of-00001.parquet", (1, 1))
    after = opened(moved)
    assert before.version == after.version


def test_a_run_goes_on_with_the_commit_it_began_with(tmp_path, hub):
    wanted = sections(tmp_path, SD.tiny(), "lcm", steps=2)
    wanted["data"] = {"name": "images", "path": OWN, "batch_size": 2}
    wanted["train"]["output_dir"] = str(tmp_path / "run")
    run = Run(resolve(wanted))
    assert run.identity.values["data (version)"] == f"{COMMIT} default/train"
    run.train()
    hub.newest = NEWER
    with pytest.raises(CheckpointError, match=rf"data \(version\): was '{COMMIT} default/train', is '{NEWER} default"):
        Run(resolve(wanted)).train()
    wanted["data"]["revision"] = COMMIT
    Run(resolve(wanted)).train()
