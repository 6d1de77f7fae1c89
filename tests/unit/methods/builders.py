"""Groups, collections and scores for the tests of methods, with every number in the test's hands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from megatron_reheat.config import Config
from megatron_reheat.methods import choose_method
from megatron_reheat.methods.grpo import GRPO, Tools
from megatron_reheat.recipe import parse_config
from megatron_reheat.types import At, Collected, Completion, Group, Prompt, Reward, Scores, TrainBatch

NO_HINTS = Tools(SimpleNamespace(max_position_embeddings=10_000), lambda ids: "", lambda prompt, solution: None)

# what a recipe of the method has to say besides
NEEDED: dict[str, dict[str, Any]] = {
    "gspo": {"aggregation": "sequence_mean"},
    "kl_cov": {"minibatch_prompts": 32},
    "avspo": {"dynamic_sampling": False},
    "oger": {"options": {"teachers": {"path": "-"}}},
    "s2l_po": {"samplers": {"explorer": "-"}},
    "oisd": {"options": {"layer": 1, "attention_coef": 0.0}},
    # its own anchor to the reference stands in the place of the KL
    "sdpg": {"options": {"alpha": 0.0, "warmup_steps": 0, "decay_steps": 0}},
}


def recipe(method: str, options: Mapping[str, Any] | None = None, **sections: Any) -> Config:
    """`sections` over a small recipe of `method`."""
    tree: dict[str, Any] = {
        "model": {"hf_path": "m"},
        "data": {"path": "p"},
        "rl": {"method": method, "options": options or {}, "prompts_per_step": 4, "dynamic_sampling": False},
    }
    return parse_config({**tree, **{name: {**tree.get(name, {}), **keys} for name, keys in sections.items()}})


def make(config: Config, tools: Tools = NO_HINTS) -> GRPO:
    return choose_method(config).make(config, tools)


def at(entropy: float | None = None, step: int = 1, temperature: float = 1.0) -> At:
    return At(step=step, rl_step=step, stage_step=step - 1, temperature=temperature, seed=0, entropy=entropy)


def group(index: int, lengths: Sequence[int], rewards: Sequence[float], temperature: float = 1.0) -> Group:
    """One prompt of two tokens, with responses of these lengths; a reward above 0 is a correct one."""
    completions = tuple(
        Completion(np.arange(n, dtype=np.int32) + 3, np.full(n, -1.0, np.float32), temperature, 0, "stop")
        for n in lengths
    )
    graded = tuple(Reward(r, r > 0) for r in rewards)
    return Group(Prompt(index, "", (1, index), {}), completions, graded)


def collected(*groups: Group, extra: Sequence[Group] = ()) -> Collected:
    return Collected(list(groups), list(groups), [], {}, tuple(extra))


def random_scores(batch: TrainBatch, seed: int = 0) -> Scores:
    generator = np.random.default_rng(seed)
    lengths = [s.num_response_tokens for s in batch.sequences]
    return Scores(
        [-generator.exponential(0.7, n).astype(np.float32) for n in lengths],
        [generator.exponential(0.7, n).astype(np.float32) for n in lengths],
    )


class Scorer:
    """The `methods.grpo.Scoring` of a teacher whose log-probabilities are `answer`; it keeps what it was asked."""

    def __init__(self, answer: Sequence[Sequence[float]] = (), at: At = at()) -> None:  # noqa: B008
        self.at = at
        self.answer = [np.asarray(row, np.float32) for row in answer]
        self.asked: list[TrainBatch] = []

    def score(self, batch: TrainBatch) -> Scores:
        self.asked.append(batch)
        assert [len(row) for row in self.answer] == [s.num_response_tokens for s in batch.sequences]
        return Scores(self.answer, [np.zeros_like(row) for row in self.answer])


def make_any(name: str, rollout: dict[str, Any] | None = None, **rl: Any) -> GRPO:
    """
    Raises:
        ConfigError: the method refuses it.
    """
    config = parse_config(
        {
            "model": {"hf_path": "-"},
            "data": {"path": "-", "hint_template": "{prompt} {solution}"},
            "rollout": rollout or {},
            "rl": {"method": name, **NEEDED.get(name, {}), **rl},
        }
    )
    choice = choose_method(config)
    hf = SimpleNamespace(num_hidden_layers=3, max_position_embeddings=1 << 16)
    tools = Tools(hf, lambda ids: "", lambda prompt, solution: None)
    if name != "oger":
        return choice.make(config, tools)
    method = GRPO.__new__(choice.cls)  # without reading its teachers' file, of which the loss knows nothing
    GRPO.__init__(method, config, choice.options, tools)
    return method
