"""A run notices when its data has changed, and says what."""

import json
import logging
import shutil
import tarfile
import time

import numpy as np
import pytest
from contracts.cases import make_run, train_until
from PIL import Image

from stepdistill.data.base import DataConfig
from stepdistill.data.datasets import open_data
from stepdistill.data.inventory import Inventory, take_inventory
from stepdistill.training.checkpoint import Checkpoint
from stepdistill.training.run_state import SavedState

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


def inventory(path, *, text=False, name="images"):
    config = DataConfig(name=name, path=str(path))
    data = open_data(config, channels=3, size=(8, 8), num_classes=None, takes_text=text)
    return take_inventory(data, str(path))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images/sub").mkdir(parents=True)
    for number, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(tmp_path / "images" / ("sub" if number > 3 else "") / f"{number}.png")
    return tmp_path / "images"


def changed(before, path, **options):
    before.write(path.parent / "data.txt.gz")
    return inventory(path, **options).changes_since(path.parent / "data.txt.gz")


def test_files_that_were_added_removed_renamed_or_replaced_are_named(folder):
    """FAULTS 8."""
    before = inventory(folder)
    assert changed(before, folder) == [] and inventory(folder).digest == before.digest
    (folder / "0.png").unlink()
    (folder / "1.png").rename(folder / "new\nname.png")
    Image.fromarray(PIXELS[0]).resize((9, 9)).save(folder / "sub/4.png")
    assert changed(before, folder) == [
        "data removed: '0.png', '1.png'",
        r"data added: 'new\nname.png'",
        "data of another size or content: 'sub/4.png'",
    ]
    assert inventory(folder).digest != before.digest


def test_a_folder_that_moved_is_the_same(folder, tmp_path):
    before = inventory(folder)
    shutil.move(folder, tmp_path / "elsewhere")
    assert inventory(tmp_path / "elsewhere") == before
    assert inventory(f"{tmp_path}/elsewhere/") == before


def test_many_changes_are_counted(folder):
    before = inventory(folder)
    for number in range(8):
        Image.fromarray(PIXELS[0]).save(folder / f"more-{number}.png")
    assert changed(before, folder)[0].endswith("'more-4.png' and 3 more")


def test_captions_are_compared_by_content(folder):
    def write(texts):
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
        rows = [{"file_name": name, "text": text} for name, text in zip(names, texts, strict=True)]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))

    write(["a cat", "a dog", *"abcd"])
    before = inventory(folder, text=True)
    write(["a dog", "a cat", *"abcd"])
    assert changed(before, folder, text=True) == ["data of another size or content: 'captions'"]


def test_an_archive_is_compared_by_the_checksums_that_it_holds(tmp_path):
    path = tmp_path / "images.npz"
    np.savez(path, images=PIXELS)
    before = inventory(path)
    np.savez(path, images=PIXELS)
    assert inventory(path) == before  # whenever it was written
    np.savez(path, images=255 - PIXELS)
    assert changed(before, path) == ["data of another size or content: 'images.npy'"]


def test_prompts_and_tars(tmp_path, folder):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    before = inventory(prompts, name="prompts", text=True)
    prompts.write_text("a cow\na dog\n")
    assert changed(before, prompts, name="prompts", text=True) == ["data of another size or content: 'captions'"]
    tar = tmp_path / "tars" / "0.tar"
    tar.parent.mkdir()
    with tarfile.open(tar, "w") as archive:
        archive.add(folder / "0.png", "0.png")
    before = inventory(tar.parent)
    with tarfile.open(tar, "a") as archive:
        archive.add(folder / "1.png", "1.png")
    assert "data added: '0.tar!1.png'" in changed(before, tar.parent)


def test_a_damaged_inventory_is_named(tmp_path):
    (tmp_path / "data.txt.gz").write_bytes(b"\x1f\x8bjunk")
    with pytest.raises(ValueError, match=r"data\.txt\.gz: expected an inventory of the data"):
        Inventory({}).changes_since(tmp_path / "data.txt.gz")
    Inventory({str(name): "1" for name in range(100)}).write(tmp_path / "data.txt.gz")
    content = bytearray((tmp_path / "data.txt.gz").read_bytes())
    content[30:34] = b"\xff" * 4  # which zlib refuses, and not gzip
    (tmp_path / "data.txt.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"data\.txt\.gz: expected an inventory of the data"):
        Inventory({}).changes_since(tmp_path / "data.txt.gz")


# ---------------------------------------------------------------------------------------------------- a run


def test_a_run_on_data_that_changed_is_refused_and_says_what(tmp_path):
    """FAULTS 8."""
    train_until(make_run(tmp_path, "progressive", save_every=1), 1)
    path = tmp_path / "images.npz"
    arrays = dict(np.load(path))
    np.savez(path, **{name: array[1:] for name, array in arrays.items()})
    with pytest.raises(ValueError, match=r"data \(files\): was .* parts") as error:
        make_run(tmp_path, "progressive", save_every=1).train()
    assert "data of another size or content: 'images.npy'" in str(error.value)
    np.savez(path, **arrays)
    make_run(tmp_path, "progressive", save_every=1).train()


def test_a_checkpoint_that_does_not_tell_its_data_is_resumed_with_one_note(tmp_path, caplog):
    """FAULTS 8: old checkpoints."""
    run = make_run(tmp_path, "progressive")
    trainer = run.trainer()

    config = {key: value for key, value in trainer.identity.values.items() if key != "data (files)"}
    with caplog.at_level(logging.WARNING):
        state = SavedState(stage=0, stage_name="train", done=1, config=config)
        trainer.identity.check(Checkpoint(tmp_path / "checkpoint-1", 1, state))
    (message,) = caplog.messages
    assert message.endswith("checkpoint-1 does not record its data (files); assumed to be as now")


@pytest.mark.product
def test_the_inventory_of_a_large_folder_is_cheap(tmp_path):
    """100,000 files in less than 4 s."""
    (tmp_path / "many").mkdir()
    Image.fromarray(PIXELS[0]).save(tmp_path / "many/000000.png")
    for number in range(1, 100_000):
        (tmp_path / f"many/{number:06d}.png").touch()
    config = DataConfig(name="images", path=str(tmp_path / "many"))
    data = open_data(config, channels=3, size=(8, 8), num_classes=None)
    start = time.perf_counter()
    assert len(take_inventory(data, config.path).parts) == 100_000
    assert time.perf_counter() - start < 4
