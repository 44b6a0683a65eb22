"""An export on the hub, through huggingface_hub's own client, against a stand-in of the hub on this machine."""

import json
import os
import shlex
import shutil

import huggingface_hub
import pytest
from contracts.cases import sections
from export.hub_stand_in import TOKEN, serving
from huggingface_hub import ModelCard

from stepdistill import load_pipeline
from stepdistill.cli import main
from stepdistill.config import to_yaml
from stepdistill.export.pipeline import ExportConfig
from stepdistill.export.sharing import check_upload, public_files, upload
from stepdistill.families.pixel import Pixel
from stepdistill.files.schema import ConfigError, build
from stepdistill.training.config import resolve
from stepdistill.training.run import Run

NAME = "anna/student"


@pytest.fixture
def hub(monkeypatch):
    with serving() as (hub, address):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with all that a run leaves beside its export."""
    folder = tmp_path_factory.mktemp("somewhere")
    return Run(resolve(sections(folder, Pixel.tiny(), "lcm", "adapter", steps=1, save_every=1))).train()


@pytest.fixture
def export(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "pipeline")


def test_a_run_uploads_its_student_and_nothing_else_as_one_commit(hub, tmp_path, capfd):
    wanted = sections(tmp_path, Pixel.tiny(), "lcm", steps=1, save_every=1)
    (tmp_path / "config.yaml").write_text(to_yaml(wanted | {"export": {"push_to_hub": NAME, "private": True}}))
    main(["train", "--config", str(tmp_path / "config.yaml")])
    assert hub.commits == 1 and hub.private == {NAME}
    written = {str(path.relative_to(tmp_path / "run/pipeline")) for path in (tmp_path / "run/pipeline").rglob("*.*")}
    assert hub.repositories[NAME].keys() == written | {".gitattributes"}
    assert TOKEN.encode() not in b"".join(hub.bodies) and str(tmp_path).encode() not in b"".join(hub.bodies)
    said = capfd.readouterr()
    assert f"{NAME}/commit/" in said.out and TOKEN not in said.out + said.err


def test_what_lies_in_an_export_but_is_not_of_it_stays_here(hub, export):
    names = set(public_files(export))
    for other in (".env", "notes.txt", "checkpoint-5/unet.safetensors", "unet/optimizer.pt", "unet/.secret.json",
                  "unet/events.log", "config.yaml", "secrets.json", "lora/run.py"):  # fmt: skip
        (export / other).parent.mkdir(exist_ok=True)
        (export / other).write_text("{}")
    upload(export, NAME, private=False)
    assert set(hub.repositories[NAME]) - {".gitattributes"} == names


def test_what_is_uploaded_is_a_pipeline_whose_card_opens_it_from_the_hub(hub, export, tmp_path):
    upload(export, NAME, private=False)
    for path, content in hub.repositories[NAME].items():
        (tmp_path / "got" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "got" / path).write_bytes(content)
    assert load_pipeline(tmp_path / "got").contract.steps == load_pipeline(export).contract.steps
    card = (tmp_path / "got/README.md").read_text()
    assert f'from_pretrained("{NAME}"' in card and f'load_pipeline(snapshot_download("{NAME}"))' in card
    assert "path/to" not in card and ModelCard(card).data.library_name == "diffusers"
    contract = json.loads(hub.repositories[NAME]["stepdistill.json"])
    assert contract["teacher"] == "teacher" and "_name_or_path" in json.loads(
        hub.repositories[NAME]["unet/config.json"]
    )


def test_what_was_added_to_the_teacher_is_named_without_its_path(hub, export):
    contract = json.loads((export / "stepdistill.json").read_text())
    options = {"config": "../secret/base", "lora": ["~/secret/ink.safetensors", "lab/ink"], "lora_weights": [0.5, 0]}
    contract["teacher_options"] = options | {"embeddings": {"<cat>": "secret/words/cat.safetensors"}}
    (export / "stepdistill.json").write_text(json.dumps(contract))
    upload(export, NAME, private=False)
    assert json.loads(hub.repositories[NAME]["stepdistill.json"])["teacher_options"] == {
        "config": "base", "lora": ["ink.safetensors", "lab/ink"], "lora_weights": [0.5, 0],
        "embeddings": {"<cat>": "cat.safetensors"},
    }  # fmt: skip


def test_a_second_upload_removes_what_the_new_export_lacks_and_nothing_else(hub, export):
    upload(export, NAME, private=False)
    ours = hub.repositories[NAME]
    ours["unet/diffusion_pytorch_model-00001-of-00002.safetensors"] = ours["examples/a.json"] = ours["notes.md"] = b"x"
    upload(export, NAME, private=False)
    assert hub.commits == 2 and {"examples/a.json", "notes.md"} < set(ours)
    assert "unet/diffusion_pytorch_model-00001-of-00002.safetensors" not in ours


def test_an_organisation_of_the_user_is_written_to(hub, export):
    upload(export, "lab/student", private=False)
    assert "stepdistill.json" in hub.repositories["lab/student"]


# ------------------------------------------------------------------------------------- refused before training


@pytest.mark.parametrize("name", ["student", "a/b/c", "anna/stu dent", "anna/.x", "anna/x--y", "", "anna/x.git"])
def test_a_malformed_name_is_one_sentence(name):
    with pytest.raises(ConfigError, match=r"export: push_to_hub: expected user/name of letters"):
        build(ExportConfig, {"push_to_hub": name}, "export")


def test_links_and_a_private_nowhere_are_refused():
    with pytest.raises(ValueError, match="frozen: expected copy with push_to_hub"):
        ExportConfig(push_to_hub=NAME, frozen="link")
    with pytest.raises(ValueError, match="private: expected push_to_hub"):
        ExportConfig(private=True)


def public(hub):
    hub.repositories[NAME] = {"stepdistill.json": b""}


def foreign(hub):
    hub.repositories[NAME] = {"README.md": b"", "thesis.pdf": b""}
    hub.private.add(NAME)


def reading(hub):
    hub.role = "read"


def unknown_token(hub):
    os.environ["HF_TOKEN"] = "hf_other"


def no_token(hub):
    del os.environ["HF_TOKEN"]


def down(hub):
    huggingface_hub.constants.ENDPOINT = "http://127.0.0.1:9"


def offline(hub):
    huggingface_hub.constants.HF_HUB_OFFLINE = True


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (public, f"{NAME}: expected a private repository, got a public one"),
        (foreign, f"{NAME}: expected a new repository or an earlier export, got one with thesis.pdf"),
        (reading, "expected a token that may write, got one that may only read"),
        (unknown_token, "the hub does not know the token: log in with 'hf auth login'"),
        (no_token, "expected a token that may write: log in with 'hf auth login', or set HF_TOKEN"),
        (down, "the hub cannot be reached"),
        (offline, "the hub cannot be reached"),
    ],
)
def test_what_would_fail_later_is_one_sentence(hub, monkeypatch, wrong, message):
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nowhere/token")
    wrong(hub)
    with pytest.raises(ValueError, match="export.push_to_hub: ") as said:
        check_upload(NAME, private=True)
    assert message in str(said.value) and "\n" not in str(said.value) and TOKEN not in str(said.value)
    assert not any("POST" in asked for asked in hub.asked)


def test_a_repository_of_someone_else_is_refused(hub):
    with pytest.raises(ValueError, match="emil/x: expected a repository of anna or Lab, to whom the token belongs"):
        check_upload("emil/x", private=False)


def test_a_run_is_refused_before_its_first_step(hub, tmp_path):
    foreign(hub)
    run = Run(resolve(sections(tmp_path, Pixel.tiny(), "lcm") | {"export": {"push_to_hub": NAME}}))
    with pytest.raises(ValueError, match=r"thesis\.pdf"):
        run.train()
    assert not list((tmp_path / "run").glob("*"))


# ---------------------------------------------------------------------------------------------- after training


@pytest.mark.parametrize(
    ("route", "code", "reason"),
    [
        ("repos/create", 403, "the token may not write there"),
        ("PUT /storage", 400, "Bad request"),
        ("/commit/", 500, "500"),
    ],
)
def test_a_failed_upload_keeps_the_export_and_says_the_command_that_repeats_it(
    hub, export, capsys, route, code, reason
):
    before = {path: path.read_bytes() for path in export.rglob("*.*")}
    hub.refuses[route] = code
    with pytest.raises(ValueError, match=rf"export.push_to_hub: {NAME}: .*{reason}") as said:
        upload(export, NAME, private=True)
    assert {path: path.read_bytes() for path in export.rglob("*.*")} == before and hub.commits == 0
    hub.refuses.clear()
    command = shlex.split(str(said.value).partition("upload it with: ")[2])
    assert command[0] == "stepdistill"
    main(command[1:])
    assert hub.commits == 1 and hub.private == {NAME} and f"{NAME}/commit/" in capsys.readouterr().out


def test_the_command_export_uploads_where_its_flags_say(hub, finished, tmp_path, capsys):
    main(["export", "--config", str(finished.parent / "config.yaml"), "--output", str(tmp_path / "student"),
          "--push_to_hub", NAME])  # fmt: skip
    assert hub.commits == 1 and (tmp_path / "student/README.md").is_file()
    with pytest.raises(SystemExit):
        main(["push", "--pipeline", str(tmp_path), "--push_to_hub", NAME])
    assert "expected the folder of an export" in capsys.readouterr().err


def test_only_the_main_process_uploads(hub, export, monkeypatch):
    monkeypatch.setattr("stepdistill.networks.sharding.is_main", lambda: False)
    main(["push", "--pipeline", str(export), "--push_to_hub", NAME])
    assert hub.asked == []
