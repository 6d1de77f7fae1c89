"""What only a GPU can show. Skipped, with the reason, where there is none."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_reheat.config import RolloutConfig
from megatron_reheat.losses import fused_tempered_kl, tempered_kl, vocab_logprobs
from megatron_reheat.model.backend import choose_backend
from megatron_reheat.parallel import cpu
from megatron_reheat.parallel.kernel_order import gpu_architecture
from megatron_reheat.parallel.vocab import VocabLogits
from megatron_reheat.ports import free_port
from megatron_reheat.rollout.embedded import EmbeddedEngine
from megatron_reheat.rollout.server.fleet import ServerFleet
from megatron_reheat.rollout.server.process import ServerProcess, transfer_backend
from megatron_reheat.rollout.server.servers import Servers
from megatron_reheat.rollout.server.weights import ServerWeights
from megatron_reheat.types import SamplingParams
from tests.distributed.launch import launch
from tests.distributed.test_checkpoint import dated_recipe
from tests.reference import LOGIT_CASES, dense_divergence, dense_kl, dense_logprobs, make_logits, relative_error
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", LOGIT_CASES)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_tempered_kl_on_the_device_matches_the_dense_reference(case, direction, dtype):
    """At Qwen3's vocabulary, where a sum has 151,936 terms."""
    logits = make_logits(case, 6, 151_936).to("cuda", dtype).requires_grad_()
    weights = torch.linspace(0.5, 1.5, 6, device="cuda")
    expected = dense_kl(logits, 1.2, direction, weights)
    result = tempered_kl(logits, temperature=1.2, direction=direction)
    (result.kl * weights).sum().backward()
    assert relative_error(result.entropy, expected.entropy) < 1e-5
    assert relative_error(result.kl, expected.kl) < 1e-4
    assert relative_error(logits.grad, expected.gradient) < (1e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("distance", [1e-2, 0.3, 10.0])
@pytest.mark.parametrize("measure", ["forward", "reverse", "js"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_divergences_on_the_device_match_the_dense_reference(distance, measure, dtype):
    others = torch.cat([make_logits(case, 2, 151_936) for case in ("gaussian", "sharp", "one_hot")]).to("cuda", dtype)
    noise = torch.randn(6, 151_936, generator=torch.Generator().manual_seed(1)).cuda()
    logits = (others.float() + distance * noise).to(dtype).requires_grad_()
    expected = dense_divergence(logits, others, measure, 1.3, torch.ones(6, device="cuda"))
    own, other = VocabLogits(logits, 151_936), VocabLogits(others, 151_936)
    value = (
        own.js_to(other, temperature=1.3) if measure == "js" else own.kl_to(other, direction=measure, temperature=1.3)
    )
    value.sum().backward()
    assert relative_error(value * 1e4, expected.value * 1e4) < 1e-5  # relative also where it is 1e-6 nats
    assert relative_error(logits.grad, expected.gradient) < (1e-5 if dtype == torch.float32 else 4e-3)


def test_logprobs_on_the_device_match_the_dense_reference():
    logits = make_logits("sharp", 6, 151_936).cuda().requires_grad_()
    targets = torch.arange(6, device="cuda") * 25_000
    expected = dense_logprobs(logits, targets, 0.9, entropy_weight=0.3)
    result = vocab_logprobs(logits, targets, temperature=0.9)
    (result.logprobs.sum() + 0.3 * result.entropy.sum()).backward()
    assert relative_error(result.logprobs, expected.logprobs) < 1e-5
    assert relative_error(logits.grad, expected.gradient) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_fused_head_on_the_device_matches_the_dense_reference(dtype):
    """In bfloat16, too, the logits are float32: the entropy is exact."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 256, generator=generator).to("cuda", dtype).requires_grad_()
    weight = (torch.randn(151_936, 256, generator=generator) / 4).to("cuda", dtype).requires_grad_()
    expected = dense_kl(hidden.detach().double() @ weight.detach().double().t(), 1.2, "forward", torch.ones(40).cuda())
    result = fused_tempered_kl(hidden, weight, temperature=1.2, chunk_tokens=16)
    result.kl.sum().backward()
    # float32 matrix products may run in TF32, whose logits are exact to three digits
    assert relative_error(result.entropy, expected.entropy) < 1e-3
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-3
    assert relative_error(hidden.grad, expected.gradient @ weight.detach().double()) < tolerance
    assert relative_error(weight.grad, expected.gradient.t() @ hidden.detach().double()) < tolerance


def test_the_cpu_backend_stays_out_of_the_way():
    assert cpu.install() is False
    assert torch.ones(1).cuda().is_cuda


def test_the_driver_knows_the_gpus_as_torch_does():
    oldest = min(torch.cuda.get_device_capability(index)[0] for index in range(torch.cuda.device_count()))
    assert gpu_architecture() == oldest


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two replicas need a GPU each")
def test_gradients_that_are_summed_early_are_the_same(tmp_path):
    """As `tests/distributed/test_overlap.py` does on a CPU; but kernels that add in any order round otherwise each time."""
    folder = save_tiny_model("qwen3_untied", tmp_path / "model")
    layouts = [{"data": 2, "bucket": 3000}, {"data": 2, "distributed_optimizer": False, "bucket": 3000}]
    runs = [(folder, layout) for layout in layouts]
    for rank in launch("overlap_cases.both_ways", 2, tmp_path, runs=runs):
        for ways in rank:
            assert ways[True]["early"] == [[False] + 6 * [True]] * len(ways[True]["early"])
            assert not any(map(any, ways[False]["early"]))
            for (applied, during), (expected, after) in zip(ways[True]["history"], ways[False]["history"], strict=True):
                assert applied == expected and during == pytest.approx(after, rel=1e-3, abs=1e-4)
            for name, weight in ways[False]["weights"].items():
                assert relative_error(ways[True]["weights"][name], weight) < 1e-3


def test_the_backend_names_what_it_chose():
    assert "Transformer Engine" in str(choose_backend("auto")) or "SDPA" in str(choose_backend("auto"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="context parallelism needs a GPU for each of two ranks")
@pytest.mark.parametrize("attention", ["sdpa", "transformer_engine"])
def test_context_ranks_train_as_data_ranks_do(attention, tmp_path):
    """Transformer Engine has its own attention over the split, and rotates queries and keys by where it takes them to be."""
    if attention == "transformer_engine":
        pytest.importorskip("transformer_engine.pytorch")
    folder = save_tiny_model("qwen3_tied", tmp_path / "model")
    layouts = [{"attention": attention, "dtype": "bfloat16", name: 2} for name in ("data", "context")]
    whole, split = launch("train_five_steps", 2, tmp_path, runs=[(folder, layout) for layout in layouts])[0]
    for metrics, expected in zip(split["metrics"], whole["metrics"], strict=True):
        assert set(metrics) == set(expected)
        for name in ("policy/loss", "reheat/loss", "sft/loss", "optimizer/grad_norm"):
            assert metrics.get(name) == pytest.approx(expected.get(name), rel=3e-2, abs=2e-3), name  # bfloat16
    for name, expected in whole["weights"].items():
        assert relative_error(split["weights"][name].float(), expected.float()) < 1e-2, name


def test_a_checkpoint_before_the_first_update_and_one_that_a_run_goes_on_from(tmp_path):
    """With the AdamW that Megatron takes here, whose moments are not there before the first update."""
    folder, layout = save_tiny_model("qwen3_tied", tmp_path / "model"), {"dtype": "bfloat16"}
    (result,) = launch(
        "checkpoint_round_trip", 1, tmp_path, folder=folder, checkpoints=tmp_path / "c", save=layout, loads=[layout],
        recipe=dated_recipe(tmp_path / "recipe"),
    )  # fmt: skip
    ((_, state, losses),) = result["resumed"]
    assert state == {"note": "kept"} and losses == pytest.approx(result["expected"], rel=1e-3)  # sums in any order


def test_a_save_in_the_background_holds_the_step_at_which_it_began(tmp_path):
    """To the bit, with the snapshot beside it, from page-locked memory."""
    folder = save_tiny_model("qwen3_tied", tmp_path / "model")
    layouts = [{"dtype": "bfloat16"}]
    ((result,),) = launch(
        "saves_in_background", 1, tmp_path, folder=folder, layouts=layouts, checkpoints=tmp_path / "c"
    )
    assert result["restored"] == [(True, True, True)] * 2


# -- engines: vLLM on the device against transformers on the same weights ------------------------------------------------

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
PROMPTS = [[2 + (5 * i + 3 * j) % 120 for j in range(6 + i)] for i in range(4)]
ROLLOUT = RolloutConfig(max_model_len=256, max_num_seqs=16, enforce_eager=True, kv_cache_mb=256, sync_bucket_mb=1)
TOLERANCE = 2e-2  # float32, but vLLM's attention kernels are not transformers'


@pytest.fixture
def policy(tmp_path):
    folder = save_tiny_model("qwen3_tied", tmp_path / "model")
    return folder, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().cuda()


def change(model) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)


def tensors_of(model) -> list[tuple[str, torch.Tensor]]:
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]


def assert_agrees(engine, model) -> None:
    for prompt, (completion,) in zip(PROMPTS, engine.generate(PROMPTS, GREEDY, n=1, seed=0), strict=True):
        sequence = torch.tensor([[*prompt, *completion.token_ids.tolist()]], device="cuda")
        with torch.no_grad():
            logprobs = model(sequence).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        chosen = logprobs.gather(-1, sequence[0, len(prompt) :, None])[:, 0].cpu()
        assert (chosen - torch.from_numpy(completion.rollout_logprobs)).abs().max() <= TOLERANCE


def test_weights_reach_an_engine_in_the_devices_memory_and_again_after_its_sleep(policy, tmp_path):
    folder, model = policy
    engine = EmbeddedEngine(str(folder), ROLLOUT, dtype="float32", log_file=tmp_path / "engine.log", gpus=(0,))
    try:
        assert engine.update_weights(tensors_of(model), 1, verify=True).verified
        assert_agrees(engine, model)
        engine.sleep()
        change(model)
        engine.wake()
        assert engine.update_weights(tensors_of(model), 2, verify=True).verified
        assert_agrees(engine, model)
    finally:
        engine.close()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="a server needs a GPU beside the trainer's")
def test_weights_reach_a_server_over_nccl(policy, tmp_path):
    folder, model = policy
    hf = AutoConfig.from_pretrained(folder)
    port = free_port()

    def start() -> ServerProcess:
        log_file = tmp_path / "server.log"
        return ServerProcess(
            str(folder), hf, ROLLOUT, dtype="float32", seed=0, port=port, log_file=log_file, token=None, gpus=(1,)
        )

    url = f"http://127.0.0.1:{port}"
    servers = Servers([url], {url: start}, ROLLOUT, hf, transfer_backend(on_cpu=False))
    weights = ServerWeights(servers, ROLLOUT, on_cpu=False)
    fleet = ServerFleet(servers, hf.vocab_size, ROLLOUT, label="run", weights=weights)
    try:
        for version in (1, 2):
            change(model)
            fleet.update_weights(tensors_of(model), version, verify=True)
            assert_agrees(fleet, model)
    finally:
        fleet.close()
