"""What the ranks of distributed tests run. Each function returns plain data; the tests judge it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from tests.reference import LOGIT_CASES, TEMPERATURES, dense_kl, dense_logprobs, make_logits, relative_error


def vocab_parallel(num_tokens: int, vocab_sizes: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Losses on sharded logits at TP = 1, 2 and 4 against the dense reference, in one job of four ranks, by vocabulary."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    results: dict[int, dict[str, Any]] = {size: {"errors": {}, "values": {}} for size in vocab_sizes}
    for tensor_size in (1, 2, 4):
        groups = [dist.new_group(list(range(i, i + tensor_size))) for i in range(0, 4, tensor_size)]
        group, shard = groups[rank // tensor_size], rank % tensor_size
        for vocab_size, case, dtype in product(vocab_sizes, LOGIT_CASES, (torch.float32, torch.bfloat16)):
            dense = make_logits(case, num_tokens, vocab_size).to(dtype)
            errors, values = _vocab_parallel_errors(dense, group, shard, tensor_size, vocab_size)
            key = (tensor_size, case, str(dtype))
            results[vocab_size]["errors"][key], results[vocab_size]["values"][key] = errors, values
    return results


def _vocab_parallel_errors(
    dense: Tensor, group: Any, shard: int, tensor_size: int, vocab_size: int
) -> tuple[dict[str, float], list[Tensor]]:
    from megatron_reheat.losses import tempered_kl, vocab_logprobs

    columns = -(-vocab_size // tensor_size)
    padding = columns * tensor_size - vocab_size
    # padding that would win every softmax if it counted
    padded = torch.cat([dense, torch.full((len(dense), padding), 30.0, dtype=dense.dtype)], -1)
    if dense.max() > 1e3:
        padded[:, vocab_size:] = 2e4
    own = slice(shard * columns, (shard + 1) * columns)
    weights = torch.rand(len(dense), generator=torch.Generator().manual_seed(1)) + 0.5
    targets = torch.randint(vocab_size, (len(dense),), generator=torch.Generator().manual_seed(2))
    targets[0] = dense[0].argmax()

    def gradient_of(run: Callable[[Tensor], tuple[Tensor, list[Tensor]]]) -> tuple[Tensor, list[Tensor]]:
        z = padded[:, own].clone().requires_grad_()
        total, results = run(z)
        total.backward()
        return z.grad, results

    def expected_shard(gradient: Tensor) -> Tensor:
        return torch.nn.functional.pad(gradient, (0, padding))[:, own]

    errors, values = {}, []
    shared = {"group": group, "vocab_size": vocab_size}
    for direction in ("forward", "reverse"):
        for temperature in TEMPERATURES:
            expected = dense_kl(dense, temperature, direction, weights)

            def kl(z: Tensor, t: float = temperature, d: Any = direction) -> tuple[Tensor, list[Tensor]]:
                r = tempered_kl(z, temperature=t, direction=d, **shared)
                return (r.kl * weights).sum(), [r.kl.detach(), r.entropy, r.teacher_entropy]

            gradient, results = gradient_of(kl)
            name = f"{direction} T={temperature}"
            errors[f"{name} gradient"] = _shard_error(gradient, expected_shard(expected.gradient), expected.gradient)
            errors[f"{name} kl"] = relative_error(results[0], expected.kl)
            errors[f"{name} entropy"] = relative_error(results[1], expected.entropy)
            errors[f"{name} teacher entropy"] = relative_error(results[2], expected.teacher_entropy)
            values += results
    for temperature in (0.7, 1.0, 1.3):
        reference = dense_logprobs(dense, targets, temperature, entropy_weight=0.3)

        def logprobs(z: Tensor, t: float = temperature) -> tuple[Tensor, list[Tensor]]:
            r = vocab_logprobs(z, targets, temperature=t, **shared)
            return r.logprobs.sum() + 0.3 * r.entropy.sum(), [r.logprobs.detach(), r.entropy.detach()]

        gradient, results = gradient_of(logprobs)
        name = f"logprob T={temperature}"
        errors[f"{name} gradient"] = _shard_error(gradient, expected_shard(reference.gradient), reference.gradient)
        errors[f"{name} value"] = relative_error(results[0], reference.logprobs)
        values += results
    return errors, values


def _shard_error(actual: Tensor, expected: Tensor, whole: Tensor) -> float:
    """Relative to the whole gradient: a shard may hold almost none of it."""
    return ((actual.double() - expected).norm() / whole.norm().clamp_min(1e-6)).item()


def model_parity(folders: dict[str, Path], layouts: list[tuple[int, int]]) -> dict[tuple, dict[str, Any]]:
    """Packed logits against transformers and HF -> Megatron -> HF, for every model family and layout."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    results = {}
    batch = random_batch(seed=3)
    for tensor, pipeline in layouts:
        for family, folder in folders.items():
            with running_engine(folder, tensor=tensor, pipeline=pipeline, fused_head=False) as engine:
                logits = _all_logits(engine, batch)
                exported = dict(engine.iter_hf_weights())
                result: dict[str, Any] = {"num_parameters": engine.num_parameters}
                if logits:
                    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
                    with torch.no_grad():
                        result["logit_error"] = max(
                            (logits[i] - reference(ids[None]).logits[0]).abs().max().item()
                            for i, ids in enumerate(token_tensors(batch))
                            if i in logits
                        )
                    result["reference_parameters"] = sum(p.numel() for p in reference.parameters())
                if engine.topology.is_replica_leader:
                    original = load_file(folder / "model.safetensors")
                    result["names_equal"] = set(exported) == set(original)
                    result["bit_exact"] = all(torch.equal(exported[n], original[n]) for n in original)
                else:
                    result["exported_elsewhere"] = len(exported)
                results[tensor, pipeline, family] = result
    return results


def _all_logits(engine: Any, batch: Any) -> dict[int, Tensor]:
    """{sequence index: [L, V] logits} of this rank's share, on the last stage."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from megatron_reheat.metrics import MetricSums

    found: dict[int, Tensor] = {}

    def keep(vocab: Any, micro: Any) -> Any:
        whole = gather_from_tensor_model_parallel_region(vocab.logits)[:, : vocab.vocab_size]
        borders = micro.cu_seqlens.tolist()
        for index, start, end in zip(micro.sequence_indices, borders, borders[1:], strict=False):
            found[index] = whole[start:end]
        return whole.sum(), MetricSums()

    with torch.no_grad():
        engine._run(engine._microbatches(batch), keep, forward_only=True)
    return found


def train_five_steps(runs: list[tuple[Path, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Five steps (GRPO, reheating and cross-entropy mixed) per model and layout; losses and final weights."""
    return [_train_five_steps(folder, **layout) for folder, layout in runs]


def _train_five_steps(folder: Path, **layout: Any) -> dict[str, Any]:
    from megatron_reheat.losses.policy import policy_loss
    from megatron_reheat.losses.reheat import reheat_loss, sft_loss

    grpo = partial(
        policy_loss,
        sampling_temperature=0.9,
        clip_low=0.2,
        clip_high=0.28,
        dual_clip=3.0,
        tis_cap=2.0,
        entropy_coef=0.01,
    )
    forward = partial(reheat_loss, teacher_temperature=1.2, direction="forward")
    reverse = partial(reheat_loss, teacher_temperature=1.5, direction="reverse")
    with running_engine(folder, **layout) as engine:
        history = []
        for step, loss in enumerate((grpo, forward, grpo, reverse, sft_loss)):
            batch = random_batch(seed=10 + step)
            if loss is grpo:
                scores = engine.score(batch, temperature=0.9)
                generator = np.random.default_rng(step)
                old = [lp + generator.normal(0, 0.2, lp.shape).astype(np.float32) for lp in scores.logprobs]
                batch = batch.with_old_logprobs(old)
            result = engine.update(
                batch, loss, lr=1e-3, weight_decay=0.01, aggregation=layout.get("aggregation", "token_mean")
            )
            history.append(result.metrics)
        return {"layout": layout, "metrics": history, "weights": {n: t.clone() for n, t in engine.iter_hf_weights()}}


def checkpoint_round_trip(folder: Path, checkpoints: Path, save: dict[str, Any], loads: list[dict[str, Any]]) -> Any:
    """Two steps, save, two more; then load under each layout and take the same two steps."""
    from megatron_reheat.losses.reheat import sft_loss
    from megatron_reheat.model.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint

    def two_steps(engine: Any) -> list[float]:
        batch = random_batch(seed=5)
        return [engine.update(batch, sft_loss, lr=1e-2, weight_decay=0.01).metrics["sft/loss"] for _ in range(2)]

    with running_engine(folder, **save) as engine:
        two_steps(engine)
        save_checkpoint(engine, checkpoints, 1, {"note": "older"}, keep=2)
        save_checkpoint(engine, checkpoints, 2, {"note": "kept"}, keep=1)
        expected = two_steps(engine)
    resumed = []
    for layout in loads:
        with running_engine(folder, **layout) as engine:
            state = load_checkpoint(engine, latest_checkpoint(checkpoints))
            resumed.append((layout, state, two_steps(engine)))
    return {"expected": expected, "resumed": resumed}


def non_finite_updates(folder: Path, layouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """An update whose loss is NaN on one sequence, and one that is refused by `accept`: weights must not move."""
    return [_non_finite_updates(folder, **layout) for layout in layouts]


def _non_finite_updates(folder: Path, **layout: Any) -> dict[str, Any]:
    from megatron_reheat.losses.reheat import sft_loss

    def poisoned(vocab: Any, micro: Any) -> Any:
        value, metrics = sft_loss(vocab, micro)
        return value * (torch.nan if 0 in micro.sequence_indices else 1.0), metrics

    with running_engine(folder, **layout) as engine:
        batch = random_batch(seed=6)
        before = engine.snapshot()
        bad = engine.update(batch, poisoned, lr=1e-2, weight_decay=0.0)
        refused = engine.update(batch, sft_loss, lr=1e-2, weight_decay=0.0, accept=lambda metrics: False)
        unchanged = all(torch.equal(before[n], t) for n, t in engine.snapshot().items())
        good = engine.update(batch, sft_loss, lr=1e-2, weight_decay=0.0)
        moved = any(not torch.equal(before[n], t) for n, t in engine.snapshot().items())
        engine.restore(before)
        restored = all(torch.equal(before[n], t) for n, t in engine.snapshot().items())
        # restored into the optimizer's main parameters too: the next step starts from there
        engine.reset_optimizer()
        again = engine.update(batch, sft_loss, lr=1e-2, weight_decay=0.0)
        return {
            "bad": (bad.applied, bad.finite),
            "refused": (refused.applied, refused.finite),
            "good": (good.applied, good.finite),
            "unchanged": unchanged,
            "moved": moved,
            "restored": restored,
            "losses": (good.metrics["sft/loss"], again.metrics["sft/loss"]),
        }


def sampler_agreement(folder: Path, log_folder: Path, layouts: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Greedy vLLM samples after each of two weight syncs, against the trainer's own argmax and log-probabilities."""
    return [_sampler_agreement(folder, log_folder, **layout) for layout in layouts]


def _sampler_agreement(folder: Path, log_folder: Path, **layout: Any) -> list[dict[str, Any]]:
    from megatron_reheat.losses.reheat import sft_loss
    from megatron_reheat.rollout.embedded import EmbeddedEngine
    from megatron_reheat.rollout.weight_sync import WeightSync
    from megatron_reheat.types import SamplingParams, TrainBatch, TrainSequence

    with running_engine(folder, fused_head=False, **layout) as engine:
        leader = engine.topology.is_replica_leader
        config = engine.config.rollout.model_copy(
            update={"max_model_len": 64, "enforce_eager": True, "kv_cache_mb": 32, "threads": 1}
        )
        log_file = log_folder / ("-".join(["vllm", *layout, str(engine.topology.rank)]) + ".log")
        sampler = EmbeddedEngine(str(folder), config, dtype="float32", log_file=log_file) if leader else None
        sync = WeightSync(sampler, config)
        prompts = [list(range(2 + i, 8 + 2 * i)) for i in range(5)]
        results = []
        for version in (1, 2):
            engine.update(random_batch(seed=version), sft_loss, lr=1e-2, weight_decay=0.0)
            sync.push(engine.iter_hf_weights(), version)
            greedy = sampler.generate(prompts, SamplingParams(0.0, 12), 1, seed=0) if sampler else None
            groups = engine.topology.share_from_leaders(greedy)[0]
            completions = [g[0] for g in groups]
            batch = TrainBatch(
                tuple(
                    TrainSequence(np.concatenate([np.asarray(p, np.int32), c.token_ids]), len(p))
                    for p, c in zip(prompts, completions, strict=True)
                )
            )
            scores = engine.score(batch, temperature=1.0)
            argmax_equal = [
                torch.equal(
                    logits[len(prompts[i]) - 1 : -1].argmax(-1).int(), torch.from_numpy(completions[i].token_ids)
                )
                for i, logits in _all_logits(engine, batch).items()
            ]
            gap = max(
                float(np.abs(c.rollout_logprobs - s).max()) for c, s in zip(completions, scores.logprobs, strict=True)
            )
            results.append(
                {
                    "argmax_equal": argmax_equal,
                    "logprob_gap": gap,
                    "versions": {c.policy_version for c in completions},
                    "tokens": [c.token_ids.tolist() for c in completions],
                }
            )
        if sampler is not None:
            sampler.close()
        return results


def converted_runs(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Each run: `--from-hf`, load that under the run's layout, take a step, save, `--to-hf` (of the start too).

    The main rank converts, alone, before and after the job. Returns by rank whether the loaded weights were those of the
    Hugging Face folder, and what the main rank's conversions reported.
    """
    from megatron_reheat.parallel import topology
    from megatron_reheat.stages.convert import from_hf, to_hf

    main = os.environ["RANK"] == "0"
    if main:  # the others wait for it to join the job
        with outside_any_job():
            for run in runs:
                from_hf(str(run["folder"]), run["start"])
    exact = [_train_from_converted(run) for run in runs]
    dist.barrier()
    topology.finalize()
    messages = []
    if main:
        with outside_any_job():
            for run in runs:
                to_hf(run["start"], run["round_trip"], verify=False)
                messages.append(to_hf(run["run"], run["out"], shard_gb=1e-4))
    return {"started_exact": exact, "messages": messages}


def _train_from_converted(run: dict[str, Any]) -> bool:
    from megatron_reheat.losses.reheat import sft_loss
    from megatron_reheat.model.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
    from megatron_reheat.run_folder import RunFolder

    folder = RunFolder(run["run"])
    with running_engine(run["folder"], **run["layout"]) as engine:
        original = {n: t.clone() for n, t in engine.iter_hf_weights()}
        engine.restore({n: torch.zeros_like(t) for n, t in engine.snapshot().items()})
        state = load_checkpoint(engine, latest_checkpoint(RunFolder(run["start"]).checkpoints))
        loaded = dict(engine.iter_hf_weights())
        exact = all(torch.equal(loaded[n], t) for n, t in original.items())
        engine.update(random_batch(seed=9), sft_loss, lr=1e-2, weight_decay=0.0)
        save_checkpoint(engine, folder.checkpoints, 1, {**state, "step": 1, "policy_version": 1}, keep=1)
        exported = {n: t.clone() for n, t in engine.iter_hf_weights()}
        # a step from what was loaded, in the optimizer's main parameters too
        exact &= all(torch.allclose(exported[n], t, rtol=0.01, atol=0.02) for n, t in original.items())
        if engine.topology.is_main:
            tree = {"model": {"hf_path": str(run["folder"])}, "run": {"name": folder.path.name}}
            folder.config.write_text(yaml.safe_dump(tree))
            torch.save(exported, folder.path / "exported.pt")
    return exact


# -- shared pieces -------------------------------------------------------------------------------------------------------


class running_engine:
    """An `Engine` under a layout, in the job's process group; Megatron's state is torn down on the way out."""

    def __init__(self, folder: Path, *, aggregation: str = "token_mean", **layout: Any) -> None:
        from megatron_reheat.config import parse_config

        dtype = layout.pop("dtype", "float32")
        model = {name: layout.pop(name) for name in ("recompute", "fused_head", "head_chunk_tokens") if name in layout}
        layout.setdefault("microbatch_tokens", 128)
        self._config = parse_config(
            {
                "model": {"hf_path": str(folder), "dtype": dtype, **model},
                "data": {"path": "unused.jsonl", "max_prompt_tokens": 16},
                "parallel": layout,
                "rollout": {"max_tokens": 32, "sync_bucket_mb": 1},
                "reheat": {"max_tokens": 32},
                # a large eps keeps Adam's division from magnifying rounding where a gradient is next to nothing
                "optimizer": {"eps": 1e-4},
            }
        )
        self._folder = folder

    def __enter__(self) -> Any:
        from megatron_reheat.model.checkpoint import install_checkpoint_fixes
        from megatron_reheat.model.engine import Engine
        from megatron_reheat.parallel import topology

        install_checkpoint_fixes()
        return Engine(self._config, self._folder, topology.initialize(self._config))

    def __exit__(self, *_: object) -> None:
        from megatron.core import parallel_state

        dist.barrier()
        parallel_state.destroy_model_parallel()


@contextmanager
def outside_any_job() -> Iterator[None]:
    """The process as a user starts it, without the variables that make it a rank."""
    hidden = {name: os.environ.pop(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    try:
        yield
    finally:
        os.environ.update(hidden)


def random_batch(seed: int, vocab_size: int = 131) -> Any:
    """Twelve sequences of 4 to 40 tokens with advantages and rollout log-probabilities."""
    from megatron_reheat.types import TrainBatch, TrainSequence

    generator = np.random.default_rng(seed)
    sequences = []
    for length in generator.integers(4, 41, size=12):
        prompt = int(generator.integers(1, length))
        sequences.append(
            TrainSequence(
                token_ids=generator.integers(2, vocab_size, length).astype(np.int32),
                num_prompt_tokens=prompt,
                advantage=float(generator.normal()),
                rollout_logprobs=generator.normal(-5.0, 0.3, length - prompt).astype(np.float32),
                old_logprobs=None,
            )
        )
    return TrainBatch(tuple(sequences))


def token_tensors(batch: Any) -> list[Tensor]:
    return [torch.from_numpy(s.token_ids.astype(np.int64)) for s in batch.sequences]


def world_size() -> int:
    return int(os.environ["WORLD_SIZE"])
