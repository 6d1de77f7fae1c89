"""Every family and kind of rotary embedding in vLLM: an engine that was sent the weights samples what transformers would."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_reheat.config import RolloutConfig
from megatron_reheat.model.hf_weights import read_model_folder
from megatron_reheat.rollout.embedded import EmbeddedEngine
from megatron_reheat.rollout.weight_sync import WeightSync
from tests.e2e.agreement import PushedModel
from tests.tiny_models import FAMILIES, save_tiny_model

CONFIG = RolloutConfig(max_model_len=256, max_num_seqs=8, enforce_eager=True, kv_cache_mb=32, threads=1, timeout_s=300)
# beyond the 64 positions that the scaled kinds below begin from
PROMPTS = [[2 + (5 * i + 3 * j) % 120 for j in range(length)] for i, length in enumerate((6, 40, 150))]
ROPE = {
    "qwen2": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "mistral": {"rope_type": "linear", "factor": 3.0},
    "llama": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 6.0,
        "original_max_position_embeddings": 64,
    },
}


class Pushed(PushedModel):
    def __init__(self, folder: Path, engine: EmbeddedEngine) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.sync = WeightSync(engine, CONFIG)


# the rig of test_rollout_engine.py has the others
@pytest.mark.parametrize("family", sorted(ROPE))
def test_an_engine_samples_what_transformers_would(family: str, tmp_path: Path) -> None:
    heads = {"hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    if family == "qwen2":  # which has no head_dim of its own
        heads = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    rope = {**ROPE[family], "rope_theta": 5000.5}
    folder = save_tiny_model(family, tmp_path / "model", rope_parameters=rope, **heads)
    assert AutoConfig.from_pretrained(folder).rope_parameters["rope_type"] == ROPE[family]["rope_type"]
    read_model_folder(folder)
    engine = EmbeddedEngine(str(folder), CONFIG, dtype="float32", log_file=tmp_path / "engine.log")
    try:
        pushed = Pushed(folder, engine)
        assert pushed.push().verified
        pushed.assert_samples_alike(engine, PROMPTS)
    finally:
        engine.close()


def test_no_family_is_left_out() -> None:
    assert set(FAMILIES) == {*ROPE, "qwen3_tied", "qwen3_untied"}
