"""`reheat convert --push` and `model.revision`, by the Hub's own client against a stand-in for the Hub (`hub_stand_in`)."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from examples.countdown_cpu.make_model import make_tokenizer
from megatron_reheat.cli import main
from megatron_reheat.commands.convert import from_hf
from megatron_reheat.config import ModelConfig
from megatron_reheat.errors import ConfigError
from megatron_reheat.model.architecture import read_architecture
from megatron_reheat.model.provider import resolve_hf_folder
from megatron_reheat.recipe import load_config
from tests.tiny_models import save_tiny_model
from tests.unit.hub_stand_in import TOKEN, Hub, running_hub

NAME = "jane/reheated"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        files = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        # the stand-in does not know Xet, the Hub's own storage protocol
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        yield hub


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with one checkpoint."""
    root = tmp_path_factory.mktemp("push")
    folder = save_tiny_model("llama", root / "model")
    make_tokenizer().save_pretrained(folder)
    from_hf(str(folder), root / "run")
    return root / "run"


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    """What stands for a converted folder, with things beside that are no part of it."""
    folder = tmp_path / "converted"
    (folder / "samples").mkdir(parents=True)
    (folder / "samples" / "private.json").write_text("{}")
    (folder / "notes.md").write_text("mine")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "README.md").write_text(
        '---\nlibrary_name: transformers\n---\n\n# trial, step 120\n\nname = "converted"\n'
    )
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["convert", *arguments]) == 1
    *progress, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and not any("error" in line for line in progress)
    return error


def test_a_converted_checkpoint_arrives_whole(
    run: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["--to-hf", str(run), str(out), "--no-verify", "--push", NAME, "--private", "--revision", "step-0"]
    assert main(["convert", *arguments]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == f"{hub.endpoint}/{NAME}, branch step-0: {len(list(out.iterdir()))} files, as 'step 0'"
    assert hub.repositories[NAME]["private"] and not hub.branch(NAME, "main")["files"]
    arrived = hub.branch(NAME, "step-0")
    assert arrived["messages"] == ["step 0"]
    assert arrived["files"] == {path.name: path.read_bytes() for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= arrived["files"].keys()
    card = arrived["files"]["README.md"].decode()
    assert f'name = "{NAME}"' in card and f'LLM(model="{NAME}")' in card and str(tmp_path.parent) not in card
    # and is read back from there, by its branch
    config = ModelConfig(hf_path=NAME, revision="step-0")
    folder = resolve_hf_folder(config)
    assert read_architecture(config).num_hidden_layers == 4
    models = [AutoModelForCausalLM.from_pretrained(place).state_dict() for place in (folder, out)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[1])
    from_hf(NAME, tmp_path / "again", "step-0")
    assert load_config_tree(tmp_path / "again")["revision"] == "step-0"
    with pytest.raises(ConfigError, match=rf"model\.hf_path: {NAME} at model\.revision step-9 is neither"):
        resolve_hf_folder(ModelConfig(hf_path=NAME, revision="step-9"))


def load_config_tree(run: Path) -> dict[str, str]:
    import yaml

    tree: dict[str, str] = yaml.safe_load((run / "config.yaml").read_text())["model"]
    return tree


def test_a_folder_that_was_converted_before_is_sent_without_what_lies_beside(
    hub: Hub, converted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # again into what is there
        assert main(["convert", "--converted", str(converted), "--push", NAME]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{hub.endpoint}/{NAME}: 3 files, as 'step 120'"
    arrived = hub.branch(NAME, "main")
    assert arrived["files"].keys() == {"config.json", "model.safetensors", "README.md"}
    assert arrived["files"]["model.safetensors"] == b"weights" and not hub.repositories[NAME]["private"]
    assert f'name = "{NAME}"\n' in arrived["files"]["README.md"].decode()
    (converted / "README.md").unlink()
    assert main(["convert", "--converted", str(converted), "--push", "lab/other"]) == 0
    assert hub.branch("lab/other", "main")["messages"] == ["upload converted"]


def deny(status: int, at: str) -> Callable[[Hub, pytest.MonkeyPatch], None]:
    return lambda hub, monkeypatch: hub.refuse.update({at: status})


def reader(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.account["auth"] = {"accessToken": {"role": "read"}}


def public(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories[NAME] = {"private": False, "branches": {"main": {"files": {}, "messages": []}}}


def silent(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")


@pytest.mark.parametrize(
    ("arguments", "change", "message"),
    [
        (["--push", "reheated"], None, "--push reheated does not say whose it is; give USER/NAME"),
        (["--push", "a/b/c"], None, "--push a/b/c: Repo id must be in the form"),
        (["--push", "jane/re heated"], None, "--push jane/re heated: "),
        (["--push", NAME, "--revision", "a b"], None, "--revision 'a b' is no name of a branch"),
        (["--push", NAME], lambda _, m: m.setattr(constants, "HF_HUB_OFFLINE", True), "HF_HUB_OFFLINE is set"),
        (["--push", NAME], lambda _, m: m.delenv("HF_TOKEN"), "no token for http"),
        (["--push", NAME], silent, "does not answer; try again, or convert without --push"),
        (["--push", NAME], lambda _, m: m.setenv("HF_TOKEN", "old"), "does not accept the token (401); log in again with `hf"),
        (["--push", NAME], reader, "the token may only read"),
        (["--push", "joe/x"], None, "the token is jane's, who may not write for joe; push to jane/..."),
        (["--push", NAME, "--private"], public, f"--private: {NAME} is there already and public"),
        (["--push", NAME], deny(500, "GET /api/whoami"), f"--push {NAME}: "),
    ],
    ids=["no-user", "deep", "space", "branch", "offline", "no-token", "silent", "old-token", "reader", "joe", "public", "500"],
)  # fmt: skip
def test_what_would_be_refused_is_told_before_the_conversion(
    arguments: list[str],
    change: Callable[[Hub, pytest.MonkeyPatch], None] | None,
    message: str,
    run: Path,
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if change is not None:
        change(hub, monkeypatch)
    assert message in refused(capsys, "--to-hf", str(run), str(tmp_path / "out"), *arguments)
    assert (not (tmp_path / "out").exists() and NAME not in hub.repositories) or change is public


@pytest.mark.parametrize("at", ["POST /api/repos/create", "POST /api/models/jane/reheated/commit"])
def test_an_upload_that_is_refused_leaves_the_folder_and_says_how_to_go_on(
    at: str, hub: Hub, converted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.refuse[at] = 403
    error = refused(capsys, "--converted", str(converted), "--push", NAME)
    assert (
        f"error: {converted} was not uploaded: the token may not write to {NAME} (403); log in with one that" in error
    )
    again = f"try again with reheat convert --converted {converted} --push {NAME}"
    assert error.endswith(again) and (converted / "model.safetensors").exists()
    hub.refuse.clear()
    assert main(again.split("reheat ")[1].split()) == 0


def test_a_connection_that_breaks_is_one_sentence(
    hub: Hub, converted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise httpx.ConnectError("[Errno 104] Connection reset by peer\nmore")

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", broken)
    error = refused(capsys, "--converted", str(converted), "--push", NAME, "--revision", "b", "--private")
    assert "ConnectError: [Errno 104] Connection reset by peer; the folder is complete" in error
    assert error.endswith(f"--push {NAME} --private --revision b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--converted", "x"], "say where to with --push USER/NAME"),
        (["--converted", "nowhere", "--push", NAME], "nowhere is no converted model"),
        (["--from-hf", "a", "b", "--push", NAME], "which --from-hf does not make"),
        (["--to-hf", "a", "b", "--private"], "--private is for --push"),
        (["--to-hf", "a", "b", "--revision", "x"], "--revision is for --push or --from-hf"),
    ],
)
def test_options_that_do_not_go_together(
    arguments: list[str], message: str, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, *arguments)


def test_a_folder_has_no_revisions(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "recipe.yaml").write_text(f"model: {{hf_path: {tmp_path}, revision: v1}}\ndata: {{path: x.jsonl}}\n")
    model = load_config(tmp_path / "recipe.yaml").model
    for read in (resolve_hf_folder, read_architecture):
        with pytest.raises(
            ConfigError, match=rf"model\.revision v1: {tmp_path} is a folder of this machine, which has no"
        ):
            read(model)
