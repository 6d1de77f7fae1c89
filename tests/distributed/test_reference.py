"""The reference policy: exact under every layout, invisible to training, and the same when another layout reads it again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.distributed.launch import launch
from tests.tiny_models import save_tiny_model

BF16 = {"dtype": "bfloat16"}
BEGINS = [
    {"tensor": 2},
    {"data": 2},
    {"data": 2, **BF16},
    {"data": 2, "distributed_optimizer": False, **BF16},
    {"pipeline": 2, **BF16},  # a tied embedding on both stages
    {"pipeline": 2, "virtual_pipeline": 2, **BF16},
]
RESUMES = [{"tensor": 2}, {"pipeline": 2}, {"pipeline": 2, "virtual_pipeline": 2}]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("reference")
    folder = save_tiny_model("qwen3_tied", root / "m")
    return root, launch("references", 2, root, folder=folder, begins=BEGINS, resumes=RESUMES, root=root)


@pytest.mark.parametrize("index", range(len(BEGINS)), ids=lambda index: str(BEGINS[index]))
def test_the_reference_is_the_policy_of_then_and_training_does_not_notice_it(results, index):
    for rank in results[1]:
        begun = rank["begun"][index]
        assert begun["as_it_was"] and begun["differs"]
        assert begun["undisturbed"] and begun["same_step"]


@pytest.mark.parametrize("index", range(len(BEGINS)), ids=lambda index: str(BEGINS[index]))
def test_it_is_kept_as_a_hugging_face_folder_to_the_bit(results, index):
    root, (main, _) = results
    exported, kept = main["begun"][index]["exported"], root / f"kept-{index}"
    stored = {n: t for file in kept.glob("*.safetensors") for n, t in load_file(file).items()}
    assert stored.keys() == exported.keys()
    assert all(torch.equal(stored[n], t) and stored[n].dtype == t.dtype for n, t in exported.items())
    AutoModelForCausalLM.from_pretrained(kept)


@pytest.mark.parametrize("index", range(len(RESUMES)), ids=lambda index: str(RESUMES[index]))
def test_another_layout_reads_the_same_reference(results, index):
    for rank in results[1]:
        first, resumed = rank["begun"][0], rank["resumed"][index]
        assert resumed["unmoved"]
        for a, b in zip(first["scores"].logprobs, resumed["scores"].logprobs, strict=True):
            if index == 0:  # the same layout: the same bits
                assert a.tobytes() == b.tobytes()
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_digest_does_not_depend_on_the_layout_but_on_the_weights(results):
    digests = [[b["digest"] for b in rank["begun"]] for rank in results[1]]
    assert digests[0] == digests[1] and len(digests[0][0]) == 16
    assert digests[0][0] != digests[0][2]


def test_a_reference_that_is_not_the_runs_own_is_refused(results):
    for rank in results[1]:
        for resumed in rank["resumed"]:
            never, other = resumed["refusals"]
            assert never.startswith("this run's RL began without a reference policy") and "run.fork_from" in never
            assert "kept-0 does not hold the weights with which this run's RL began" in other and "rl.kl_coef" in other
