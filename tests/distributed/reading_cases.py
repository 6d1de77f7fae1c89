"""Losses that look at more than the policy's own prediction: a teacher's behind another prompt, and intermediate layers'."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.distributed.cases import random_batch, running_engine

TEMPERATURES = {"teacher": 1.0, "tap": 1.3}
KL_COEF, TAP_COEF = 0.5, 0.7
FLATTENED_AT = 1.3
CLIP = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}


def train_with_readings(runs: list[tuple[Path, tuple[int, ...], dict[str, Any]]]) -> list[dict[str, Any]]:
    """Two steps per model, tapped layers and layout; metrics and final weights."""
    return [_train(folder, taps, **layout) for folder, taps, layout in runs]


def _train(folder: Path, taps: tuple[int, ...], **layout: Any) -> dict[str, Any]:
    with running_engine(folder, **layout) as engine:
        history = []
        for step in range(2):
            batch, view = make_batch(step)
            # given, not scored: the first ratio must not depend on a layout's rounding
            batch = batch.with_old_logprobs([np.full(s.num_response_tokens, -5.0, np.float32) for s in batch.sequences])
            views = {"teacher": view, "twin": batch}
            loss = partial(loss_with_readings, taps=taps)
            result = engine.update(batch, loss, lr=1e-3, weight_decay=0.01, views=views, taps=taps)
            history.append(result.metrics)
        return {"layout": layout, "metrics": history, "weights": {n: t.clone() for n, t in engine.iter_hf_weights()}}


def make_batch(step: int) -> tuple[Any, Any]:
    """Sequences, and the same responses behind longer prompts of different lengths."""
    from megatron_reheat.types import TrainBatch

    batch = random_batch(seed=20 + step)
    generator = np.random.default_rng(step)
    view = [
        s.behind(np.concatenate([generator.integers(2, 131, 1 + i % 5).astype(np.int32), s.token_ids[: s.num_prompt_tokens]]))
        for i, s in enumerate(batch.sequences)
    ]  # fmt: skip
    return batch, TrainBatch(tuple(replace(s, share=None) for s in view))


def loss_with_readings(vocab: Any, micro: Any, *, taps: tuple[int, ...]) -> tuple[Tensor, Any]:
    """Clipped policy loss, a gated KL to the teacher view, and a signed JS of every tapped layer to the last one."""
    from megatron_reheat.losses.policy_gradient import policy_loss

    loss, metrics = policy_loss(vocab, micro, sampling_temperature=1.0, tis_cap=None, entropy_coef=0.0, **CLIP)
    kl = vocab.kl_to(micro.readings["teacher"], temperature=TEMPERATURES["teacher"])
    gate = (micro.advantages > 0).float()
    loss = loss + KL_COEF * (gate * kl * micro.loss_weights).sum()
    count = int(micro.loss_mask.sum())
    metrics.add_mean("teacher/kl", float(kl.detach().sum()), count)
    # the view that is the batch itself has the policy's own prediction
    twin = vocab.kl_to(micro.readings["twin"])
    metrics.add_mean("twin/kl", float(twin.detach().sum()), count)
    for layer in taps:
        js = micro.readings[f"layer{layer}"].js_to(vocab, temperature=TEMPERATURES["tap"])
        loss = loss + TAP_COEF * (micro.advantages.clamp(-1, 1) * js * micro.loss_weights).sum()
        metrics.add_mean(f"layer{layer}/js", float(js.detach().sum()), count)
    return loss, metrics


def dense_first_step(folder: Path, taps: tuple[int, ...]) -> dict[str, float]:
    """The same loss with transformers and autograd in float64: metrics of the first step and the gradient's norm."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    batch, view = make_batch(0)
    total_tokens = sum(s.num_response_tokens for s in batch.sequences)
    sums = dict.fromkeys(["loss", "teacher/kl", *(f"layer{layer}/js" for layer in taps)], 0.0)
    total = torch.zeros((), dtype=torch.float64)

    def read(sequence: Any) -> tuple[Tensor, ...]:
        ids = torch.from_numpy(sequence.token_ids.astype(np.int64))[None]
        return model(ids, output_hidden_states=True).hidden_states

    def predict(states: Tensor, sequence: Any, *, norm: bool) -> Tensor:
        states = states[0, sequence.num_prompt_tokens - 1 : -1]
        return model.lm_head(model.model.norm(states) if norm else states)

    for s, v in zip(batch.sequences, view.sequences, strict=True):
        states = read(s)
        z = predict(states[-1], s, norm=False)  # the last hidden states are behind the final norm already
        with torch.no_grad():
            u = predict(read(v)[-1], v, norm=False)
        targets = torch.from_numpy(s.token_ids[s.num_prompt_tokens :].astype(np.int64))
        ratio = (z.log_softmax(-1).gather(-1, targets[:, None])[:, 0] + 5.0).exp()
        a = s.advantage
        per_token = torch.maximum(-a * ratio, -a * ratio.clamp(1 - CLIP["clip_low"], 1 + CLIP["clip_high"]))
        if a < 0:
            per_token = torch.minimum(per_token, torch.full_like(per_token, -a * CLIP["dual_clip"]))
        p, log_p, log_u = z.softmax(-1), z.log_softmax(-1), u.log_softmax(-1)
        kl = (p * (log_p - log_u)).sum(-1)
        per_token = per_token + KL_COEF * (a > 0) * kl
        sums["teacher/kl"] += float(kl.detach().sum())
        for layer in taps:
            y = predict(states[layer], s, norm=True) / TEMPERATURES["tap"]
            q, mine = (z.detach() / TEMPERATURES["tap"]).softmax(-1), y.softmax(-1)
            mixed = (0.5 * (q + mine)).log()
            js = 0.5 * ((mine * (mine.log() - mixed)).sum(-1) + (q * (q.log() - mixed)).sum(-1))
            per_token = per_token + TAP_COEF * max(-1.0, min(1.0, a)) * js
            sums[f"layer{layer}/js"] += float(js.detach().sum())
        total = total + per_token.sum() / total_tokens
    total.backward()
    norm = torch.sqrt(sum((p.grad**2).sum() for p in model.parameters() if p.grad is not None))
    metrics = {name: value / total_tokens for name, value in sums.items() if name != "loss"}
    return {**metrics, "optimizer/grad_norm": float(norm)}


def train_by_frozen_teacher(runs: list[tuple[Path, str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Per model, direction and layout: a step away from the teacher, then two towards what it says at a higher temperature."""
    return [_train_by_frozen_teacher(folder, direction, **layout) for folder, direction, layout in runs]


def _train_by_frozen_teacher(folder: Path, direction: Any, **layout: Any) -> dict[str, Any]:
    from megatron_reheat.losses.reheat import TEACHER, reheat_loss, sft_loss

    with running_engine(folder, **layout) as engine:
        teacher = engine.frozen_weights(engine.snapshot())
        engine.update(random_batch(seed=40), sft_loss, lr=1e-2, weight_decay=0.0)
        moved = {n: t.clone() for n, t in engine.iter_hf_weights()}
        loss, history = partial(reheat_loss, teacher_temperature=FLATTENED_AT, direction=direction), []
        for step in range(2):
            batch = random_batch(seed=41 + step)
            views, readers = {TEACHER: batch}, {TEACHER: teacher}
            history.append(engine.update(batch, loss, lr=1e-3, weight_decay=0.0, views=views, readers=readers).metrics)
        weights = {n: t.clone() for n, t in engine.iter_hf_weights()}
        return {"layout": layout, "metrics": history, "moved": moved, "weights": weights}


def dense_step_by_frozen_teacher(folder: Path, direction: str, moved: dict[str, Tensor]) -> dict[str, float]:
    """The first of these steps, with transformers and autograd in float64: metrics and the gradient's norm."""
    from transformers import AutoModelForCausalLM

    teacher, policy = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager") for _ in "ab"
    )
    policy.load_state_dict({n: t.double() for n, t in moved.items()}, strict=False)
    policy.tie_weights()
    batch = random_batch(seed=41)
    total_tokens = sum(s.num_response_tokens for s in batch.sequences)
    kl, entropy, teacher_entropy = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    for s in batch.sequences:
        ids = torch.from_numpy(s.token_ids.astype(np.int64))[None]
        at = slice(s.num_prompt_tokens - 1, -1)
        with torch.no_grad():
            log_t = (teacher(ids).logits[0, at] / FLATTENED_AT).log_softmax(-1)
        log_p = policy(ids).logits[0, at].log_softmax(-1)
        first, second = (log_t, log_p) if direction == "forward" else (log_p, log_t)
        kl = kl + (first.exp() * (first - second)).sum() / total_tokens
        entropy -= (log_p.exp() * log_p).detach().sum() / total_tokens
        teacher_entropy -= (log_t.exp() * log_t).sum() / total_tokens
    kl.backward()
    norm = torch.sqrt(sum((p.grad**2).sum() for p in policy.parameters() if p.grad is not None))
    return {
        "reheat/kl": float(kl.detach()), "entropy/mean": float(entropy), "reheat/teacher_entropy": float(teacher_entropy),
        "optimizer/grad_norm": float(norm),
    }  # fmt: skip
