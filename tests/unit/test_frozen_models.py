"""The folders of `rl.samplers`: what is read of them, what is refused, and what their engines are started with."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_reheat.errors import ConfigError
from megatron_reheat.model.hf_reader import HFReader
from megatron_reheat.model.hf_weights import iter_folder_weights, read_model_folder, saved_dtype
from megatron_reheat.recipe import load_config, parse_config
from megatron_reheat.rollout.server.servers import Servers
from megatron_reheat.stages import server_engines
from megatron_reheat.stages.engines import EngineModel
from megatron_reheat.stages.inputs import read_frozen, read_inputs, read_model
from tests.e2e import runs
from tests.tiny_models import FAMILIES, save_tiny_model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_is_sent_as_vllm_expects_it(family: str, dtype: str, tmp_path: Path) -> None:
    """Sharded, with the buffers of old versions and, where it is tied, a head beside the embedding."""
    folder = save_tiny_model(family, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    state["lm_head.weight"] = model.lm_head.weight.detach().clone()
    (folder / "model.safetensors").unlink()
    files = {name: f"model-{number % 3}.safetensors" for number, name in enumerate(state)}
    for file in set(files.values()):
        save_file({name: state[name].contiguous() for name, its in files.items() if its == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    hf, reader = read_model_folder(folder), HFReader(folder)
    assert saved_dtype(reader) == dtype
    sent = list(iter_folder_weights(hf, reader, getattr(torch, dtype)))
    with torch.device("meta"):  # as the engine's end of a weight sync makes its list
        expected = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).named_parameters()
    assert sorted((n, tuple(t.shape)) for n, t in sent) == sorted((n, tuple(t.shape)) for n, t in expected)
    assert all(torch.equal(tensor, state[name]) for name, tensor in sent)
    layers = [int(name.split(".")[2]) for name, _ in sent if name.startswith("model.layers.")]
    assert layers == sorted(layers)  # so that the engine keeps one incomplete layer at a time


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name in ("policy", "explorer"):
        runs.make_model_folder(root / name)
    return root


def recipe(root: Path, **changes: Any) -> dict[str, Any]:
    tree = runs.recipe(root / "policy", root)
    tree["rl"] |= {"method": "s2l_po", "samplers": {"explorer": str(root / "explorer")}}
    return {**tree, **{name: {**tree[name], **keys} for name, keys in changes.items()}}


def copy_of(root: Path, to: Path, **changes: Any) -> Path:
    to.mkdir()
    for file in (root / "explorer").iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **changes}))
    return to


def frozen(root: Path, folder: Path, **changes: Any) -> Any:
    config = parse_config(
        recipe(root, **{"rl": {"method": "s2l_po", "samplers": {"explorer": str(folder)}}, **changes})
    )
    return read_frozen(config, "explorer", read_model(config.model, chat=False))


def test_it_has_a_context_and_a_dtype_of_its_own(folders: Path, tmp_path: Path) -> None:
    folder = copy_of(folders, tmp_path / "short", max_position_embeddings=20)  # 12 of a prompt, 8 of a response
    model = frozen(folders, folder)
    assert (model.max_model_len, model.dtype, model.notes) == (20, "float32", ())
    with pytest.raises(
        ConfigError, match=r"rl\.samplers\.explorer: data\.max_prompt_tokens \+ rollout\.max_tokens = 21 .* 20"
    ):
        frozen(folders, folder, rollout={"max_tokens": 9})


def test_another_vocabulary_is_refused_and_another_template_noted(folders: Path, tmp_path: Path) -> None:
    folder = copy_of(folders, tmp_path / "other")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["8"], vocabulary["9"] = vocabulary["9"], vocabulary["8"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=r"rl\.samplers\.explorer: the tokenizer of .* is not that of .*same family"):
        frozen(folders, folder)
    with pytest.raises(ConfigError, match=r"rl\.samplers\.explorer: .* does not exist; point it at a"):
        frozen(folders, tmp_path / "nowhere")

    folder = copy_of(folders, tmp_path / "template", eos_token_id=[1, 5])
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    chat = {"template": "chat", "prompt_key": "question"}
    template, end = frozen(folders, folder, data=chat).notes
    assert "its chat template differs" in template and "ends its responses, but not the policy's" in end


def test_a_whole_recipe_reads_its_frozen_models(folders: Path) -> None:
    path = runs.write_recipe(recipe(folders), folders / "recipe.yaml")
    inputs = read_inputs(load_config(path))
    assert list(inputs.frozen) == ["explorer"] and inputs.frozen["explorer"].folder.path == folders / "explorer"


# -- servers -----------------------------------------------------------------------------------------------------------

SERVER = {"mode": "server"}


@pytest.mark.parametrize(
    ("rl", "rollout", "expected"),
    [
        (
            {"sampler_servers": {"explore": ["http://a:1"]}},
            SERVER,
            r"rl\.sampler_servers\.explore: .*no model of that name",
        ),
        ({"sampler_servers": {"explorer": ["http://a:1"]}}, {}, r"rl\.sampler_servers needs rollout\.mode=server"),
        (
            {"sampler_servers": {"explorer": ["http://a:1"]}},
            {**SERVER, "servers": ["http://a:1"]},
            r"rollout\.servers and rl\.sampler_servers name a server twice",
        ),
        ({"sampler_servers": {"explorer": ["a:1"]}}, SERVER, "is not the URL of a server"),
    ],
)
def test_servers_of_frozen_models_are_checked(rl: Any, rollout: Any, expected: str) -> None:
    tree = {"model": {"hf_path": "m"}, "data": {"path": "p"}, "rollout": rollout}
    with pytest.raises(ConfigError, match=expected):
        parse_config({**tree, "rl": {"samplers": {"explorer": "e"}, **rl}})


def test_models_get_gpus_and_ports_of_their_own(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []
    monkeypatch.setattr(server_engines, "visible_gpus", lambda: tuple("abcdefgh"))
    monkeypatch.setattr(server_engines, "ServerProcess", lambda *_, **keys: started.append(keys))
    topology: Any = SimpleNamespace(world_size=4, local_world_size=4, device=torch.device("cuda", 0))
    config = parse_config(recipe(folders, rollout={**SERVER, "num_servers": 2}, run={"folder": str(tmp_path)}))
    own = {"dtype": "float32", "rollout": config.rollout}
    models = [
        EngineModel(folders / "policy", **own),
        EngineModel(
            folders / "explorer", **own, log="vllm-explorer", keys=("rl.sampler_servers.explorer", "m"), name="explorer"
        ),
    ]
    for model in models:
        for make in server_engines.server_makers(model, config, topology, None).values():
            make()
    assert [keys["gpus"] for keys in started] == [("e",), ("f",), ("g",), ("h",)]
    assert len({keys["port"] for keys in started}) == len({keys["log_file"] for keys in started}) == 4
    monkeypatch.setattr(server_engines, "visible_gpus", lambda: tuple("abcdefg"))
    with pytest.raises(ConfigError, match="for each of 2 models need 8 GPUs, and this machine has 7"):
        server_engines.server_makers(models[0], config, topology, None)
    topology.world_size = 8
    with pytest.raises(ConfigError, match=r"rl\.sampler_servers\.explorer is empty"):
        server_engines.server_makers(models[1], config, topology, None)


def test_a_server_of_another_model_is_named_by_the_key_it_was_given_with(folders: Path) -> None:
    hf = AutoConfig.from_pretrained(folders / "explorer")
    rollout = parse_config(recipe(folders, rollout={"max_model_len": 20})).rollout
    servers = Servers([], {}, rollout, hf, "b", keys=("rl.sampler_servers.explorer", "rl.samplers.explorer"))
    shape = {"vocab_size": 1, "hidden_size": 1, "intermediate_size": 1, "num_hidden_layers": 1}
    info: Any = SimpleNamespace(version="0.32.0", shape=shape, model="other")
    try:
        with pytest.raises(
            ConfigError, match=r"rl\.sampler_servers\.explorer: u serves other .* but rl\.samplers\.explorer has"
        ):
            servers._check("u", info)
    finally:
        servers.close()
