"""What is computed again in the backward pass changes no bit of the gradient, and keeps less meanwhile."""

from __future__ import annotations

import torch

from tests.distributed.launch import launch
from tests.tiny_models import save_tiny_model


def test_recomputation_saves_memory_and_changes_no_bit(tmp_path):
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6}
    folder = save_tiny_model("qwen3_untied", tmp_path / "model", **shape)
    found = launch("recompute_cases.recomputed", 1, tmp_path, folder=folder)[0]
    none, selective, full = (found[name] for name in ("none", "selective", "full"))
    assert none["gradient"].norm() > 0
    assert torch.equal(selective["gradient"], none["gradient"]) and torch.equal(full["gradient"], none["gradient"])
    # the attention core alone leaves nine tenths
    assert selective["peak"] < 0.7 * none["peak"] and full["peak"] < 0.5 * selective["peak"]
