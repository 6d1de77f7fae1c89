"""The embedded engine: real vLLM against transformers on the same weights, and what happens when it breaks."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_reheat.config import RolloutConfig
from megatron_reheat.errors import ConfigError, EngineDied, ReheatError, WeightSyncError
from megatron_reheat.rollout import embedded
from megatron_reheat.rollout.embedded import EmbeddedEngine
from megatron_reheat.rollout.engine_options import engine_environment
from megatron_reheat.rollout.weight_buffer import HostBuffer
from megatron_reheat.rollout.weight_sync import WeightSync, mismatch
from megatron_reheat.types import SamplingParams
from tests.e2e.agreement import GREEDY, TOLERANCE, PushedModel

VOCAB = 32
CONTEXT = 256
SAMPLED = SamplingParams(temperature=1.0, max_tokens=16)
PROMPTS = [[2 + (5 * i + 3 * j) % 29 for j in range(6 + i)] for i in range(4)]
LONG_PROMPT = [2 + (7 * j) % 29 for j in range(200)]  # longer than a KV block of 128, so that prefixes are cached
CONFIG = RolloutConfig(
    max_model_len=CONTEXT, max_num_seqs=64, enforce_eager=True, kv_cache_mb=64, threads=1, verify_every=2, timeout_s=120
)


class Policy(PushedModel):
    """A tiny transformers model and the engine that should agree with it."""

    def __init__(self, folder, tied: bool, rollout: RolloutConfig = CONFIG) -> None:
        config = Qwen3Config(
            vocab_size=VOCAB, hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, max_position_embeddings=CONTEXT, tie_word_embeddings=tied,
            eos_token_id=1, bos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        self.model = Qwen3ForCausalLM(config).float().eval()
        config.architectures = ["Qwen3ForCausalLM"]
        config.save_pretrained(folder)
        self.core = min(os.sched_getaffinity(0))
        self.engine = EmbeddedEngine(
            str(folder),
            rollout,
            dtype="float32",
            log_file=folder / "engine.log",
            cpu_affinity=None if tied else [self.core],
        )
        self.sync = WeightSync(self.engine, CONFIG)

    def assert_agrees(self, prompts=PROMPTS) -> None:
        self.assert_samples_alike(self.engine, prompts)

    def assert_refuses_until_pushed(self) -> None:
        assert self.engine.policy_version is None
        with pytest.raises(WeightSyncError, match="holds no complete weights"):
            self.engine.generate(PROMPTS, GREEDY, n=1, seed=0)
        assert self.push().verified
        self.assert_agrees()


@pytest.fixture(scope="module")
def policies(tmp_path_factory) -> Iterator[dict[str, Policy]]:
    both = {name: Policy(tmp_path_factory.mktemp(name), tied=name == "tied") for name in ("tied", "untied")}
    yield both
    for policy in both.values():
        policy.engine.close()


@pytest.fixture(params=["tied", "untied"])
def policy(policies, request) -> Policy:
    return policies[request.param]


@pytest.fixture
def tied(policies) -> Policy:
    if policies["tied"].engine.policy_version is None:
        policies["tied"].push()
    return policies["tied"]


@contextmanager
def capacity(engine: EmbeddedEngine, num_bytes: int | None) -> Iterator[None]:
    """Lets the engine use only the first `num_bytes` of its weight buffer."""
    before = engine._buffer.capacity
    if num_bytes is not None:
        engine._buffer.grow(num_bytes)
    yield
    engine._buffer.grow(before)


def flat(groups) -> list[list[int]]:
    return [completion.token_ids.tolist() for group in groups for completion in group]


def test_an_engine_without_weights_refuses_to_sample(policy):
    assert policy.engine.wait_ready() > 0
    assert policy.engine.policy_version is None
    with pytest.raises(WeightSyncError, match="holds no complete weights"):
        policy.engine.generate(PROMPTS, GREEDY, n=1, seed=0)


# 80,000 bytes hold one of the larger tensors at a time; the largest (73,728 bytes) does not fit 40,000
@pytest.mark.parametrize("num_bytes", [None, 80_000, 40_000])
def test_greedy_tokens_and_logprobs_equal_transformers(policy, num_bytes):
    for seed in (1, 2):
        policy.randomize(seed)
        with capacity(policy.engine, num_bytes):
            report = policy.push()
        assert (report.version, report.num_tensors) == (policy.version, len(policy.tensors()))
        assert report.num_bytes == sum(t.nbytes for _, t in policy.tensors())
        policy.assert_agrees()


def test_digests_are_compared_on_the_first_and_every_second_push(tied):
    tied.sync = WeightSync(tied.engine, CONFIG)
    assert [tied.push().verified for _ in range(4)] == [True, False, True, False]
    first_only = WeightSync(tied.engine, CONFIG.model_copy(update={"verify_every": 0}))
    assert [first_only.push(tied.tensors(), v).verified for v in (91, 92, 93)] == [True, False, False]
    tied.version = 93


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_sampled_logprobs_are_those_at_the_sampling_temperature(tied, temperature):
    params = SamplingParams(temperature=temperature, max_tokens=24)
    differences = []
    for prompt, group in zip(PROMPTS, tied.engine.generate(PROMPTS, params, n=4, seed=3), strict=True):
        assert len(group) == 4 and len({tuple(tokens) for tokens in flat([group])}) == 4
        for completion in group:
            logprobs = (tied.logits(prompt, completion) / temperature).log_softmax(-1)
            expected = logprobs.gather(1, torch.tensor(completion.token_ids).long()[:, None])[:, 0].numpy()
            differences.append(np.abs(completion.rollout_logprobs - expected).max())
            assert mismatch(completion.rollout_logprobs, expected)["mismatch_kl"] < 1e-6
            assert (completion.token_ids.dtype, completion.rollout_logprobs.dtype) == (np.int32, np.float32)
            assert (completion.sampling_temperature, completion.finish_reason) == (temperature, "length")
    assert max(differences) <= TOLERANCE


def test_samples_follow_the_distribution_of_the_weights(tied):
    params = SamplingParams(temperature=1.0, max_tokens=1)
    (group,) = tied.engine.generate([PROMPTS[0]], params, n=2000, seed=5)
    counts = np.bincount([c.token_ids[0] for c in group], minlength=VOCAB) / len(group)
    expected = tied.logits(PROMPTS[0], group[0])[0].softmax(-1).numpy()
    assert np.abs(counts - expected).sum() / 2 < 0.08  # total variation; about 0.04 is sampling noise


def test_seeds_decide_the_samples_and_nothing_else_does(tied):
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[1]]
    first = flat(tied.engine.generate(prompts, SAMPLED, n=3, seed=7))
    assert flat(tied.engine.generate(prompts, SAMPLED, n=3, seed=7)) == first
    assert flat(tied.engine.generate(prompts, SAMPLED, n=3, seed=8)) != first
    assert flat(tied.engine.generate(prompts[:1], SAMPLED, n=3, seed=7)) == first[:3]  # whatever shares the batch
    assert len({tuple(tokens) for tokens in first[:6]}) == 6  # equal prompts do not share streams


def test_samples_that_are_handed_over_one_by_one_are_the_same_to_the_bit(tied):
    prompts = [[3 + i % 5, 4, 5 + i // 5] for i in range(20)]
    params = SamplingParams(temperature=1.0, max_tokens=48, stop_token_ids=(1, 2))  # of very different lengths
    whole, taken = tied.engine.generate(prompts, params, n=6, seed=7), []
    apart = tied.engine.generate(prompts, params, 6, 7, lambda *finished: taken.append(finished))
    assert [(p, i) for p, i, _ in taken] != sorted((p, i) for p, i, _ in taken)  # as they were finished
    assert sorted((p, i) for p, i, _ in taken) == [(p, i) for p in range(20) for i in range(6)]
    assert all(apart[p][i] is completion for p, i, completion in taken)
    for ours, theirs in zip(apart, whole, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.token_ids.tobytes() == b.token_ids.tobytes() and a.finish_reason == b.finish_reason
            assert a.rollout_logprobs.tobytes() == b.rollout_logprobs.tobytes()


def test_a_flattened_policy_gives_the_samples_of_a_hotter_one(tied):
    """The norm's weight over T, sampled at 1, against the weights as they are, sampled at T, with the same seeds."""
    temperature, prompts = 1.25, PROMPTS * 4
    hot = tied.engine.generate(prompts, SamplingParams(temperature=temperature, max_tokens=24), n=4, seed=11)
    norm = tied.model.model.norm.weight
    with torch.no_grad():
        norm /= temperature
    tied.push()
    flattened = tied.engine.generate(prompts, SamplingParams(temperature=1.0, max_tokens=24), n=4, seed=11)
    with torch.no_grad():
        norm *= temperature
    tied.push()
    pairs = list(zip(flat(hot), flat(flattened), strict=True))
    # a sample parts from the other only where two tokens are as likely as each other to the last bits
    assert len(pairs) == 64 and sum(a == b for a, b in pairs) >= 63
    unlike = flat(tied.engine.generate(prompts, SamplingParams(temperature=1.0, max_tokens=24), n=4, seed=11))
    assert sum(a == b for (a, _), b in zip(pairs, unlike, strict=True)) < 32


def test_seeded_requests_beyond_one_prefill_batch(tied):
    # 48 x 200 prompt tokens exceed the token budget of a step, where a cut prefill would break CPU generators
    prompts = [[3 + i % 20, *LONG_PROMPT[1:]] for i in range(48)]
    prompts = [[*prompt[:100], 2 + i % 29, *prompt[101:]] for i, prompt in enumerate(prompts)]
    groups = tied.engine.generate(prompts, SamplingParams(temperature=1.0, max_tokens=2), n=2, seed=1)
    assert [len(tokens) for tokens in flat(groups)] == [2] * 96


def test_a_stop_token_ends_the_completion_and_belongs_to_it(tied):
    (greedy,) = tied.engine.generate(PROMPTS[:1], GREEDY, n=1, seed=0)
    tokens = greedy[0].token_ids.tolist()
    stop = tokens[5]
    at = tokens.index(stop)
    params = SamplingParams(temperature=0.0, max_tokens=20, stop_token_ids=(stop,))
    ((stopped,),) = tied.engine.generate(PROMPTS[:1], params, n=1, seed=0)
    assert stopped.token_ids.tolist() == tokens[: at + 1]
    assert stopped.finish_reason == "stop"
    np.testing.assert_allclose(stopped.rollout_logprobs, greedy[0].rollout_logprobs[: at + 1], atol=1e-5)
    # the model's own end of sequence (1) is no stop token unless it is asked for
    biggest = tied.engine.generate(PROMPTS, SamplingParams(temperature=2.0, max_tokens=100), n=8, seed=0)
    assert any(1 in tokens[:-1] for tokens in flat(biggest))


def test_the_response_ends_at_the_context(tied):
    params = SamplingParams(temperature=0.0, max_tokens=1000)
    ((completion,),) = tied.engine.generate([LONG_PROMPT], params, n=1, seed=0)
    assert (len(completion.token_ids), completion.finish_reason) == (CONTEXT - len(LONG_PROMPT), "length")


def test_cached_prefixes_do_not_survive_a_sync(tied):
    for seed in (11, 12):
        tied.randomize(seed)
        tied.push()
        tied.assert_agrees([LONG_PROMPT])
        tied.assert_agrees([LONG_PROMPT])  # now served from the prefix cache


@pytest.mark.parametrize(
    "prompts, message",
    [
        ([[3, 4], []], "prompt 1 has 0 tokens"),
        ([[3], [3] * CONTEXT], rf"prompt 1 has {CONTEXT} tokens; the engine takes 1 to {CONTEXT - 1}"),
        ([[3], [4], [3, VOCAB]], rf"prompt 2 holds token id {VOCAB}, outside the vocabulary of {VOCAB}"),
        ([[-1, 3]], "prompt 0 holds token id -1"),
    ],
)
def test_bad_prompts_are_named_and_change_nothing(tied, prompts, message):
    with pytest.raises(ConfigError, match=message):
        tied.engine.generate(prompts, SAMPLED, n=1, seed=0)
    tied.assert_agrees()


@pytest.mark.parametrize(
    "changes, n, message",
    [
        ({"max_tokens": 0}, 1, "max_tokens=0"),
        ({}, 0, "n=0"),
        ({"temperature": -1.0}, 1, "temperature -1.0: vLLM samples at temperatures from 0.01 to 2"),
        ({"temperature": 2.5}, 1, "temperature 2.5: vLLM samples at temperatures from 0.01 to 2"),
        ({"top_p": 0.0}, 1, r"top_p 0.0 must be in \(0, 1\]"),
        ({"temperature": 0.0}, 2, "use n=1"),
        ({"stop_token_ids": (VOCAB,)}, 1, f"stop token {VOCAB}"),
    ],
)
def test_bad_sampling_settings_are_refused(tied, changes, n, message):
    params = SamplingParams(**{"temperature": 1.0, "max_tokens": 4, **changes})
    with pytest.raises(ConfigError, match=message):
        tied.engine.generate(PROMPTS, params, n=n, seed=0)


def test_a_request_that_fails_inside_vllm_leaves_the_engine_usable(tied, monkeypatch):
    # without our own check vLLM meets the unknown token in the middle of a step
    monkeypatch.setattr(embedded, "check_prompts", lambda prompts, *_: [np.array(p, np.int32) for p in prompts])
    with pytest.raises(ReheatError, match="vLLM raised"):
        tied.engine.generate([PROMPTS[0], [3, 10**6]], SAMPLED, n=2, seed=0)
    monkeypatch.undo()
    tied.assert_agrees()


def test_no_prompts_give_no_completions(tied):
    assert tied.engine.generate([], SAMPLED, n=4, seed=0) == []


@pytest.mark.parametrize("num_bytes", [None, 80_000])
def test_tensors_corrupted_on_the_way_are_named(policy, monkeypatch, num_bytes):
    names = ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"]
    write = HostBuffer.write

    def write_and_flip(self, name, tensor, offset, verify):
        entry = write(self, name, tensor, offset, verify)
        if name in names:
            self._bytes[offset + 17] ^= 0x10
        return entry

    monkeypatch.setattr(HostBuffer, "write", write_and_flip)
    policy.sync = WeightSync(policy.engine, CONFIG)
    with capacity(policy.engine, num_bytes), pytest.raises(WeightSyncError) as caught:
        policy.push()
    assert str(caught.value) == f"these tensors changed between trainer and engine: {', '.join(names)}"
    monkeypatch.undo()
    policy.assert_refuses_until_pushed()


def test_bad_sets_of_tensors_are_named_and_repaired_by_the_next_push(tied):
    good = tied.tensors()
    name = "model.layers.2.self_attn.k_proj.weight"
    at = [n for n, _ in good].index(name)
    key = good[at][1]
    cases = [
        (good[:at] + good[at + 1 :], f"the trainer did not send these parameters: {name}"),
        ([*good[:at], (name, key[:-1]), *good[at + 1 :]], rf"{name} has shape \(63, 96\), the engine needs \(64, 96\)"),
        ([*good, ("model.extra.weight", key)], "model.extra.weight is not a parameter of the model"),
        ([*good, (name, key)], f"{name} was sent twice"),
        ([*good[:at], (name, key.int()), *good[at + 1 :]], f"{name} has dtype int32"),
        ([], r"model.embed_tokens.weight, .* and \d+ more"),
    ]
    for tensors, message in cases:
        with pytest.raises(WeightSyncError, match=message):
            tied.push(tensors)
        tied.assert_refuses_until_pushed()


def test_a_push_given_up_half_way_leaves_nothing_behind(tied):
    def interrupted():
        for name, tensor in tied.tensors():
            yield name, torch.zeros_like(tensor)
            if name.endswith("layers.0.self_attn.k_proj.weight"):  # q was announced: part of a fused projection
                raise KeyError("the trainer failed")

    with capacity(tied.engine, 40_000), pytest.raises(KeyError, match="the trainer failed"):
        tied.push(interrupted())
    tied.randomize(31)
    tied.assert_refuses_until_pushed()


def test_bfloat16_tensors_are_widened_exactly(tied):
    tied.push([(name, tensor.bfloat16()) for name, tensor in tied.tensors()])
    with torch.no_grad():
        for parameter in tied.model.parameters():
            parameter.copy_(parameter.bfloat16())
    tied.assert_agrees()


def test_a_tied_head_may_be_sent_under_its_own_name_too(tied):
    tied.randomize(41)
    tied.push([*tied.tensors(), ("lm_head.weight", tied.model.lm_head.weight.detach())])
    tied.assert_agrees()


def test_sleeping_engines_refuse_and_wake(tied):
    tied.engine.sleep()
    with pytest.raises(WeightSyncError, match=r"asleep; call wake\(\)"):
        tied.engine.generate(PROMPTS, GREEDY, n=1, seed=0)
    tied.engine.wake()
    tied.assert_agrees()


def test_the_engine_is_no_rank_of_the_trainers_job(tied, monkeypatch):
    torchrun = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "TORCHELASTIC_RUN_ID"]
    for variable in [*torchrun, "KEPT"]:
        monkeypatch.setenv(variable, "1")
    environment = engine_environment() | tied.engine._variables()
    assert environment.keys() & {*torchrun, "KEPT"} == {"KEPT"}
    assert environment["OMP_NUM_THREADS"] == "1"


def test_the_engine_stays_on_its_cores(policies):
    policies["untied"].engine.wait_ready()
    assert os.sched_getaffinity(policies["untied"].engine._child.pid) == {policies["untied"].core}


def test_the_trainer_does_not_import_vllm(tied):
    assert not [name for name in sys.modules if name == "vllm" or name.startswith("vllm.")]


def test_death_and_hang_are_noticed_and_a_restart_recovers(policies):
    """Last, because it uses an engine up."""
    policy = policies["untied"]
    engine = policy.engine
    policy.push()
    pid = engine._child.pid
    assert engine._child.alive and engine.policy_version == policy.version
    finished = []

    def kill(*position_and_completion):
        finished.append(position_and_completion)
        os.kill(pid, signal.SIGKILL)

    # the first completion is here long before the last is sampled
    params = SamplingParams(temperature=1.0, max_tokens=250, stop_token_ids=(1,))
    with pytest.raises(EngineDied, match=rf"engine process {pid} was killed by signal 9 during 'generate'.*engine.log"):
        engine.generate([[3]] * 64, params, 64, 0, kill)
    assert 0 < len(finished) < 64 * 64
    assert not engine._child.alive and engine.policy_version is None
    drained = iter(policy.tensors())
    with pytest.raises(EngineDied):
        policy.push(drained)
    assert next(drained, None) is None

    engine.restart()
    policy.randomize(51)
    assert policy.push().verified
    policy.assert_agrees()
    assert engine._child.alive and engine._child.pid != pid

    engine._config = CONFIG.model_copy(update={"timeout_s": 0.5, "max_restarts": 1})
    os.kill(engine._child.pid, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(EngineDied, match=r"did not answer 'generate' within 0.5 s \(rollout.timeout_s\)"):
        engine.generate(PROMPTS, GREEDY, n=1, seed=0)
    assert time.monotonic() - started < 60
    with pytest.raises(EngineDied, match="restarted 1 times"):
        engine.restart()
    engine.close()
    engine.close()
    with pytest.raises(EngineDied, match="closed"):
        engine.wait_ready()


def test_a_model_without_an_attention_kernel_is_refused_by_name(tmp_path):
    """vLLM alone would start, and fail at the first request."""
    Qwen3Config(
        vocab_size=VOCAB, hidden_size=96, intermediate_size=192, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=CONTEXT, architectures=["Qwen3ForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    engine = EmbeddedEngine(str(tmp_path), CONFIG, dtype="float32", log_file=tmp_path / "engine.log")
    try:
        with pytest.raises(ReheatError, match=r"^the model's head_dim is 16, but vLLM's CPU attention has kernels for"):
            engine.wait_ready()
    finally:
        engine.close()


def test_an_engine_over_two_workers_takes_the_same_weights(tmp_path):
    """vLLM under tensor parallelism: every worker loads its part out of the trainer's one buffer."""
    split = Policy(tmp_path, tied=True, rollout=CONFIG.model_copy(update={"tensor": 2, "mode": "colocated"}))
    try:
        for seed in (1, 2):
            split.randomize(seed)
            assert split.push().verified == (seed == 1)
            split.assert_agrees()
        name, tensor = split.tensors()[3]
        with pytest.raises(WeightSyncError, match=f"{name} was sent twice"):
            split.push([*split.tensors(), (name, tensor)])
        split.assert_refuses_until_pushed()
    finally:
        split.engine.close()
