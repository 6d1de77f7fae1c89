"""What Megatron is told of Transformer Engine and Apex: what really imports, on a machine that claims a GPU."""

from __future__ import annotations

import importlib.abc
import os
import re
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer import TransformerConfig

from megatron_reheat.errors import ConfigError
from megatron_reheat.model.backend import choose_backend
from megatron_reheat.model.checkpoint import _ensure_optimizer_state
from megatron_reheat.parallel import kernel_order
from megatron_reheat.parallel.kernel_order import needs_one_queue, order_kernels
from megatron_reheat.processes import helper_environment
from megatron_reheat.recipe import parse_config

FUSED = "fused_weight_gradient_mlp_cuda"


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def stand_in(*names: str) -> None:
        for name in names:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))

    return stand_in


@pytest.mark.parametrize("has_extension", [False, True])
def test_weight_gradients_are_fused_only_where_apex_brings_it(install, has_extension: bool) -> None:
    install("transformer_engine", "transformer_engine.pytorch", *[FUSED] * has_extension)
    backend = choose_backend("auto")
    assert (backend.attention, backend.optimizer) == ("transformer_engine", "transformer_engine")
    assert backend.fused_weight_gradient == has_extension


def test_megatron_builds_its_output_layer_with_what_is_chosen(install, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here is no Apex, so that Megatron refuses a layer that is told to fuse."""
    install("transformer_engine", "transformer_engine.pytorch")
    fused = choose_backend("auto").fused_weight_gradient
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_group", lambda check_initialized=True: None)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=1,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=fused,
    )
    layer = tensor_parallel.ColumnParallelLinear(8, 16, config=config, init_method=torch.nn.init.ones_, bias=False)
    assert layer.weight.shape == (16, 8)


def test_a_transformer_engine_that_does_not_load_is_not_there(install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("transformer_engine")  # its package is there, its extension is not
    assert choose_backend("auto").attention == "sdpa"
    with pytest.raises(
        ConfigError, match=r"transformer-engine, and it does not import here; use model\.attention=auto"
    ):
        choose_backend("transformer_engine")


@pytest.mark.parametrize("broken", ["transformer_engine.pytorch", "apex.optimizers"])
@pytest.mark.parametrize("error", [FileNotFoundError("Could not find shared object file"), RuntimeError("empty\nmeta")])
def test_what_megatron_would_die_of_is_said_before(
    install, monkeypatch: pytest.MonkeyPatch, broken: str, error: Exception
) -> None:
    """Megatron takes an ImportError alone for an absence."""
    names = [broken.partition(".")[0], broken]
    install(*names)
    monkeypatch.delitem(sys.modules, broken)

    class Refusing(importlib.abc.MetaPathFinder):
        def find_spec(self, fullname: str, *_: object) -> None:
            if fullname == broken:
                raise error

    sys.modules[names[0]].__path__ = []  # a package
    monkeypatch.setattr(sys, "meta_path", [Refusing(), *sys.meta_path])
    said = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    with pytest.raises(ConfigError, match=re.escape(f"{broken} is installed and does not load ({said})")) as caught:
        choose_backend("auto")
    assert "\n" not in str(caught.value) and "pip uninstall -y " in str(caught.value)


def test_apex_without_its_extensions_is_refused_where_megatron_would_take_its_adam(install) -> None:
    install("apex", "apex.optimizers")
    with pytest.raises(ConfigError, match=r"apex is installed without its CUDA extensions.*pip uninstall -y apex"):
        choose_backend("auto")
    install("amp_C")
    assert choose_backend("auto").optimizer == "apex"
    sys.modules.pop("amp_C")
    install("transformer_engine", "transformer_engine.pytorch")
    assert choose_backend("auto").optimizer == "transformer_engine"


class CountsStepsByGroup(torch.optim.SGD):
    """As Transformer Engine's and Apex's AdamW do, of whose state a parameter's moments are all."""


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(CountsStepsByGroup, {"exp_avg", "exp_avg_sq"}), (torch.optim.AdamW, {"exp_avg", "exp_avg_sq", "step"})],
)
def test_a_save_before_the_first_update_has_moments_of_any_optimizer(
    kind: type[torch.optim.Optimizer], expected: set[str]
) -> None:
    """Of which Megatron asks for each by name; it makes those of fused ones for itself when it loads, and not when it saves."""
    parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
    optimizer = kind(parameters, lr=0.1)
    engine: Any = SimpleNamespace(torch_optimizers=lambda: [optimizer])
    _ensure_optimizer_state(engine)
    for parameter in parameters:
        state = optimizer.state[parameter]
        assert state.keys() == expected
        assert state["exp_avg"].shape == parameter.shape and not any(value.any() for value in state.values())
    optimizer.state[parameters[0]]["exp_avg"] += 1
    _ensure_optimizer_state(engine)
    assert optimizer.state[parameters[0]]["exp_avg"].all()  # what is there stays


def test_selective_recomputation_repeats_no_flash_attention(install) -> None:
    assert choose_backend("auto").recomputed_modules == ["mlp", "core_attn"]
    install("transformer_engine", "transformer_engine.pytorch")
    assert choose_backend("auto").recomputed_modules == ["mlp"]


# Megatron's rule: tensor parallelism before Blackwell
@pytest.mark.parametrize(
    ("tensor", "architecture", "needed"),
    [(1, 9, False), (1, None, False), (2, 8, True), (2, 9, True), (2, None, True), (2, 10, False), (8, 12, False)],
)
def test_which_gpus_need_their_kernels_in_order(tensor: int, architecture: int | None, needed: bool) -> None:
    assert needs_one_queue(tensor, architecture) == needed


def test_kernels_are_ordered_for_context_parallelism(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_order, "gpu_architecture", lambda: 9)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "")
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    parallel = {"context": 2, "data": 1}
    order_kernels(parse_config({"model": {"hf_path": "m"}, "data": {"path": "d"}, "parallel": parallel}))
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"


@pytest.mark.parametrize(
    ("tensor", "architecture", "before", "after"),
    [(1, 9, None, None), (2, 9, None, "1"), (2, 9, "8", "8"), (2, 10, None, None)],
)
def test_kernels_are_ordered_for_tensor_parallelism_in_the_trainer_alone(
    tensor: int, architecture: int, before: str | None, after: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    monkeypatch.setattr(kernel_order, "gpu_architecture", lambda: architecture)
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    order_kernels(
        parse_config({"model": {"hf_path": "m"}, "data": {"path": "d"}, "parallel": {"tensor": tensor, "data": 1}})
    )
    assert os.environ.get(name) == after and name not in helper_environment()
    monkeypatch.delenv(name, raising=False)  # what was set here
