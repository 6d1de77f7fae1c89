"""A Hugging Face folder is computed as transformers computes it or refused by name, by every command alike."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from examples.countdown_cpu.make_model import make_tokenizer
from megatron_reheat.cluster.preflight import check
from megatron_reheat.commands.convert import from_hf
from megatron_reheat.data.tokenizer import end_token_id, read_tokenizer, stop_token_ids, turn_end_id
from megatron_reheat.errors import ConfigError, ReheatError
from megatron_reheat.evaluation.evaluate import evaluate
from megatron_reheat.evaluation.results import EvalOptions
from megatron_reheat.model import conversion as convert
from megatron_reheat.model.backend import choose_backend
from megatron_reheat.model.hf_reader import HFReader
from megatron_reheat.model.hf_weights import load_hf_weights, read_model_folder, tensor_shapes
from megatron_reheat.model.provider import build_model, read_hf_config
from megatron_reheat.recipe import load_config
from megatron_reheat.stages.inputs import read_inputs
from tests.e2e import runs
from tests.tiny_models import FAMILIES, VOCAB_SIZE, save_tiny_model

Spoil = Callable[[Path], None]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.5,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
OTHER_LENGTHS = {"low_freq_factor": 2.0, "high_freq_factor": 6.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 5000.5, "factor": 3.0}
OLD_LINEAR = {"type": "linear", "factor": 3.0}
YARN = {"rope_type": "yarn", "rope_theta": 5000.5, "factor": 4.0, "original_max_position_embeddings": 64}
OLD_LLAMA3 = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny_model(family, root / family) for family in FAMILIES}


@pytest.fixture
def copy(models: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a family's folder that a test may spoil."""
    return lambda family: Path(shutil.copytree(models[family], tmp_path / family))


def config_with(*dropped: str, **changes: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        tree = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in tree.items() if key not in dropped}))

    return spoil


def weights_with(change: Callable[[dict[str, Tensor]], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SINGLE)

    return spoil


def cast_to(dtype: torch.dtype) -> Spoil:
    return weights_with(lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items()}))


def with_tensor(name: str, tensor: Tensor) -> Spoil:
    return weights_with(lambda tensors: tensors.update({name: tensor}))


def with_file(name: str, text: str) -> Spoil:
    return lambda folder: (folder / name).write_text(text) and None


# -- what is read is what transformers reads -------------------------------------------------------------------------

READ_RIGHT: dict[str, tuple[str, Spoil]] = {
    "a fractional rope_theta": ("llama", config_with(rope_parameters={"rope_type": "default", "rope_theta": 50.75})),
    "rope_theta of transformers 4": ("qwen3_untied", config_with("rope_parameters", rope_theta=77.5)),
    "no rope settings": ("llama", config_with("rope_parameters")),
    "llama3 rope": ("qwen3_untied", config_with(rope_parameters=LLAMA3)),
    "llama3 rope of transformers 4": (
        "llama",
        config_with("rope_parameters", rope_theta=5000.5, rope_scaling=OLD_LLAMA3),
    ),
    "llama3 rope of other lengths": ("qwen2", config_with(rope_parameters={**LLAMA3, **OTHER_LENGTHS})),
    "linear rope": ("llama", config_with(rope_parameters=LINEAR)),
    "linear rope of transformers 4": (
        "mistral",
        config_with("rope_parameters", rope_theta=77.5, rope_scaling=OLD_LINEAR),
    ),
    "yarn": ("qwen2", config_with(rope_parameters=YARN)),
    "yarn with its own sharpness": ("qwen3_tied", config_with(rope_parameters={**YARN, "attention_factor": 1.5})),
    "yarn with other ramps": (
        "llama",
        config_with(rope_parameters={**YARN, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False}),
    ),
    "another epsilon": ("qwen3_tied", config_with(rms_norm_eps=0.3)),
    "float16": ("qwen3_tied", cast_to(torch.float16)),
    "float64": ("llama", cast_to(torch.float64)),
    "bfloat16": ("qwen3_untied", cast_to(torch.bfloat16)),
    "buffers of old versions": (
        "llama",
        with_tensor("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(3)),
    ),
}


@torch.no_grad()
def megatron_logits(folder: Path, tokens: Tensor) -> Tensor:
    read_model_folder(folder)
    with convert._single_process(folder, torch.float32) as (hf, config, topology):
        model = build_model(hf, config, topology, choose_backend("sdpa"))
        load_hf_weights(model, HFReader(folder), topology)
        return convert._logits(model.last.eval(), tokens)[:, : hf.vocab_size]


@torch.no_grad()
def largest_gap(folder: Path) -> float:
    tokens = torch.arange(3, 100)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens[None]).logits[0]
    return (megatron_logits(folder, tokens) - expected).abs().max().item()


@pytest.mark.parametrize("kind", READ_RIGHT)
def test_logits_are_those_of_transformers(copy: Any, kind: str) -> None:
    family, change = READ_RIGHT[kind]
    folder = copy(family)
    change(folder)
    assert largest_gap(folder) < 1e-4


def test_a_tied_head_that_is_saved_too(copy: Any) -> None:
    folder = copy("qwen3_tied")
    weights_with(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))(folder)
    assert largest_gap(folder) < 1e-4


def test_shards_are_read_through_their_index(copy: Any) -> None:
    folder = copy("llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / SINGLE).unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"of another save, and in no index")
    assert (folder / INDEX).is_file() and largest_gap(folder) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_those_of_transformers(models: dict[str, Path], family: str) -> None:
    hf = read_hf_config(models[family])
    with torch.device("meta"):
        parameters = dict(AutoModelForCausalLM.from_config(hf).named_parameters())
    assert tensor_shapes(hf) == {name: tuple(p.shape) for name, p in parameters.items()}


# -- what is refused, and how it is named ----------------------------------------------------------------------------

CONFIGS: dict[str, tuple[Spoil, str]] = {
    "fp8": (config_with(quantization_config={"quant_method": "fp8"}), "quantised (config.json's quantization_config: fp8)"),
    "unnamed quantization": (config_with(quantization_config={}), "quantised (config.json's quantization_config)"),
    "old compressed-tensors": (config_with(compression_config={"format": "x"}), "quantised (config.json's compression_conf"),
    "mlx": (config_with(quantization={"bits": 4}), "quantised (config.json's quantization)"),
    "modelopt": (with_file("hf_quant_config.json", "{}"), "quantised (hf_quant_config.json)"),
    "rope_theta as text": (config_with(rope_parameters={"rope_theta": "1e6"}), "rope_theta '1e6' (a number above 0 is)"),
    "no rope_theta": (config_with(rope_parameters={"rope_theta": None}), "rope_theta None"),
    "rope_theta 0": (config_with(rope_parameters={"rope_theta": 0}), "rope_theta 0 "),
    "dynamic rope": (config_with(rope_parameters={"rope_type": "dynamic", "factor": 2.0}), "rope_type 'dynamic' (default, l"),
    "old dynamic rope": (config_with(rope_scaling={"type": "dynamic", "factor": 2.0}), "rope_type 'dynamic'"),
    "linear rope to 0": (config_with(rope_parameters={**LINEAR, "factor": 0.0}), "factor 0.0 in the settings of linear rope"),
    "yarn for fewer positions": (
        config_with(rope_parameters={**YARN, "factor": 2.0}), "yarn rope of 64 x 2 positions for max_position_embeddings 256"
    ),
    "yarn with what vLLM does not read": (config_with(rope_parameters={**YARN, "low_freq_factor": 1}), "low_freq_factor in t"),
    "partial rope": (config_with(partial_rotary_factor=0.5), "partial_rotary_factor 0.5 (1 is)"),
    "rope by layer type": (config_with(rope_parameters={"full_attention": {"rope_theta": 5.0}}), "full_attention in the"),
    "overruled llama3 rope": (
        config_with(rope_parameters=LLAMA3, original_max_position_embeddings=64),
        "original_max_position_embeddings 64 beside 8192 in the rope settings",
    ),
    "incomplete llama3 rope": (config_with(rope_parameters={"rope_type": "llama3"}), "config.json is not a valid config"),
    "sliding window": (config_with(sliding_window=8, use_sliding_window=True), "sliding-window attention"),
    "sliding layers": (config_with(layer_types=["sliding_attention"] * 4), "layer_types ['sliding_attention']"),
    "not causal": (config_with(is_causal=False), "is_causal False"),
    "soft caps": (config_with(attn_logit_softcapping=50.0, final_logit_softcapping=30.0), "attn_logit_softcapping 50.0; fin"),
    "scaled logits": (config_with(logit_scale=0.5), "logit_scale 0.5"),
    "values by layer": (config_with(per_layer_config={"0": {"rms_norm_eps": 0.5}}), "per_layer_config {'0': "),
    "biases by vLLM's name": (config_with(qkv_bias=True), "qkv_bias True"),
    "other weights": (config_with(transformers_weights="other.safetensors"), "transformers_weights 'other.safetensors'"),
    "another family": (config_with(architectures=["MistralForCausalLM"]), "architectures ['MistralForCausalLM'] (of llama"),
    "another head": (config_with(architectures=["LlamaForSequenceClassification"]), "architectures ['LlamaForSequence"),
    "no architecture": (config_with("architectures"), "architectures None"),
    "heads in unequal groups": (config_with(num_key_value_heads=3), "num_attention_heads 8, no multiple of num_key_value"),
    "no layers": (config_with(num_hidden_layers=0), "num_hidden_layers 0 (1 and more is)"),
    "a padding token beyond": (config_with(pad_token_id=VOCAB_SIZE), "pad_token_id 131 (the vocabulary ends at 130)"),
    "a number as text": (config_with(hidden_size="48"), "config.json is not a valid configuration"),
    "no dtype": (config_with(dtype="float9"), "config.json is not a valid configuration"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_config_json_asks_for_and_is_not_computed(copy: Any, kind: str) -> None:
    folder = copy("llama")
    spoil, words = CONFIGS[kind]
    spoil(folder)
    with pytest.raises(ConfigError) as refused:
        read_hf_config(folder)
    message = str(refused.value)
    assert words in message and str(folder) in message and "\n" not in message


def shards(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / SINGLE).unlink()
    model.save_pretrained(folder, max_shard_size="50KB")


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-0*.safetensors"))


def stale_index(folder: Path) -> None:
    shards(folder)
    tensors = load_file(first_shard(folder))
    tensors.pop(min(tensors))
    save_file(tensors, first_shard(folder))


def tensor_in_two_shards(folder: Path) -> None:
    shards(folder)
    first, second = sorted(folder.glob("model-0*.safetensors"))[:2]
    save_file({**load_file(first), **load_file(second)}, first)


def saved_as_one_file_over_shards(folder: Path) -> None:
    whole = load_file(folder / SINGLE)
    shards(folder)
    save_file(whole, folder / SINGLE)


def saved_by_transformers_over_shards(folder: Path) -> None:
    shards(folder)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)  # removes the shards, leaves the index


def index_to(file: str) -> Spoil:
    def spoil(folder: Path) -> None:
        shutil.copy(folder / SINGLE, folder.parent / "elsewhere.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(load_file(folder / SINGLE), file)}))

    return spoil


def pytorch_file_only(folder: Path) -> None:
    torch.save(load_file(folder / SINGLE), folder / "pytorch_model.bin")
    (folder / SINGLE).unlink()


def without_weights(folder: Path) -> None:
    (folder / SINGLE).unlink()


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
WEIGHTS: dict[str, tuple[Spoil, str]] = {
    "float8 without a word of it": (cast_to(torch.float8_e4m3fn), "quantised tensors: lm_head.weight (F8_E4M3), "),
    "int8": (with_tensor(Q_PROJ, torch.ones(48, 48, dtype=torch.int8)), f"quantised tensors: {Q_PROJ} (I8); only"),
    "packed int32": (with_tensor("model.a.qweight", torch.ones(3, dtype=torch.int32)), "model.a.qweight (I32)"),
    "scales": (with_tensor(f"{Q_PROJ}_scale_inv", torch.ones(1)), f"does not call for: {Q_PROJ}_scale_inv; save"),
    "biases": (with_tensor("model.layers.0.self_attn.q_proj.bias", torch.ones(48)), "call for: model.layers.0.self_attn.q_"),
    "an adapter's": (with_tensor("model.layers.0.mlp.up_proj.lora_A.weight", torch.ones(2, 48)), "up_proj.lora_A.weight"),
    "more layers": (config_with(num_hidden_layers=3), "not call for: model.layers.3.input_layernorm.weight, "),
    "fewer layers": (config_with(num_hidden_layers=5), "lacks tensors its config.json calls for: model.layers.4."),
    "no head": (weights_with(lambda t: t.pop("lm_head.weight")), "calls for: lm_head.weight; save"),
    "another head": (config_with(tie_word_embeddings=True), "holds a lm_head.weight of its own, but config.json says"),
    "a larger vocabulary": (config_with(vocab_size=140), "lm_head.weight (131, 48) does not fit its config.json, which calls"),
    "a smaller vocabulary": (config_with(vocab_size=100), "which calls for (100, 48)"),
    "another MLP": (config_with(intermediate_size=96), "down_proj.weight (48, 80) does not fit its config.json, which calls"),
    "other groups": (config_with(num_key_value_heads=8), "k_proj.weight (24, 48) does not fit its config.json, which calls"),
    "another head_dim": (config_with(head_dim=8), "k_proj.weight (24, 48) does not fit its config.json"),
    "a stale index": (stale_index, f"{INDEX} is out of date: it has "),
    "a tensor twice": (tensor_in_two_shards, "both hold "),
    "a file beside shards": (saved_as_one_file_over_shards, f"holds {SINGLE} beside the files that {INDEX} names"),
    "an index left behind": (saved_by_transformers_over_shards, f"{INDEX} names it, but there is no such file; remove the"),
    "a missing shard": (lambda folder: (shards(folder), first_shard(folder).unlink())[1], f"{INDEX} names it, but there is"),
    "an index to elsewhere": (index_to("../elsewhere.safetensors"), "names ../elsewhere.safetensors, which is outside of"),
    "an absolute index": (index_to("/elsewhere.safetensors"), "names /elsewhere.safetensors, which is outside of"),
    "an empty index": (with_file(INDEX, '{"weight_map": {}}'), f"{INDEX} is damaged"),
    "a strange index": (with_file(INDEX, '{"weight_map": {"a": 1}}'), f"{INDEX} is damaged"),
    "an empty file": (with_file(SINGLE, ""), f"{SINGLE} cannot be read"),
    "no tensors": (lambda folder: save_file({}, folder / SINGLE), "lacks tensors its config.json calls for: lm_head.weight, "),
    "a pointer to a file": (with_file(SINGLE, "version https://git-lfs.github.com/spec/v1"), f"{SINGLE} cannot be read"),
    "pickled weights": (pytorch_file_only, f"has no {SINGLE} and no index of shards; save the model as safetensors"),
    "nothing": (without_weights, f"has no {SINGLE} and no index of shards"),
    "an adapter beside": (with_file("adapter_config.json", "{}"), "holds an adapter (adapter_config.json); merge it"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_are_not_the_models(copy: Any, kind: str) -> None:
    folder = copy("llama")
    spoil, words = WEIGHTS[kind]
    spoil(folder)
    with pytest.raises(ConfigError) as refused:
        read_model_folder(folder)
    message = str(refused.value)
    assert words in message and str(folder) in message and "\n" not in message


def test_an_adapter_alone(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds an adapter without its model; merge it"):
        from_hf(str(tmp_path), tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_never_given_out(copy: Any, dtype: torch.dtype, value: float) -> None:
    folder = copy("llama")
    tensors = {name: t.to(dtype) for name, t in load_file(folder / SINGLE).items()}
    tensors[Q_PROJ][7, 11] = value
    save_file(tensors, folder / SINGLE)
    reader = HFReader(folder)
    assert reader.get("lm_head.weight").dtype == dtype
    with pytest.raises(ReheatError, match=rf"{SINGLE}: {Q_PROJ} holds NaN or infinite values"):
        reader.get(Q_PROJ)


def test_a_model_is_stored_in_bfloat16_only_where_all_of_it_is(copy: Any, tmp_path: Path) -> None:
    folder = copy("llama")
    make_tokenizer().save_pretrained(folder)
    cast_to(torch.bfloat16)(folder)
    assert "in bfloat16;" in from_hf(str(folder), tmp_path / "bfloat16")
    weights_with(lambda t: t.update({n: w.float() for n, w in t.items() if n.endswith("norm.weight")}))(folder)
    assert "in float32;" in from_hf(str(folder), tmp_path / "float32")


# -- all commands agree ----------------------------------------------------------------------------------------------

EVERYWHERE: dict[str, Spoil] = {
    "config": CONFIGS["fp8"][0],
    "rope": CONFIGS["rope_theta as text"][0],
    "architectures": CONFIGS["another family"][0],
    "float8": cast_to(torch.float8_e4m3fn),
    "unknown tensor": WEIGHTS["biases"][0],
    "head": with_tensor("lm_head.weight", torch.ones(22, 32)),
    "index": WEIGHTS["an index to elsewhere"][0],
    "no weights": without_weights,
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "stop token": with_file("generation_config.json", '{"eos_token_id": 22}'),
    "vocabulary": lambda folder: make_tokenizer_with("<|im_end|>").save_pretrained(folder),
}


@pytest.mark.parametrize("kind", EVERYWHERE)
def test_all_commands_refuse_the_same_with_the_same_words(kind: str, tmp_path: Path) -> None:
    model = runs.make_model_folder(tmp_path / "model")
    EVERYWHERE[kind](model)
    config = load_config(runs.write_recipe(runs.recipe(model, tmp_path), tmp_path / "recipe.yaml"))
    options = EvalOptions(str(model), ("reasoning_gym:chain_sum",), template="raw", out=tmp_path / "eval")
    messages = []
    for command in (
        lambda: read_inputs(config),  # train
        lambda: check(config, gpu="cpu", console=Console(file=io.StringIO())),
        lambda: from_hf(str(model), tmp_path / "out"),
        lambda: evaluate(options, []),
    ):
        with pytest.raises(ConfigError) as refused:
            command()
        messages.append(str(refused.value))
    assert messages[0].startswith("model.hf_path: ") and "\n" not in messages[0]
    assert messages == [*messages[:1] * 3, messages[0].replace("model.hf_path: ", "MODEL: ")]
    assert not (tmp_path / "out").exists() and not (tmp_path / "eval").exists()


# -- the tokens that end a response ----------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = CHATML.replace(
    "{{ m.content }}", "{% if m.role == 'assistant' %}<think>\n\n</think>{% endif %}{{ m.content }}"
)


def make_tokenizer_with(*special: str, eos: str = "<eos>", template: str | None = None) -> PreTrainedTokenizerFast:
    """The demo's 22 tokens, and `special` from 22 on."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer().backend_tokenizer,
        pad_token="<pad>",
        eos_token=eos,
        extra_special_tokens=list(special),
    )
    tokenizer.chat_template = template
    return tokenizer


def stops(folder: Path, *, vocab_size: int = 30, config: Any = None, chat: bool = False) -> tuple[int, ...]:
    hf = SimpleNamespace(eos_token_id=config, vocab_size=vocab_size)
    return stop_token_ids(hf, read_tokenizer(folder), folder, chat=chat)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (None, None, (1,)),
        (None, {}, (1,)),
        (None, {"eos_token_id": None}, (1,)),
        (None, {"eos_token_id": 5}, (1, 5)),
        (7, {"eos_token_id": [5, 0]}, (0, 1, 5, 7)),
        ([7, 1], {"eos_token_id": [1]}, (1, 7)),
    ],
)
def test_a_response_ends_at_whatever_any_file_names(
    tmp_path: Path, config: Any, generation: Any, expected: tuple[int, ...]
) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert stops(tmp_path, config=config) == expected


@pytest.mark.parametrize("value", ["5", 1.0, True, -1, 30, [1, None], [1, 30], {"id": 1}])
def test_what_is_no_token_of_the_model_is_refused(tmp_path: Path, value: Any) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ConfigError) as refused:
        stops(tmp_path)
    assert (
        f"{tmp_path}: eos_token_id of generation_config.json is {value!r}, but the model's tokens are 0 to 29"
        in str(refused.value)
    )


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_damaged_generation_config_is_named(tmp_path: Path, text: str) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"generation_config.json is not a JSON object"):
        stops(tmp_path)


def test_a_negative_token_of_config_json_is_refused(copy: Any) -> None:
    folder = copy("llama")
    make_tokenizer().save_pretrained(folder)
    config_with(eos_token_id=[1, -1])(folder)
    with pytest.raises(ConfigError, match=r"eos_token_id of config.json is \[1, -1\]"):
        stop_token_ids(read_hf_config(folder), read_tokenizer(folder), folder)


def test_the_default_of_a_class_is_no_stop_token(copy: Any) -> None:
    """Llama's is 2, which is the digit 0 here."""
    folder = copy("llama")
    make_tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    config_with("eos_token_id")(folder)
    assert stop_token_ids(read_hf_config(folder), read_tokenizer(folder), folder) == (1,)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, 23),
        (THINKING, 23),
        ("{% for m in messages %}{{ m.content }} <|im_end|><eos>{% endfor %}", 23),
        ("{% for m in messages %}[{{ m.content }}]<eos>{% endfor %}", 1),
        ("{% for m in messages %}{{ m.content }}+{% endfor %}", None),  # ends in a text
        ("{{ messages[0].content }}<|im_end|>", None),  # shows no answer
        ("{{ raise_exception('no') }}", None),
        (None, None),
    ],
)
def test_the_end_of_a_turn_is_read_off_the_chat_template(template: str | None, expected: int | None) -> None:
    assert turn_end_id(make_tokenizer_with("<|im_start|>", "<|im_end|>", template=template)) == expected


def test_a_base_model_ends_its_turns_in_chat(tmp_path: Path) -> None:
    """Like Qwen3's base models: every file names the end of a document alone."""
    tokenizer = make_tokenizer_with("<|im_start|>", "<|im_end|>", template=CHATML)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 1}')
    assert stops(tmp_path, config=1) == (1,)
    assert stops(tmp_path, config=1, chat=True) == (1, 23)
    assert end_token_id(tokenizer, (1, 23), chat=True) == 23
    assert end_token_id(tokenizer, (1, 23)) == 1
    tokenizer.eos_token = None
    assert end_token_id(tokenizer, (5, 7)) == 5


@pytest.mark.parametrize(("override", "expected"), [("data.template=raw", 1), ("data.template=chat", 21)])
def test_a_run_stops_and_writes_answers_by_its_template(tmp_path: Path, override: str, expected: int) -> None:
    model = runs.make_model_folder(tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(
        {"extra_special_tokens": [" "]}
    )  # the last of the 22 tokens, in the part of an <|im_end|>
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(model)
    recipe = runs.recipe(model, tmp_path)
    recipe["eval"] = {}
    recipe["data"]["prompt_key"] = "answer"  # of the model's alphabet
    config = load_config(runs.write_recipe(recipe, tmp_path / "recipe.yaml"), [override])
    inputs = read_inputs(config)
    assert inputs.stop_token_ids == ((1,) if expected == 1 else (1, 21))
    assert inputs.encode("1+2") == [3, 12, 4, expected]
