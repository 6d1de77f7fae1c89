"""Checkpoint <-> Hugging Face folder, offline: one process, no GPU, no optimizer.

To Hugging Face, tensors are read one at a time, brought into shape by the same rules as the weight sync (`hf_weights`) and
written shard by shard: one shard and the parameter being read, twice, are all that is in memory. What is written are the
model's parameters: of a bfloat16 run the bfloat16 ones that vLLM sampled with, not the optimizer's float32 copies.

`megatron_reference` makes what the result is compared with: Megatron's own loader, its own model and its own forward pass,
none of which shares code with the conversion. Comparing takes memory of about twice the model in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from megatron_reheat.config import Config
from megatron_reheat.errors import ConfigError, ReheatError
from megatron_reheat.model.backend import choose_backend
from megatron_reheat.model.checkpoint import install_checkpoint_fixes, load_weights
from megatron_reheat.model.checkpoint_reader import CheckpointReader
from megatron_reheat.model.checkpoint_save import save_weights
from megatron_reheat.model.engine import FINAL_NORM
from megatron_reheat.model.families import head_dim
from megatron_reheat.model.hf_reader import HFReader
from megatron_reheat.model.hf_weights import (
    AttentionShape,
    ParameterPlan,
    load_hf_weights,
    tensor_shapes,
    to_hf_tensors,
    whole_model_rules,
)
from megatron_reheat.model.hf_writer import write_hf_folder
from megatron_reheat.model.packed_sequences import PackedSequences
from megatron_reheat.model.provider import build_model, read_hf_config
from megatron_reheat.parallel import topology as parallel_topology
from megatron_reheat.parallel.topology import Topology
from megatron_reheat.recipe import parse_config

PROMPT_LENGTHS = (4, 9, 16)
GREEDY_TOKENS = 8
# float32 forward passes of two implementations; relative to the largest logit where that exceeds 1
LOGIT_TOLERANCE = 3e-4


@dataclass(frozen=True)
class _Parameter:
    """One Megatron parameter: where it is stored (`layer` is its row of a stack) and what it becomes."""

    plan: ParameterPlan
    layer: int | None


class HFExport:
    """A checkpoint seen as the Hugging Face model that its configuration describes.

    Args:
        checkpoint: a verified `step-N` folder.
        hf_folder: where the configuration, generation configuration and tokenizer come from.
        temperature: what the exported model's logits are the checkpoint's divided by.

    Raises:
        ConfigError: the checkpoint holds a model of another architecture or shape than `hf_folder`'s config.json.
    """

    def __init__(self, checkpoint: Path, hf_folder: Path, temperature: float = 1.0) -> None:
        self.hf = read_hf_config(hf_folder)
        self._temperature = temperature
        self._hf_folder = hf_folder
        self._reader = CheckpointReader(checkpoint)
        shapes = tensor_shapes(self.hf)
        self._parameters = _plan(self.hf, hf_folder, self._reader, shapes)
        self.dtype = self._parameters[0].plan.dtype
        self._shapes = {name: shapes[name] for p in self._parameters for name in p.plan.hf_names}
        self._dtypes = {name: p.plan.dtype for p in self._parameters for name in p.plan.hf_names}

    @property
    def num_parameters(self) -> int:
        """In the Hugging Face model, without the vocabulary's padding; a tied head counts once."""
        return sum(torch.Size(shape).numel() for shape in self._shapes.values())

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, tensor), one parameter in memory at a time."""
        attention = AttentionShape(self.hf.num_attention_heads, self.hf.num_key_value_heads, head_dim(self.hf))
        for parameter in self._parameters:
            # no name for what is read: it would stay in memory while the next is
            yield from to_hf_tensors(parameter.plan, [self._read(parameter)], attention, self.hf.vocab_size)

    def _read(self, parameter: _Parameter) -> Tensor:
        plan, layer = parameter.plan, parameter.layer
        if layer is not None:
            return self._reader.read(plan.name, layer, layer + 1)[0]
        if plan.name == FINAL_NORM and self._temperature != 1.0:
            return self._reader.read(plan.name, 0, plan.shape[0]) / self._temperature
        # the padding of the vocabulary is not read at all
        return self._reader.read(plan.name, 0, self.hf.vocab_size if plan.kind == "rows" else plan.shape[0])

    def write(self, folder: Path, *, shard_bytes: int, stop_token_ids: Sequence[int]) -> None:
        """Everything of a Hugging Face folder, into an existing one (`write_hf_folder`)."""
        write_hf_folder(
            folder,
            self,
            hf=self.hf,
            source=self._hf_folder,
            shapes=self._shapes,
            dtypes=self._dtypes,
            shard_bytes=shard_bytes,
            stop_token_ids=stop_token_ids,
        )


def _plan(hf: Any, hf_folder: Path, reader: CheckpointReader, shapes: dict[str, tuple[int, ...]]) -> list[_Parameter]:
    parameters, used, problems = [], set(), []
    missing = dict.fromkeys(shapes)
    for name, layer, kind, hf_names in whole_model_rules(hf.num_hidden_layers):
        if layer is not None:
            stacked, single = f"decoder.layers.{name}", f"decoder.layers.{layer}.{name}"
            name, layer = (stacked, layer) if stacked in reader.shapes else (single, None)
        if name not in reader.shapes or hf_names[0] not in missing:
            continue
        used.add(name)
        for hf_name in hf_names:
            del missing[hf_name]
        parts = [shapes[n] for n in hf_names]
        expected: tuple[int, ...] = (sum(part[0] for part in parts), *parts[0][1:])
        stored = reader.shapes[name]
        if kind == "rows" and stored[0] >= expected[0]:
            expected = (stored[0], *expected[1:])  # padded for the tensor parallelism of the run
        if layer is not None:
            expected = (hf.num_hidden_layers, *expected)
        if stored != expected:
            problems.append(f"{name} is {_by(stored)} instead of {_by(expected)}")
            continue
        shape = stored if layer is None else stored[1:]
        parameters.append(_Parameter(ParameterPlan(name, kind, hf_names, shape, reader.dtype(name)), layer))
    problems += [f"no {name} in it" for name in missing]
    problems += [f"{name} in it, which that model does not have" for name in sorted(set(reader.shapes) - used)]
    if problems:
        # the layers of a stack all have the same problem
        distinct = list(dict.fromkeys(problems))
        more = f" and {len(distinct) - 3} more" if len(distinct) > 3 else ""
        raise ConfigError(
            f"{reader.checkpoint} is not a checkpoint of the model in {hf_folder / 'config.json'}: "
            f"{'; '.join(distinct[:3])}{more}; give the folder that the run started from with --hf-source"
        )
    return parameters


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


# -- verification --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """Greedy continuations of a few prompts by the checkpoint's Megatron model.

    `logits[i]` is [P + G - 1, V] float32: from the prompt's first token to the last but one of the continuation.
    """

    prompts: list[list[int]]
    continuations: list[list[int]]
    logits: list[Tensor]

    @property
    def tolerance(self) -> float:
        """How much a logit may differ: LOGIT_TOLERANCE, times the largest logit where that exceeds 1."""
        return LOGIT_TOLERANCE * max(1.0, *(logits.abs().max().item() for logits in self.logits))

    def logprobs(self, index: int) -> Tensor:
        """[G, V] of the continuation's tokens."""
        return self.logits[index][len(self.prompts[index]) - 1 :].log_softmax(-1)


@torch.no_grad()
def megatron_reference(
    checkpoint: Path, hf_folder: Path, dtype: torch.dtype = torch.float32, temperature: float = 1.0
) -> Reference:
    """Loads the checkpoint into a float32 Megatron model in this process and continues random prompts greedily.

    `dtype` is that of the export, to which the final norm's weight over `temperature` is rounded there.
    """
    with _single_process(hf_folder, torch.float32) as (hf, config, topology):
        whole = build_model(hf, config, topology, choose_backend(config.model.attention))
        load_weights(whole, checkpoint)
        model = whole.last.eval()
        norm = dict(model.named_parameters())[FINAL_NORM]
        norm.copy_(norm.to(dtype) / temperature)
        draw = torch.Generator().manual_seed(0)
        reference = Reference([], [], [])
        for length in PROMPT_LENGTHS:
            prompt = torch.randint(hf.vocab_size, (length,), generator=draw)
            tokens = prompt
            for _ in range(GREEDY_TOKENS):
                logits = _logits(model, tokens)[:, : hf.vocab_size]
                tokens = torch.cat([tokens, logits[-1:].argmax(-1)])
            reference.prompts.append(prompt.tolist())
            reference.continuations.append(tokens[length:].tolist())
            reference.logits.append(logits)
        return reference


def _logits(model: GPTModel, tokens: Tensor) -> Tensor:
    """[L] -> [L, padded V]."""
    borders, positions = torch.tensor([0, len(tokens)], dtype=torch.int32), torch.arange(len(tokens))
    packed = PackedSequences.of(borders, len(tokens), positions, model.frequencies)
    return model(tokens[None], positions[None], None, packed_seq_params=packed)[0]


@torch.no_grad()
def compare_with_transformers(folder: Path, reference: Reference) -> float:
    """Largest difference between transformers' logits and the reference's.

    Raises:
        ReheatError: it exceeds the tolerance, or transformers finds other tensors than it wants.
    """
    disable_progress_bar()
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if wrong := {key: sorted(map(str, names)) for key, names in report.items() if names}:
        raise ReheatError(f"transformers does not load the converted model as it is: {wrong}")
    gap = 0.0
    for prompt, continuation, expected in zip(
        reference.prompts, reference.continuations, reference.logits, strict=True
    ):
        tokens = torch.tensor([prompt + continuation[:-1]])
        difference = (model(tokens).logits[0] - expected).abs().max().item()
        gap = max(gap, difference) if difference == difference else float("nan")
    if not gap <= reference.tolerance:
        raise ReheatError(
            f"the converted model's logits differ from the checkpoint's by {gap:.2g} (limit {reference.tolerance:.2g})"
        )
    return gap


# -- from Hugging Face ---------------------------------------------------------------------------------------------------


def saved_as(hf_folder: Path, hf: Any) -> torch.dtype:
    """The dtype of a checkpoint with the folder's weights: bfloat16 where all of them are, else float32, which is exact for all
    but float64."""
    reader = HFReader(hf_folder)
    return torch.bfloat16 if all(reader.dtype(name) == "BF16" for name in tensor_shapes(hf)) else torch.float32


def write_checkpoint(
    hf_folder: Path, checkpoints: Path, state: dict[str, Any], dtype: torch.dtype, carried: Mapping[str, bytes]
) -> None:
    """Writes `checkpoints/step-0` with the weights of a Hugging Face folder in `dtype`. Takes three times its memory.

    Raises:
        ConfigError: the folder is incomplete or of an unsupported architecture.
    """
    reader = HFReader(hf_folder)
    with _single_process(hf_folder, dtype) as (hf, config, topology):
        install_checkpoint_fixes()
        model = build_model(hf, config, topology, choose_backend(config.model.attention))
        load_hf_weights(model, reader, topology)
        save_weights(model, topology, checkpoints, state, carried)


@contextmanager
def _single_process(hf_folder: Path, dtype: torch.dtype) -> Iterator[tuple[Any, Config, Topology]]:
    """Megatron with one rank, on CPU layers; its process group is left at the end."""
    config = parse_config(
        {
            "model": {
                "hf_path": str(hf_folder),
                "dtype": str(dtype).removeprefix("torch."),
                "attention": "sdpa",
                "fused_head": False,
            },
            "data": {"path": "none"},
        }
    )
    try:
        yield read_hf_config(hf_folder), config, parallel_topology.initialize(config)
    finally:
        parallel_topology.finalize()
