"""What this machine offers to Megatron: Transformer Engine and Apex where they import, Megatron's own modules otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Literal

import torch

from megatron_reheat.errors import ConfigError

Attention = Literal["sdpa", "transformer_engine"]
# the packages that each consists of
_TRANSFORMER_ENGINE = "transformer-engine transformer-engine-torch transformer-engine-cu12 transformer-engine-cu13"
_APEX = "apex"


@dataclass(frozen=True)
class Backend:
    """The one place that decides which implementation runs; the choice is printed at start-up."""

    attention: Attention
    fused_weight_gradient: bool
    optimizer: Literal["transformer_engine", "apex", "torch"]

    @property
    def recomputed_modules(self) -> list[str]:
        """What selective recomputation repeats: the parts of a layer that keep more than they cost.

        That is the MLP everywhere. Transformer Engine's attention keeps nothing of size; the local one keeps padded copies of
        its inputs. Norms are no choice: Megatron repeats them with Transformer Engine only, where they are part of products.
        """
        return ["mlp"] if self.attention == "transformer_engine" else ["mlp", "core_attn"]

    def __str__(self) -> str:
        layers = "Transformer Engine" if self.attention == "transformer_engine" else "Megatron local + torch SDPA"
        fused = "fused" if self.fused_weight_gradient else "not fused"
        return f"layers: {layers}; AdamW: {self.optimizer}; weight-gradient accumulation: {fused}"


def choose_backend(attention: Literal["auto", "sdpa", "transformer_engine"]) -> Backend:
    """Looks for CUDA, Transformer Engine and Apex.

    Raises:
        ConfigError: `model.attention=transformer_engine` where it cannot run; or one of the two is installed in a way in
            which Megatron cannot be imported, or builds no optimizer.
    """
    has_cuda = torch.cuda.is_available()
    has_te = has_cuda and _imports("transformer_engine.pytorch", _TRANSFORMER_ENGINE)
    has_apex = has_cuda and _imports("apex.optimizers", _APEX)
    if has_apex and not has_te and not _imports("amp_C", _APEX):
        raise ConfigError(
            "apex is installed without its CUDA extensions, and Megatron-Core would take its AdamW, which needs them: build it "
            f"again (bash scripts/setup_gpu.sh build), or pip uninstall -y {_APEX}"
        )
    if attention == "transformer_engine" and not has_te:
        missing = "the package transformer-engine, and it does not import here" if has_cuda else "a CUDA device"
        raise ConfigError(f"model.attention=transformer_engine needs {missing}; use model.attention=auto")
    if attention == "auto":
        attention = "transformer_engine" if has_te else "sdpa"
    return Backend(
        attention=attention,
        # Apex's kernel accumulates into main_grad inside the backward matmul. Transformer Engine's layers bring their own, but
        # the output layer is Megatron's in any case, which is not built without Apex's.
        fused_weight_gradient=has_cuda and _imports("fused_weight_gradient_mlp_cuda", _APEX),
        optimizer="transformer_engine" if has_te else "apex" if has_apex else "torch",
    )


def _imports(module: str, packages: str) -> bool:
    """Really, as Megatron tries it, for which an ImportError is an absence, and nothing else is: a shared library that is not
    there or was built for another torch is another error to some."""
    try:
        import_module(module)
    except ImportError:
        return False
    except Exception as error:
        said = (str(error).splitlines() or [""])[0]
        raise ConfigError(
            f"{module} is installed and does not load ({type(error).__name__}: {said}), and with it Megatron-Core does not "
            f"either: build it again (bash scripts/setup_gpu.sh build), or pip uninstall -y {packages}"
        ) from None
    return True
