"""SDPG and OISD as their classes have it, on a real engine, and the same written out with transformers in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.distributed.cases import random_batch, running_engine

OLD_LOGPROB, REF_LOGPROB = -4.8, -5.3  # of every token: given, so that no ratio depends on a layout's rounding
CLIP_LOW, CLIP_HIGH, DUAL_CLIP = 0.2, 0.28, 10.0
LAYERS = 4
SDPG = {"beta": 0.7, "alpha": 0.3, "warmup_steps": 4, "decay_steps": 5, "total_steps": 10}
OISD = {
    "layer": 2, "think_coef": 0.8, "think_temperature": 1.3, "attention_coef": 0.6, "advantage_clip": 0.9,
    "attention_queries": 3, "attention_window": 4, "attention_stride": 3,
}  # fmt: skip
HINTED_ALONE = 7  # of the second step's sequences, one of positive advantage
RL_STEP = 3  # beta = 0.7 x 3/4


def train_with_methods(runs: list[tuple[Path, str, dict[str, Any], dict[str, Any]]]) -> list[dict[str, Any]]:
    """Two steps for each model, method, changed options and layout; metrics and final weights."""
    return [_train(*run) for run in runs]


def _train(folder: Path, name: str, options: dict[str, Any], layout: dict[str, Any]) -> dict[str, Any]:
    with running_engine(folder, **layout) as engine:
        method, history = make_method(name, options), []
        for step in range(2):
            minibatch = make_batch(step)
            result = engine.update(
                minibatch,
                method.loss(_at()),
                lr=1e-3,
                weight_decay=0.01,
                views=method.views(minibatch),
                taps=method.taps,
                attention=method.attention(),
            )
            history.append(result.metrics)
        return {"layout": layout, "metrics": history, "weights": {n: t.clone() for n, t in engine.iter_hf_weights()}}


def make_method(name: str, options: dict[str, Any]) -> Any:
    """As a recipe would."""
    from megatron_reheat.methods import choose_method
    from megatron_reheat.methods.grpo import Tools
    from megatron_reheat.recipe import parse_config

    config = parse_config(
        {
            "model": {"hf_path": "m"},
            "data": {"path": "p", "hint_template": "{prompt} {solution}"},
            "rollout": {"max_tokens": 64},
            "rl": {"method": name, "options": {**{"sdpg": SDPG, "oisd": OISD}[name], **options}},
        }
    )
    hf = SimpleNamespace(num_hidden_layers=LAYERS, max_position_embeddings=1 << 16)
    return choose_method(config).make(config, Tools(hf, str, lambda prompt, solution: None))


def _at() -> Any:
    from megatron_reheat.types import At

    return At(step=9, rl_step=RL_STEP, stage_step=0, temperature=1.0, seed=0)


def make_batch(step: int) -> Any:
    """Sequences as `weigh` leaves them; every third has no hint, and in the second step all but one: of several ranks, some
    have nothing for the teacher to read then."""
    from megatron_reheat.losses.policy_gradient import REF_LOGPROBS
    from megatron_reheat.losses.sdpg import HINTED

    generator = np.random.default_rng(step)
    sequences = []
    for i, s in enumerate(random_batch(seed=40 + step).sequences):
        length = s.num_response_tokens
        hint = (
            generator.integers(2, 131, 1 + i % 5).astype(np.int32) if (i == HINTED_ALONE if step else i % 3) else None
        )
        column = {
            HINTED: np.full(length, float(hint is not None), np.float32),
            REF_LOGPROBS: np.full(length, REF_LOGPROB, np.float32),
        }
        hinted = None if hint is None else np.concatenate([hint, s.token_ids[: s.num_prompt_tokens]])
        old = np.full(length, OLD_LOGPROB, np.float32)
        sequences.append(replace(s, old_logprobs=old, extra=column, privileged_token_ids=hinted))
    return type(random_batch(0))(tuple(sequences))


# -- the same, dense -----------------------------------------------------------------------------------------------------


class Dense:
    """A first step with transformers, autograd and float64: `loss(sequence)` gives a sequence's share of the loss and adds to
    `sums`, by metric: total and count."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
        self.batch = make_batch(0)
        self.num_tokens = sum(s.num_response_tokens for s in self.batch.sequences)
        self.sums: dict[str, list[float]] = {}

    def metrics(self) -> dict[str, float]:
        total = sum(self.loss(s) for s in self.batch.sequences)
        total.backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for p in self.model.parameters() if p.grad is not None))
        means = {name: total / count for name, (total, count) in self.sums.items()}
        return {**means, "optimizer/grad_norm": float(norm)}

    def add(self, name: str, total: float, count: float) -> None:
        entry = self.sums.setdefault(name, [0.0, 0.0])
        entry[0], entry[1] = entry[0] + float(total), entry[1] + count

    def read(self, sequence: Any, **options: Any) -> Any:
        ids = torch.from_numpy(sequence.token_ids.astype(np.int64))[None]
        return self.model(ids, output_hidden_states=True, **options)

    def logits(self, states: Tensor, sequence: Any) -> Tensor:
        return self.model.lm_head(states[0, sequence.num_prompt_tokens - 1 : -1])

    def policy(self, logits: Tensor, s: Any) -> tuple[Tensor, Tensor]:
        """[R] clipped loss, and log-probabilities."""
        targets = torch.from_numpy(s.token_ids[s.num_prompt_tokens :].astype(np.int64))
        logprobs = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        ratio, a = (logprobs - OLD_LOGPROB).exp(), s.advantage
        loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH))
        if a < 0:
            loss = torch.minimum(loss, torch.full_like(loss, -a * DUAL_CLIP))
        return loss, logprobs

    def loss(self, sequence: Any) -> Tensor:
        raise NotImplementedError


class DenseSDPG(Dense):
    def __init__(self, folder: Path, *, importance_weighted: bool = True) -> None:
        super().__init__(folder)
        self.importance_weighted = importance_weighted

    def loss(self, sequence: Any) -> Tensor:
        s, n = sequence, self.num_tokens
        z = self.logits(self.read(s).hidden_states[-1], s)
        policy, logprobs = self.policy(z, s)
        rho = (logprobs - OLD_LOGPROB).exp().detach() if self.importance_weighted else torch.ones_like(logprobs)
        log_w = logprobs - REF_LOGPROB
        anchor = 1 / log_w.exp() + log_w
        total = policy + 0.3 * rho * anchor
        length = s.num_response_tokens
        self.add("sdpg/anchor", anchor.detach().sum(), length)
        self.add("sdpg/ref_log_ratio", log_w.detach().sum(), length)
        distilled = s.privileged_token_ids is not None and s.advantage > 0
        self.add("sdpg/distilled_fraction", distilled * length, length)
        if distilled:
            view = s.behind(s.privileged_token_ids)
            with torch.no_grad():
                u = self.logits(self.read(view).hidden_states[-1], view)
            kl = (z.softmax(-1) * (z.log_softmax(-1) - u.log_softmax(-1))).sum(-1)
            assert kl.max() < 20
            total = total + 0.7 * 3 / 4 * rho * kl
            self.add("sdpg/teacher_kl", kl.detach().sum(), length)
        return total.sum() / n


class DenseOISD(Dense):
    def __init__(self, folder: Path, **options: float) -> None:
        super().__init__(folder)
        self.options = {**OISD, **options}

    def loss(self, sequence: Any) -> Tensor:
        s, o, count = sequence, self.options, len(self.batch)
        length = s.num_response_tokens
        queries_and_keys: dict[int, tuple[Tensor, Tensor]] = {}
        states = self._read_with_attention(s, queries_and_keys)
        z = self.logits(states[-1], s)
        total = self.policy(z, s)[0].sum() / self.num_tokens
        signed = max(-0.9, min(0.9, s.advantage))
        y = self.model.lm_head(self.model.model.norm(states[o["layer"]][0, s.num_prompt_tokens - 1 : -1]))
        if o["think_coef"]:
            js = _js((y / 1.3).softmax(-1), (z.detach() / 1.3).softmax(-1))
            think = signed * js.mean() / count
            total = total + o["think_coef"] * think
            self.add("oisd/think_js", js.detach().sum(), length)
            self.add("oisd/layer_entropy", -(y.softmax(-1) * y.log_softmax(-1)).detach().sum(), length)
            self.add("oisd/think_loss", think.detach(), 1 / count)
        if o["attention_coef"]:
            js = self._attention(s, queries_and_keys)
            attention = signed * sum(js) / len(js) / count
            total = total + o["attention_coef"] * attention
            self.add("oisd/attention_js", sum(js).detach(), len(js))
            self.add("oisd/attention_loss", attention.detach(), 1 / count)
        return total

    def _read_with_attention(self, s: Any, queries_and_keys: dict[int, tuple[Tensor, Tensor]]) -> Any:
        """Hidden states; queries and keys after rotary embedding, made from each layer's own modules."""
        from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

        def keep(layer: int) -> Any:
            def hook(module: Any, _: Any, given: dict[str, Any]) -> None:
                hidden = given["hidden_states"]
                shape = (*hidden.shape[:-1], -1, module.head_dim)
                q = module.q_norm(module.q_proj(hidden).view(shape)).transpose(1, 2)
                k = module.k_norm(module.k_proj(hidden).view(shape)).transpose(1, 2)
                queries_and_keys[layer] = apply_rotary_pos_emb(q, k, *given["position_embeddings"])

            return hook

        wanted = (self.options["layer"], LAYERS)
        hooks = [
            self.model.model.layers[n - 1].self_attn.register_forward_pre_hook(keep(n), with_kwargs=True)
            for n in wanted
        ]
        try:
            return self.read(s).hidden_states
        finally:
            for hook in hooks:
                hook.remove()

    def _attention(self, s: Any, queries_and_keys: dict[int, tuple[Tensor, Tensor]]) -> list[Tensor]:
        """The JS of three query positions at most, position by position and head by head."""
        length, first = s.num_response_tokens, s.num_prompt_tokens - 1
        chosen = {1: [0], 2: [0, 1]}.get(length) or [int((i + 0.5) * length / 3) for i in range(3)]
        divergences = []
        for t in (first + c for c in chosen):
            keys = sorted({*range(max(0, t - 3), t + 1), *(j for j in range(0, t + 1, 3) if j <= t - 4)})
            by_head = []
            for head in range(self.model.config.num_attention_heads):
                own, last = (
                    torch.stack([q[0, head, t] @ k[0, head // 2, j] / math.sqrt(q.size(-1)) for j in keys]).softmax(0)
                    for q, k in (queries_and_keys[self.options["layer"]], queries_and_keys[LAYERS])
                )
                by_head.append(_js(own, last.detach()))
            divergences.append(torch.stack(by_head).mean())
        return divergences


def _js(p: Tensor, q: Tensor) -> Tensor:
    mixed = (0.5 * (p + q)).log()
    return 0.5 * ((p * (p.log() - mixed)).sum(-1) + (q * (q.log() - mixed)).sum(-1))
