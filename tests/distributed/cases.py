"""What the ranks of distributed tests run. Each function returns plain data; the tests judge it."""

from __future__ import annotations

import os
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date, timedelta
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from tests.reference import (
    LOGIT_CASES,
    TEMPERATURES,
    dense_divergence,
    dense_entropy_flow,
    dense_kl,
    dense_logprobs,
    make_logits,
    relative_error,
)

# of `policy_loss`, with every term of it at work
GRPO: dict[str, Any] = {
    "sampling_temperature": 0.9, "clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0, "tis_cap": 2.0, "entropy_coef": 0.01,
}  # fmt: skip


def vocab_parallel(num_tokens: int, vocab_sizes: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Losses on sharded logits at TP = 1, 2 and 4 against the dense reference, in one job of four ranks, by vocabulary."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    results: dict[int, dict[str, Any]] = {size: {"errors": {}, "values": {}, "head": {}} for size in vocab_sizes}
    for tensor_size in (1, 2, 4):
        groups = [dist.new_group(list(range(i, i + tensor_size))) for i in range(0, 4, tensor_size)]
        group, shard = groups[rank // tensor_size], rank % tensor_size
        for vocab_size, case, dtype in product(vocab_sizes, LOGIT_CASES, (torch.float32, torch.bfloat16)):
            dense = make_logits(case, num_tokens, vocab_size).to(dtype)
            errors, values = _vocab_parallel_errors(dense, group, shard, tensor_size, vocab_size)
            key = (tensor_size, case, str(dtype))
            results[vocab_size]["errors"][key], results[vocab_size]["values"][key] = errors, values
            teacher = make_logits(LOGIT_CASES[LOGIT_CASES.index(case) - 1], num_tokens, vocab_size, seed=7).to(dtype)
            errors, values = _divergence_errors(dense, teacher, group, shard, tensor_size, vocab_size)
            results[vocab_size]["errors"][key] |= errors
            results[vocab_size]["values"][key] += values
        for vocab_size in vocab_sizes:
            results[vocab_size]["head"][tensor_size] = _head_loss_errors(group, shard, tensor_size, vocab_size)
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


def _divergence_errors(
    dense: Tensor, teacher: Tensor, group: Any, shard: int, tensor_size: int, vocab_size: int
) -> tuple[dict[str, float], list[Tensor]]:
    """Against a teacher of another kind, and against one that is nearly the policy itself."""
    from megatron_reheat.parallel.vocab import VocabLogits

    columns = -(-vocab_size // tensor_size)
    padding = columns * tensor_size - vocab_size
    own = slice(shard * columns, (shard + 1) * columns)
    weights = torch.rand(len(dense), generator=torch.Generator().manual_seed(1)) + 0.5

    def vocabulary(logits: Tensor) -> VocabLogits:
        padded = torch.nn.functional.pad(logits, (0, padding), value=2e4)  # would win every softmax if it counted
        return VocabLogits(padded[:, own].clone().requires_grad_(), vocab_size, group)

    errors, values = {}, []
    near = (dense.float() + 1e-2 * torch.sin(torch.arange(dense.numel())).view(dense.shape)).to(dense.dtype)
    for kind, other in (("teacher", teacher), ("near", near)):
        for measure, temperature in product(("forward", "reverse", "js"), (1.0, 1.3)):
            policy, expected = vocabulary(dense), dense_divergence(dense, other, measure, temperature, weights)
            if measure == "js":
                value = policy.js_to(vocabulary(other), temperature=temperature)
            else:
                value = policy.kl_to(vocabulary(other), direction=measure, temperature=temperature)
            (value * weights).sum().backward()
            exact = torch.nn.functional.pad(expected.gradient, (0, padding))[:, own]
            name = f"{kind} {measure} T={temperature}"
            errors[f"{name} gradient"] = _shard_error(policy.logits.grad, exact, expected.gradient)
            errors[f"{name} value"] = relative_error(value, expected.value)
            values.append(value.detach())
    flow = vocabulary(dense).mean_entropy_flow()
    errors["entropy flow"] = relative_error(flow, dense_entropy_flow(dense))
    return errors, [*values, flow]


def _head_loss_errors(group: Any, shard: int, tensor_size: int, vocab_size: int) -> dict[str, float]:
    """A layer's JS to the policy plus the policy's KL to a teacher, from hidden states; gradients summed over the group."""
    from megatron_reheat.parallel.head_loss import head_loss
    from megatron_reheat.parallel.vocab import VocabLogits

    generator = torch.Generator().manual_seed(4)
    states = [h.requires_grad_(i < 2) for i, h in enumerate(torch.randn(3, 9, 8, generator=generator))]
    weight = torch.randn(vocab_size, 8, generator=generator)
    columns = -(-vocab_size // tensor_size)
    own = slice(shard * columns, (shard + 1) * columns)
    padded = torch.nn.functional.pad(weight, (0, 0, 0, columns * tensor_size - vocab_size), value=9.0)
    mine = padded[own].clone().requires_grad_()

    def loss(vocabs: Sequence[VocabLogits], rows: slice) -> Tensor:
        policy, layer, teacher = vocabs
        return (layer.js_to(policy, temperature=1.3) + policy.kl_to(teacher)).sum()

    value = head_loss(states, mine, loss, vocab_size, group, chunk_tokens=4)
    value.backward()
    ones = torch.ones(9)
    policy, layer, teacher = (h.detach().double() @ weight.double().t() for h in states)
    js, kl = dense_divergence(layer, policy, "js", 1.3, ones), dense_divergence(policy, teacher, "reverse", 1.0, ones)
    errors = {"value": relative_error(value, js.value.sum() + kl.value.sum())}
    head = js.gradient.t() @ states[1].detach().double() + kl.gradient.t() @ states[0].detach().double()
    exact = torch.nn.functional.pad(head, (0, 0, 0, len(padded) - vocab_size))[own]
    errors["weight gradient"] = _shard_error(mine.grad, exact, head)
    for name, hidden, gradient in (("policy", states[0], kl.gradient), ("layer", states[1], js.gradient)):
        dist.all_reduce(hidden.grad, group=group)
        errors[f"{name} gradient"] = relative_error(hidden.grad, gradient @ weight.double())
    return errors


def _shard_error(actual: Tensor, expected: Tensor, whole: Tensor) -> float:
    """Relative to the whole gradient: a shard may hold almost none of it."""
    return ((actual.double() - expected).norm() / whole.norm().clamp_min(1e-6)).item()


def model_parity(folders: dict[str, Path], layouts: list[tuple[int, int]]) -> dict[tuple, dict[str, Any]]:
    """Packed logits against transformers and HF -> Megatron -> HF, for every model family and layout."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from megatron_reheat.parallel.vocab import Vocabulary

    results = {}
    batch = random_batch(seed=3)
    for tensor, pipeline in layouts:
        for family, folder in folders.items():
            with running_engine(folder, tensor=tensor, pipeline=pipeline, fused_head=False) as engine:
                logits = _all_logits(engine, batch)
                exported = dict(engine.iter_hf_weights())
                result: dict[str, Any] = {"num_parameters": engine.num_parameters}
                flows = engine.score(batch, temperature=1.0, columns={"flow": Vocabulary.mean_entropy_flow}).columns[
                    "flow"
                ]
                result["flow_lengths"] = [len(row) for row in flows]
                if logits:
                    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
                    with torch.no_grad():
                        result["logit_error"] = max(
                            (logits[i] - reference(ids[None]).logits[0]).abs().max().item()
                            for i, ids in enumerate(token_tensors(batch))
                            if i in logits
                        )
                        result["flow_error"] = max(
                            relative_error(
                                torch.from_numpy(flow),
                                dense_entropy_flow(reference(ids[None]).logits[0, -len(flow) - 1 : -1]),
                            )
                            for ids, flow in zip(token_tensors(batch), flows, strict=True)
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
    from megatron_reheat.model.outputs import WholeLoss

    found: dict[int, Tensor] = {}

    def keep(vocab: Any, micro: Any) -> Any:
        whole = gather_from_tensor_model_parallel_region(vocab.logits)[:, : vocab.vocab_size]
        borders = micro.cu_seqlens.tolist()
        for index, start, end in zip(micro.sequence_indices, borders, borders[1:], strict=False):
            found[index] = whole[start:end]
        return whole.sum(), MetricSums()

    engine.forward(engine.microbatches(batch), WholeLoss(engine.head, keep))
    return found


def train_five_steps(runs: list[tuple[Path, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Five steps (GRPO, reheating and cross-entropy mixed) per model and layout; losses and final weights."""
    return [_train_five_steps(folder, **layout) for folder, layout in runs]


def _train_five_steps(folder: Path, **layout: Any) -> dict[str, Any]:
    from megatron_reheat.losses.policy_gradient import policy_loss
    from megatron_reheat.losses.reheat import reheat_loss, sft_loss

    grpo = partial(policy_loss, **GRPO)
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
        weights = {n: t.clone() for n, t in engine.iter_hf_weights()}
        return {"layout": layout, "metrics": history, "weights": weights, "alone": _scored_in_update(engine, grpo)}


def _scored_in_update(engine: Any, loss: Any, **options: Any) -> list[Any]:
    """Scores, metrics and weights of one update from the same state: of a batch that was scored before, and in the update."""
    batch, before = random_batch(seed=20), engine.snapshot()
    found = []
    for in_update in (False, True):
        engine.restore(before)
        engine.reset_optimizer()
        scores, scored = None, batch
        if not in_update:
            scores = engine.score(batch, temperature=0.9)
            scored = batch.with_old_logprobs(scores.logprobs)
        result = engine.update(scored, loss, lr=1e-3, weight_decay=0.01, score=in_update, **options)
        weights = {n: t.clone() for n, t in engine.iter_hf_weights()}
        found.append((result.scores if in_update else scores, result.metrics, weights))
    return found


def checkpoint_round_trip(
    folder: Path, checkpoints: Path, save: dict[str, Any], loads: list[dict[str, Any]], recipe: Path
) -> Any:
    """Two steps, save, two more; then load under each layout and take the same two steps. In the same job, what the ranks make
    of `recipe` when each starts a day after the one before it."""
    from megatron_reheat.losses.reheat import sft_loss
    from megatron_reheat.model.checkpoint import latest_checkpoint, load_checkpoint
    from megatron_reheat.model.checkpoint_save import save_checkpoint

    def two_steps(engine: Any) -> list[float]:
        batch = random_batch(seed=5)
        return [engine.update(batch, sft_loss, lr=1e-2, weight_decay=0.01).metrics["sft/loss"] for _ in range(2)]

    with running_engine(folder, **save) as engine:
        started = _inputs_around_midnight(recipe, engine.topology)
        # a run may have nothing to train on in its first steps
        save_checkpoint(engine, checkpoints.parent / "untrained", 1, {"note": "untrained"}, keep=1)
        assert load_checkpoint(engine, checkpoints.parent / "untrained" / "step-1") == {"note": "untrained"}
        two_steps(engine)
        save_checkpoint(engine, checkpoints, 1, {"note": "older"}, keep=2)
        if engine.topology.is_main:
            (checkpoints / "step-9").mkdir()  # newer, of before somebody went back to an older one
            (checkpoints / "step-2").mkdir()
            (checkpoints / "step-2" / "somebody's").touch()
            (checkpoints / ".step-3.partial").mkdir()
        too_large = _save_where_files_stay_small(engine, checkpoints)
        forks: list[int] = []
        os.register_at_fork(before=lambda: forks.append(1))
        save_checkpoint(engine, checkpoints, 2, {"note": "kept"}, keep=1)
        forked = len(forks)
        expected = two_steps(engine)
    resumed = []
    for layout in loads:
        with running_engine(folder, **layout) as engine:
            state = load_checkpoint(engine, latest_checkpoint(checkpoints))
            resumed.append((layout, state, two_steps(engine)))
            if layout == save:
                refused = _hostile_loads(engine, checkpoints)
    return {
        "expected": expected, "resumed": resumed, "refused": refused, "too_large": too_large, "started": started,
        "forked": forked,
    }  # fmt: skip


def _save_where_files_stay_small(engine: Any, checkpoints: Path) -> tuple[str, list[str]]:
    """What a save says whose files the operating system refuses to let grow, and what it leaves."""
    from megatron_reheat.errors import ReheatError
    from megatron_reheat.model.checkpoint_save import save_checkpoint

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        save_checkpoint(engine, checkpoints, 5, {}, keep=1)
    except ReheatError as error:
        message = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    engine.topology.barrier()
    return message, sorted(path.name for path in checkpoints.iterdir())


def _hostile_loads(engine: Any, checkpoints: Path) -> dict[tuple[str, str], str]:
    """{(payload, function): message of its refusal} for copies of the latest checkpoint."""
    from megatron_reheat.errors import ReheatError
    from megatron_reheat.model.checkpoint import latest_checkpoint, load_checkpoint, load_weights
    from tests.hostile_checkpoints import PAYLOADS, tamper

    messages = {}
    for payload in PAYLOADS:
        copy = checkpoints.parent / f"hostile {payload}" / "step-2"
        if engine.topology.is_main:
            shutil.copytree(latest_checkpoint(checkpoints), copy)
            tamper(copy, payload, checkpoints.parent / "made")
        engine.topology.barrier()
        loads = {"checkpoint": partial(load_checkpoint, engine, copy)}
        if "metadata" in payload or "outside" in payload:  # the functions below rely on nobody to have looked before
            loads["weights"] = partial(load_weights, engine.module, copy)
        for name, load in loads.items():
            try:
                load()
            except ReheatError as error:
                messages[payload, name] = str(error)
    return messages


def _inputs_around_midnight(recipe: Path, topology: Any) -> list[tuple[Any, str, int]]:
    """(date, first prompt, fingerprint) as this rank reads them, and once the ranks have agreed."""
    from megatron_reheat.recipe import load_config
    from megatron_reheat.stages.inputs import agree_on_date, read_inputs

    config = load_config(recipe)
    mine = read_inputs(config, date(2024, 12, 31) + timedelta(days=topology.rank))
    return [(i.today, i.prompts[0].text, i.prompts.fingerprint) for i in (mine, agree_on_date(mine, config, topology))]


def rollbacks(folder: Path, layouts: list[dict[str, Any]], checkpoints: Path, trip: list[dict[str, Any]]) -> Any:
    """What updates and rollbacks do under each of `layouts`; and whether a checkpoint's whole state and its last good weights
    survive being loaded and saved under each layout of `trip` in turn, from the first one's training back to its bits."""
    return {"updates": [_updates(folder, **layout) for layout in layouts], "trip": _trip(folder, checkpoints, trip)}


def _updates(folder: Path, **layout: Any) -> dict[str, Any]:
    """An update whose loss is NaN on one sequence, one that is refused by `accept`, a good one, and a way back."""
    from megatron_reheat.losses.reheat import sft_loss

    def poisoned(vocab: Any, micro: Any) -> Any:
        value, metrics = sft_loss(vocab, micro)
        return value * (torch.nan if 0 in micro.sequence_indices else 1.0), metrics

    with running_engine(folder, **layout) as engine:
        batch = random_batch(seed=6)
        for _ in range(2):
            engine.update(batch, sft_loss, lr=1e-3, weight_decay=0.1)
        before = engine.snapshot()
        trained, moments = _state(engine), _moments(engine)
        bad = engine.update(batch, poisoned, lr=1e-2, weight_decay=0.0)
        refused = engine.update(batch, sft_loss, lr=1e-2, weight_decay=0.0, accept=lambda metrics, scores: False)
        unchanged = _equal(_state(engine), trained) and _equal(_moments(engine), moments)
        good = engine.update(batch, sft_loss, lr=1e-2, weight_decay=0.0)
        moved = not _equal(_state(engine), trained)
        engine.update(batch, sft_loss, lr=1e-2, weight_decay=0.0)
        engine.restore(before)
        restored = _equal(_state(engine), trained)
        # a step from there does the same each time: nothing of what was rolled back is left
        again = []
        for _ in range(2):
            engine.restore(before)
            engine.reset_optimizer()
            loss = engine.update(batch, sft_loss, lr=1e-2, weight_decay=0.0).metrics["sft/loss"]
            again.append((loss, _state(engine), _moments(engine)))
        used = engine.snapshot(into=before)
        reused = used is before and _equal(engine.snapshot(), used) and not _equal(used, trained)
        return {
            "bad": (bad.applied, bad.finite),
            "refused": (refused.applied, refused.finite),
            "good": (good.applied, good.finite),
            "unchanged": unchanged,
            "moved": moved,
            "restored": restored,
            "losses": [good.metrics["sft/loss"], again[0][0], again[1][0]],
            "repeats": all(_equal(x, y) for x, y in zip(again[0][1:], again[1][1:], strict=True)),
            "reused": reused,
            "beyond_bfloat16": any(not torch.equal(t, t.bfloat16().float()) for t in _masters(engine)),
        }


def flattenings(folder: Path, layouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The policy, its logits divided by 1.7 through the final norm's weight, and back; and flattened to a given entropy."""
    return [_flattening(folder, **layout) for layout in layouts]


def _flattening(folder: Path, **layout: Any) -> dict[str, Any]:
    from types import SimpleNamespace

    from megatron_reheat.losses.reheat import sft_loss
    from megatron_reheat.stages.flatten import flatten
    from megatron_reheat.types import Completion, Group, Prompt

    temperature, batch = 1.7, random_batch(seed=8)
    with running_engine(folder, **layout) as engine:
        engine.update(batch, sft_loss, lr=1e-3, weight_decay=0.0)
        start, norm = _state(engine), engine.final_norm()
        hot, cold = engine.score(batch, temperature=temperature), engine.score(batch, temperature=1.0)
        engine.set_final_norm(norm, 1 / temperature)
        flat = engine.score(batch, temperature=1.0)
        stepped = engine.update(batch, sft_loss, lr=1e-6, weight_decay=0.0).applied
        still_flat = engine.score(batch, temperature=1.0)
        engine.set_final_norm(norm, 1.0)
        others = {n for n, p in _state(engine).items() if not torch.equal(p, start[n])}
        prompts = [Prompt(i, "", tuple(s.token_ids[: s.num_prompt_tokens]), {}) for i, s in enumerate(batch.sequences)]
        groups = [
            Group(p, (Completion(s.token_ids[s.num_prompt_tokens :], s.rollout_logprobs, 1.0, 0, "stop"),))
            for p, s in zip(prompts, batch.sequences, strict=True)
        ]
        versions: list[int] = []
        policy: Any = SimpleNamespace(engine=engine, rest=lambda: None, version=4, publish=versions.append)
        target = (cold.mean_entropy + flat.mean_entropy) / 2
        flattened = flatten(policy, groups, target, judged_tokens=100)
        after = engine.score(batch, temperature=1.0)
        return {
            "gap": max(np.abs(a - b).max() for a, b in zip(flat.logprobs, hot.logprobs, strict=True)),
            "moved": max(np.abs(a - b).max() for a, b in zip(flat.logprobs, cold.logprobs, strict=True)),
            "drift": max(np.abs(a - b).max() for a, b in zip(still_flat.logprobs, flat.logprobs, strict=True)),
            "stepped": stepped,
            "norm_is_back": not any("final_layernorm" in name for name in others),
            "flattened": tuple(flattened),
            "target": target,
            "cold": cold.mean_entropy,
            "entropy": after.mean_entropy,
            "published": versions,
        }


def _masters(engine: Any) -> list[Tensor]:
    """What AdamW steps: this rank's float32 values."""
    return [p for o in engine.torch_optimizers() for g in o.param_groups for p in g["params"]]


def _state(engine: Any) -> dict[str, Tensor]:
    weights = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    return {**weights, **{f"master {i}": p.detach().clone() for i, p in enumerate(_masters(engine))}}


def _moments(engine: Any) -> dict[str, Tensor]:
    states = [o.state[p] for o in engine.torch_optimizers() for g in o.param_groups for p in g["params"]]
    return {f"{name} {i}": value.clone() for i, state in enumerate(states) for name, value in state.items()}


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """To the bit."""
    return a.keys() == b.keys() and all(torch.equal(_bits(a[n]), _bits(b[n])) for n in a)


def _bits(values: Tensor) -> Tensor:
    return values.reshape(-1).view(torch.uint8)


def _trip(folder: Path, checkpoints: Path, trip: list[dict[str, Any]]) -> dict[str, Any]:
    from megatron_reheat.losses.reheat import sft_loss
    from megatron_reheat.model.checkpoint import load_checkpoint, load_snapshot
    from megatron_reheat.model.checkpoint_save import save_checkpoint

    batch = random_batch(seed=7)
    with running_engine(folder, **trip[0]) as engine:
        for _ in range(2):
            engine.update(batch, sft_loss, lr=1e-3, weight_decay=0.1)
        first, teacher = _state(engine), engine.snapshot()
        engine.update(batch, sft_loss, lr=1e-3, weight_decay=0.1)
        start, last_good = _state(engine), engine.snapshot()
        engine.update(batch, sft_loss, lr=1e-2, weight_decay=0.1)
        end = {**_state(engine), **_moments(engine)}
        save_checkpoint(engine, checkpoints, 1, {}, keep=9)
        absent = load_snapshot(engine, checkpoints / "step-1", "last_good") is None
        snapshots = {"last_good": last_good, "teacher": teacher}
        save_checkpoint(engine, checkpoints, 2, {}, keep=9, snapshots=snapshots)
    read: list[tuple[int, int, int]] = []
    for step, layout in enumerate([*trip[1:], trip[0]], start=3):
        with running_engine(folder, **layout) as engine:
            read.append(_read_of_optimizer(engine))
            load_checkpoint(engine, checkpoints / f"step-{step - 1}")
            snapshots = {name: load_snapshot(engine, checkpoints / f"step-{step - 1}", name) for name in snapshots}
            if layout != trip[0]:
                save_checkpoint(engine, checkpoints, step, {}, keep=9, snapshots=snapshots)
                continue
            returned = _equal({**_state(engine), **_moments(engine)}, end)
            reader = engine.frozen_weights(snapshots["teacher"])
            untouched = _equal({**_state(engine), **_moments(engine)}, end)
            with reader.in_place():
                read_by = {name: weight.clone() for name, weight in engine.iter_hf_weights()}
            engine.restore(snapshots["last_good"])
            back = _equal(_state(engine), start)
            engine.restore(snapshots["teacher"])
            same = _equal(dict(engine.iter_hf_weights()), read_by) and _equal(_state(engine), first)
            trip_of = {"absent": absent, "whole_state": returned and untouched, "last_good": back, "teacher": same}
            return {**trip_of, "read": read}
    raise AssertionError("the trip has no way back")


def _read_of_optimizer(engine: Any) -> tuple[int, int, int]:
    """Values that this rank asks a checkpoint for, at most as many as it needs to, and all that its chunks have."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    from megatron_reheat.model.checkpoint import sharded_state

    entries = nested_values(sharded_state(engine, is_loading=True)["optimizer"])
    asked = sum(e.data.numel() for e in entries if getattr(e, "key", "").startswith("optimizer.state."))
    sizes = {name: parameter.numel() for name, parameter in engine.module.named_parameters()}
    return asked, 3 * sum(sizes[name] for name in engine.masters.names), 3 * sum(sizes.values())


def saves_in_background(folder: Path, checkpoints: Path, layouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Under each of `layouts`: what a save holds that is written only after two more updates, what lies in the folder
    meanwhile, and what becomes of one that cannot be written."""
    return [_save_behind_updates(folder, checkpoints / str(n), layout) for n, layout in enumerate(layouts)]


def _save_behind_updates(folder: Path, checkpoints: Path, layout: dict[str, Any]) -> dict[str, Any]:
    from megatron_reheat.errors import ReheatError
    from megatron_reheat.losses.reheat import sft_loss
    from megatron_reheat.model.checkpoint import load_checkpoint, load_snapshot
    from megatron_reheat.model.checkpoint_save import CheckpointSaver, Contents
    from megatron_reheat.model.host_copy import HostCopy

    batch, gather, may_write = random_batch(seed=8), HostCopy.gather, threading.Event()

    def gather_later(copy: HostCopy, group: Any) -> None:
        assert may_write.wait(timeout=300)
        gather(copy, group)

    def names() -> list[str]:
        return sorted(path.name for path in checkpoints.iterdir())

    with running_engine(folder, **layout) as engine, mock.patch.object(HostCopy, "gather", gather_later):
        saver = CheckpointSaver(engine, checkpoints, in_background=True)
        restored, memory = [], []
        for step in (1, 2):
            may_write.clear()
            before = engine.snapshot()
            engine.update(batch, sft_loss, lr=1e-3, weight_decay=0.1)
            saved = {**_state(engine), **_moments(engine)}
            saver.begin(Contents(step, {"step": step}, keep=1), {"last_good": before})
            memory.append([buffer.data_ptr() for buffer in saver._buffers._buffers])
            for _ in range(2):
                engine.update(batch, sft_loss, lr=1e-2, weight_decay=0.1)
            meanwhile = saver.finish(wait=False), names(), saver.step
            engine.topology.barrier()
            may_write.set()
            path = saver.finish(wait=True).path
            moved = not _equal(_state(engine), {name: saved[name] for name in _state(engine)})
            load_checkpoint(engine, path)
            same = _equal({**_state(engine), **_moments(engine)}, saved)
            restored.append((moved, same, _equal(load_snapshot(engine, path, "last_good"), before)))
        complete = names()
        engine.topology.barrier()  # the next save's folder is made by one rank
        may_write.clear()
        saver.begin(Contents(3, {"step": 3}, keep=1))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, limits[1]))
        may_write.set()
        refusal, borders = None, 0
        try:
            while borders < 3000 and saver.finish(wait=False) is None:
                borders += 1
                time.sleep(0.02)
        except ReheatError as error:
            refusal = str(error), error.on_every_rank
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        engine.topology.barrier()
        left = names()
        engine.topology.barrier()
        saver.begin(Contents(4, {"step": 4}, keep=1))
        saver.finish(wait=True)
        return {
            "restored": restored, "reused": memory[0] == memory[1] and bool(memory[0]), "meanwhile": meanwhile,
            "complete": complete, "refusal": refusal, "left": left, "at_last": names(),
        }  # fmt: skip


def sequence_losses(folder: Path, layouts: list[dict[str, Any]]) -> dict[str, Any]:
    """One step of GSPO under each layout: loss, gradient norm and weights; and the same by transformers in float64. Then a step
    that corrects for the sampler, scored before and in the update."""
    from megatron_reheat.losses.policy_gradient import surrogate_loss
    from megatron_reheat.losses.surrogates import response_importance, sequence_clipped

    gspo = partial(sequence_clipped, clip_low=0.05, clip_high=0.1)
    loss = partial(surrogate_loss, surrogate=gspo, sampling_temperature=0.9, tis_cap=None, entropy_coef=0.0)
    batch, results = _with_old_logprobs(folder, random_batch(seed=12)), []
    for layout in layouts:
        with running_engine(folder, **layout) as engine:
            options = {"aggregation": "sequence_mean", "whole_sequences": True}
            metrics = engine.update(batch, loss, lr=1e-3, weight_decay=0.0, **options).metrics
            weights = {n: t.clone() for n, t in engine.iter_hf_weights()}
            corrected = partial(loss, tis_cap=0.8, importance=response_importance)
            alone = _scored_in_update(engine, corrected, **options)
            results.append({"metrics": metrics, "weights": weights, "alone": alone})
    return {"ours": results, "dense": _dense_gspo_step(folder, batch, 0.05, 0.1) if dist.get_rank() == 0 else None}


def _dense_logprobs(model: Any, batch: Any) -> list[Tensor]:
    """[R] of each sequence at temperature 0.9."""
    rows = []
    for sequence, ids in zip(batch.sequences, token_tensors(batch), strict=True):
        logprobs = (model(ids[None]).logits[0] / 0.9).log_softmax(-1)
        first = sequence.num_prompt_tokens
        rows.append(logprobs[first - 1 : -1].gather(1, ids[first:, None])[:, 0])
    return rows


def _with_old_logprobs(folder: Path, batch: Any) -> Any:
    """Those of the model, some way off."""
    from transformers import AutoModelForCausalLM

    model, generator = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64), np.random.default_rng(13)
    with torch.no_grad():
        rows = [row.numpy() for row in _dense_logprobs(model, batch)]
    return batch.with_old_logprobs([(r + generator.normal(0, 0.3, r.shape)).astype(np.float32) for r in rows])


def _dense_gspo_step(folder: Path, batch: Any, clip_low: float, clip_high: float) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    terms, clipped = [], 0
    for s, row in zip(batch.sequences, _dense_logprobs(model, batch), strict=True):
        ratio = (row - torch.from_numpy(s.old_logprobs)).mean().exp()
        terms.append(-torch.minimum(ratio * s.advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * s.advantage))
        clipped += bool(terms[-1] != -ratio * s.advantage)
    loss = torch.stack(terms).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-4, weight_decay=0.0).step()
    after = {name: p.detach() for name, p in model.named_parameters()}
    return {"loss": loss.item(), "norm": norm.item(), "before": before, "after": after, "clipped": clipped}


def references(folder: Path, begins: list[dict[str, Any]], resumes: list[dict[str, Any]], root: Path) -> dict[str, Any]:
    """A reference policy of each of `begins`' layouts, after two steps of training; the first's read back under those of
    `resumes`, after other weights were loaded."""
    from megatron_reheat.stages.reference import Reference

    begun = [_begin_reference(folder, root / f"kept-{i}", **layout) for i, layout in enumerate(begins)]
    batch, resumed = random_batch(seed=4), []
    for layout in resumes:
        with running_engine(folder, **layout) as engine:
            reference = Reference(engine, root / "kept-0", folder, (1,))
            before = _state(engine)
            reference.resume(begun[0]["digest"])
            unmoved = _equal(_state(engine), before)
            scores = reference.score(batch, temperature=0.9)
            resumed.append({"unmoved": unmoved, "scores": scores, "refusals": _reference_refusals(engine, reference)})
    return {"begun": begun, "resumed": resumed}


def _begin_reference(folder: Path, kept: Path, **layout: Any) -> dict[str, Any]:
    from megatron_reheat.losses.reheat import sft_loss
    from megatron_reheat.stages.reference import Reference

    batch = random_batch(seed=4)
    with running_engine(folder, **layout) as engine:
        for seed in (6, 7):
            engine.update(random_batch(seed), sft_loss, lr=1e-3, weight_decay=0.1)
        expected = engine.score(batch, temperature=0.9)
        exported = {n: t.clone() for n, t in engine.iter_hf_weights()}
        reference = Reference(engine, kept, folder, (1,))
        reference.begin(keep=True)
        engine.update(random_batch(8), sft_loss, lr=1e-2, weight_decay=0.1)
        moved, state = engine.score(batch, temperature=0.9), {**_state(engine), **_moments(engine)}
        scores = reference.score(batch, temperature=0.9)
        again = engine.score(batch, temperature=0.9)
        undisturbed = _equal({**_state(engine), **_moments(engine)}, state) and _same_scores(again, moved)
        # a step after the exchange is the step without it
        before, moments = engine.snapshot(), _moments(engine)
        after = engine.update(batch, sft_loss, lr=1e-2, weight_decay=0.0).metrics["sft/loss"]
        trained = _state(engine)
        engine.restore(before)
        _put_moments_back(engine, moments)
        reference.score(batch, temperature=0.9)
        loss = engine.update(batch, sft_loss, lr=1e-2, weight_decay=0.0).metrics["sft/loss"]
        return {
            "digest": reference.digest,
            "scores": scores,
            "as_it_was": _same_scores(scores, expected),
            "differs": not _same_scores(moved, expected),
            "undisturbed": undisturbed,
            "same_step": loss == after and _equal(_state(engine), trained),
            "exported": exported if engine.topology.is_main else None,
        }


def _put_moments_back(engine: Any, moments: dict[str, Tensor]) -> None:
    states = [o.state[p] for o in engine.torch_optimizers() for g in o.param_groups for p in g["params"]]
    for name, value in moments.items():
        key, index = name.split()
        states[int(index)][key].copy_(value)


def _same_scores(a: Any, b: Any) -> bool:
    """To the bit."""
    pairs = zip([*a.logprobs, *a.entropies], [*b.logprobs, *b.entropies], strict=True)
    return all(x.tobytes() == y.tobytes() for x, y in pairs)


def _reference_refusals(engine: Any, reference: Any) -> list[str]:
    """What is said where the first weights were not kept, and where they are others."""
    from megatron_reheat.errors import ReheatError

    messages = []
    for digest in (None, "0" * 16):
        try:
            reference.resume(digest)
        except ReheatError as error:
            messages.append(str(error))
    return messages


def steps_with_a_bad_minibatch(folder: Path, layouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """An RL step of three minibatches, first as it should be, then with one whose gradient overflows."""
    return [_steps_with_a_bad_minibatch(folder, **layout) for layout in layouts]


def _steps_with_a_bad_minibatch(folder: Path, **layout: Any) -> dict[str, Any]:
    """Engine and stage are real; the sampling is not: the responses are the same random ones in every step."""
    from types import SimpleNamespace

    from megatron_reheat.methods.grpo import GRPO, Tools
    from megatron_reheat.stages.controller import Controller
    from megatron_reheat.stages.rlvr import RLVRStage
    from megatron_reheat.types import At, Collected, Completion, Group, Prompt, Reward, TrainBatch, TrainSequence

    generator = np.random.default_rng(8)
    prompts = [Prompt(i, "", tuple(generator.integers(2, 131, 4).tolist()), {}) for i in range(3)]
    responses = [[generator.integers(2, 131, 5 + i).astype(np.int32) for i in range(2)] for _ in prompts]
    results = {}
    with running_engine(folder, **layout) as engine:
        rl = {"prompts_per_step": 3, "group_size": 2, "minibatch_prompts": 1, "normalize_by_std": False}
        optimizer = {"lr": 1e-3, "warmup_steps": 0}
        config = engine.config.model_copy(
            update={
                "rl": engine.config.rl.model_copy(update=rl),
                "optimizer": engine.config.optimizer.model_copy(update=optimizer),
            }
        )
        start = engine.snapshot()
        for name, rewards in (("good", (1.0, 1.0, 1.0)), ("bad", (1.0, 3e38, 1.0)), ("worst", (3e38, 3e38, 3e38))):
            engine.restore(start)
            engine.reset_optimizer()
            batch = TrainBatch(
                tuple(
                    TrainSequence.of(prompt, Completion(tokens, np.zeros(len(tokens), np.float32), 1.0, 0, "stop"))
                    for prompt, pair in zip(prompts, responses, strict=True)
                    for tokens in pair
                )
            )
            logprobs = iter(engine.score(batch, temperature=1.0).logprobs)
            groups = [
                Group(
                    prompt,
                    tuple(Completion(tokens, next(logprobs), 1.0, 0, "stop") for tokens in pair),
                    (Reward(reward, True), Reward(0.0, False)),
                )
                for prompt, pair, reward in zip(prompts, responses, rewards, strict=True)
            ]
            published: list[int] = []
            policy = SimpleNamespace(engine=engine, version=0, rest=lambda: None, publish=published.append)
            collected = Collected(groups, groups, [], {})
            collector = SimpleNamespace(collect=lambda *_, collected=collected, **__: collected, rest=lambda: None)
            method = GRPO(config, None, Tools(engine.hf, str, lambda *_: None))
            controller = Controller(config.controller)
            at = At(step=1, rl_step=1, stage_step=0, temperature=1.0, seed=0)
            outcome, _ = RLVRStage(config, policy, collector, method, controller).step(at)
            results[name] = (outcome.metrics, outcome.applied, outcome.finite, len(published))
    return results


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
    """Each run: `--from-hf`, load that under the run's layout, take a step, save, `--to-hf` of a copy of the checkpoint
    alone (of the start too).

    The main rank converts, alone, before and after the job. Returns by rank whether the loaded weights were those of the
    Hugging Face folder, and what the main rank's conversions reported.
    """
    from megatron_reheat.commands.convert import from_hf, to_hf
    from megatron_reheat.parallel import topology

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
                alone = run["run"].with_name(f"{run['run'].name}-copied") / "step-1"
                shutil.copytree(run["run"] / "checkpoints" / "step-1", alone)
                messages.append(to_hf(alone, run["out"], shard_gb=6e-5))
    return {"started_exact": exact, "messages": messages}


def _train_from_converted(run: dict[str, Any]) -> bool:
    from megatron_reheat.losses.reheat import sft_loss
    from megatron_reheat.model.carried_files import read_carried_files
    from megatron_reheat.model.checkpoint import latest_checkpoint, load_checkpoint
    from megatron_reheat.model.checkpoint_save import save_checkpoint
    from megatron_reheat.run_folder import RunFolder

    folder = RunFolder(run["run"])
    config = yaml.safe_dump({"model": {"hf_path": str(run["folder"])}, "run": {"name": folder.path.name}})
    with running_engine(run["folder"], **run["layout"]) as engine:
        original = {n: t.clone() for n, t in engine.iter_hf_weights()}
        engine.restore({n: torch.zeros_like(t) for n, t in engine.snapshot().items()})
        state = load_checkpoint(engine, latest_checkpoint(RunFolder(run["start"]).checkpoints))
        loaded = dict(engine.iter_hf_weights())
        exact = all(torch.equal(loaded[n], t) for n, t in original.items())
        engine.update(random_batch(seed=9), sft_loss, lr=1e-2, weight_decay=0.0)
        state = {**state, "step": 1, "policy_version": 1}
        carried = read_carried_files(config, run["folder"])
        save_checkpoint(engine, folder.checkpoints, 1, state, keep=1, carried=carried)
        exported = {n: t.clone() for n, t in engine.iter_hf_weights()}
        # a step from what was loaded, in the optimizer's main parameters too
        exact &= all(torch.allclose(exported[n], t, rtol=0.01, atol=0.02) for n, t in original.items())
        if engine.topology.is_main:
            folder.config.write_text(config)
            torch.save(exported, folder.path / "exported.pt")
    return exact


# -- shared pieces -------------------------------------------------------------------------------------------------------


class running_engine:
    """An `Engine` under a layout, in the job's process group; Megatron's state is torn down on the way out."""

    def __init__(self, folder: Path, *, aggregation: str = "token_mean", **layout: Any) -> None:
        from megatron_reheat.recipe import parse_config

        dtype = layout.pop("dtype", "float32")
        keys = ("attention", "recompute", "fused_head", "head_chunk_tokens")
        model = {name: layout.pop(name) for name in keys if name in layout}
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
