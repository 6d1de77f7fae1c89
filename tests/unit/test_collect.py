"""What an RL step trains on and what its entropy is judged on; the policy that samples here is a recorder."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_reheat.clock import Clock
from megatron_reheat.data.prompts import PromptCursor, PromptDataset
from megatron_reheat.recipe import parse_config
from megatron_reheat.stages.collect import FRUITLESS_BATCHES, Collector, StepAbandoned
from megatron_reheat.stages.entropy import PROBES, choose_probes, judge_entropy
from megatron_reheat.types import At, Collected, Completion, Group, Prompt, Reward, Scores, TrainBatch, TrainSequence

PROMPTS = PromptDataset(tuple(Prompt(i, "", (1,), {}) for i in range(64)))
MIXED, RIGHT, WRONG = (True, False), (True, True), (False, False)


def group(prompt: Prompt, verdicts) -> Group:
    completion = Completion(np.array([1], np.int32), np.zeros(1, np.float32), 1.0, 0, "stop")
    return Group(prompt, (completion,) * len(verdicts), tuple(Reward(float(v), v) for v in verdicts))


class Sampler:
    """Gives the groups of each generation batch the verdicts of `script`, then those of its last entry again and again."""

    def __init__(self, *script) -> None:
        self.script = script
        self.asked: list[list[int]] = []

    def sample(self, prompts, n, params, seed, clock):
        verdicts = self.script[min(len(self.asked), len(self.script) - 1)]
        self.asked.append([p.index for p in prompts])
        verdicts = verdicts(len(prompts)) if callable(verdicts) else verdicts
        return [group(p, v) for p, v in zip(prompts, verdicts, strict=True)]


def make_collector(sampler: Sampler, should_stop=lambda: False, **rl) -> Collector:
    tree = {
        "model": {"hf_path": "m"},
        "data": {"path": "p"},
        "rl": {"prompts_per_step": 3, "group_size": 2, "dynamic_sampling": True, **rl},
    }
    cursor = PromptCursor(PROMPTS, seed=0, shuffle=False)
    return Collector(parse_config(tree), sampler, cursor, (), should_stop)


AT = At(step=1, rl_step=1, stage_step=0, temperature=1.0, seed=0)


def collect(collector: Collector) -> Collected:
    return collector.collect(AT, Clock(), group_size=2)


def test_batches_are_drawn_until_enough_groups_are_mixed_and_the_first_is_kept_whole():
    sampler = Sampler((MIXED, RIGHT, WRONG), (RIGHT, MIXED, RIGHT), (MIXED, MIXED, MIXED))
    collected = collect(make_collector(sampler))
    assert sampler.asked == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert [g.prompt.index for g in collected.groups] == [0, 4, 6]  # 7 and 8 are surplus
    assert [g.prompt.index for g in collected.first] == [0, 1, 2]
    assert [g.prompt.index for g in collected.discarded] == [1, 2]
    assert collected.metrics["sampling/generation_batches"] == 3
    assert collected.metrics["sampling/kept_fraction"] == pytest.approx(5 / 9)
    assert collected.metrics["reward/accuracy"] == pytest.approx((3 + 5 + 3) / 18)  # before the filter


def mixed(fraction: float):
    """Verdicts of a batch of any size, of whose groups so many are mixed, evenly spread."""
    return lambda n: [MIXED if int((i + 1) * fraction) > int(i * fraction) else RIGHT for i in range(n)]


def test_a_step_draws_at_once_what_the_steps_before_it_needed():
    sampler = Sampler(mixed(0.25))
    collector = make_collector(sampler, prompts_per_step=8, max_generation_batches=0)
    first = collect(collector)
    assert [len(asked) for asked in sampler.asked] == [8, 8, 8, 8]  # nothing is known yet
    assert collector.kept_fraction == 0.25 and first.metrics["sampling/surplus_groups"] == 0
    sampler.asked.clear()
    second = collect(collector)
    # four times eight is the most at a time: it brings 8, if as many are kept
    assert [len(asked) for asked in sampler.asked] == [32] and len(second.groups) == 8
    assert second.metrics["sampling/prompts"] == 32 and len(second.first) == 32 and len(second.discarded) == 24


def test_a_batch_has_a_margin_and_what_it_brings_too_many_is_left_out_and_counted():
    sampler = Sampler(mixed(0.5))
    collector = make_collector(sampler, prompts_per_step=8, max_generation_batches=0)
    collect(collector)
    sampler.asked.clear()
    collected = collect(collector)
    assert [len(asked) for asked in sampler.asked] == [20]  # (8 + sqrt(8 x 0.5)) / 0.5
    assert len(collected.groups) == 8 and collected.metrics["sampling/surplus_groups"] == 2
    assert [g.prompt.index for g in collected.groups] == sampler.asked[0][1:16:2]  # the last drawn are left out
    sampler.script, collector.kept_fraction = (mixed(0.25), mixed(1.0)), 0.5
    sampler.asked.clear()
    collect(collector)
    assert [len(asked) for asked in sampler.asked] == [20, 9]  # 5 came: 3 are missing, with a margin for these


@pytest.mark.parametrize("settings", [{"oversample": False}, {"dynamic_sampling": False}])
def test_batches_of_one_size_where_that_is_asked_for(settings):
    sampler = Sampler(mixed(0.5))
    collector = make_collector(sampler, prompts_per_step=8, max_generation_batches=0, **settings)
    collect(collector), collect(collector)
    assert {len(asked) for asked in sampler.asked} == {8}


def test_a_step_that_kept_nothing_asks_for_no_more_than_the_most():
    sampler = Sampler(mixed(0.0))
    collector = make_collector(sampler, prompts_per_step=3, max_generation_batches=2)
    collect(collector), collect(collector)
    assert [len(asked) for asked in sampler.asked] == [3, 3, 12, 12] and collector.kept_fraction == 0.0


def test_without_dynamic_sampling_every_group_is_trained_on():
    collected = collect(make_collector(Sampler((MIXED, RIGHT, WRONG)), dynamic_sampling=False))
    assert collected.groups == collected.first and not collected.discarded


def test_the_cap_on_batches_may_leave_nothing_to_train_on_but_something_to_look_at():
    sampler = Sampler((WRONG, WRONG, RIGHT))
    collected = collect(make_collector(sampler, max_generation_batches=2))
    assert len(sampler.asked) == 2 and not collected.groups
    assert collected.discarded == collected.first == collected.shown


def test_unlimited_batches_end_when_none_of_many_in_a_row_brings_a_group():
    sampler = Sampler((WRONG, WRONG, WRONG), (MIXED, WRONG, WRONG), (WRONG, WRONG, WRONG))
    collected = collect(make_collector(sampler, max_generation_batches=0))
    assert len(sampler.asked) == 2 + FRUITLESS_BATCHES
    assert [g.prompt.index for g in collected.groups] == [3]
    collected = collect(make_collector(Sampler((WRONG, WRONG, WRONG)), max_generation_batches=0))
    assert not collected.groups and collected.metrics["sampling/generation_batches"] == FRUITLESS_BATCHES


@pytest.mark.parametrize("limit", [0, 5])
def test_a_stop_request_between_batches_gives_the_prompts_back(limit):
    sampler = Sampler((WRONG, WRONG, WRONG))
    collector = make_collector(sampler, lambda: len(sampler.asked) == 2, max_generation_batches=limit)
    before = collector.cursor_state()
    with pytest.raises(StepAbandoned):
        collect(collector)
    assert len(sampler.asked) == 2 and collector.cursor_state() == before


def test_one_batch_that_suffices_is_not_interrupted():
    assert len(collect(make_collector(Sampler((MIXED, MIXED, MIXED)), lambda: True)).groups) == 3


class Turns:
    """Notes who samples and who rests, as what, in one list."""

    def __init__(self, name: str, calls: list) -> None:
        self.name, self.calls = name, calls

    def sample(self, prompts, n, params, seed, clock):
        self.calls.append((self.name, n, params.temperature, params.top_p))
        return [group(p, (True,) * n) for p in prompts]

    def rest(self):
        self.calls.append((self.name, "rests"))


def test_the_policy_rests_while_a_frozen_model_is_awake_which_rests_after_it():
    calls: list = []
    collector = make_collector(Turns("policy", calls), prompts_per_step=2, max_generation_batches=2)
    collector._frozen = {"explorer": Turns("explorer", calls)}

    def complete(groups):
        more = collector.again([g.prompt for g in groups], 3, 0.7, Clock(), sampler="explorer", top_p=0.9)
        assert {c.sampler for g in more for c in g.completions} == {"explorer"}
        return more

    collector.collect(AT, Clock(), group_size=2, complete=complete)  # nothing is mixed: two generation batches
    collector.rest()
    turn = [("policy", 2, 1.0, 1.0), ("policy", "rests"), ("explorer", 3, 0.7, 0.9), ("explorer", "rests")]
    assert calls == [*turn, *turn, ("policy", "rests")]
    with pytest.raises(KeyError):
        collector.again([], 1, 1.0, Clock(), sampler="nobody")


# -- the entropy of the first generation batch ---------------------------------------------------------------------------


def sampled_batch(generator, num_groups: int, likely: float) -> tuple[Collected, list, list]:
    """Responses of up to 6 tokens with two choices a place, right where all choices are the likely one. Also the entropies of
    the kept responses, and of all."""
    groups, entropies = [], {}
    for i in range(num_groups):
        completions, rewards = [], []
        for _ in range(4):
            length = int(generator.integers(2, 7))
            p = generator.uniform(likely, 1.0, length)
            chosen = generator.random(length) < p
            logprobs = np.log(np.where(chosen, p, 1 - p)).astype(np.float32)
            completions.append(Completion(np.zeros(length, np.int32), logprobs, 1.0, 0, "stop"))
            entropies[id(completions[-1])] = -(p * np.log(p) + (1 - p) * np.log(1 - p)).astype(np.float32)
            rewards.append(Reward(float(chosen.all()), bool(chosen.all())))
        groups.append(Group(Prompt(i, "", (1,), {}), tuple(completions), tuple(rewards)))
    kept = [g for g in groups if 0 < g.accuracy < 1]
    collected = Collected(kept, groups, [g for g in groups if g not in kept], {})
    of = [[entropies[id(c)] for g in some for c in g.completions] for some in (kept, groups)]
    return collected, *of


def token_mean(rows) -> float:
    return float(np.concatenate(rows).mean())


def trained_on(collected: Collected) -> TrainBatch:
    return TrainBatch(tuple(TrainSequence.of(g.prompt, c) for g in collected.groups for c in g.completions))


def probes_of(collected: Collected) -> TrainBatch:
    return choose_probes(collected, trained_on(collected))


def judge(collected, kept, judged_tokens=100, probed=()):
    probes = TrainBatch(probes_of(collected).sequences[: len(probed)])
    batch, limit = trained_on(collected), {"judged_tokens": judged_tokens}
    return judge_entropy(collected, batch, Scores([], kept), probes, Scores([], list(probed)), **limit)


def probed_of(collected, every):
    """Entropies of the probes, from those of every response."""
    order = {id(c): e for c, e in zip((c for g in collected.first for c in g.completions), every, strict=True)}
    return [order[id(s.completion)] for s in probes_of(collected).sequences]


def test_what_is_scored_anyway_counts_exactly():
    collected, _, every = sampled_batch(np.random.default_rng(0), 8, likely=0.5)
    collected = Collected(collected.first, collected.first, [], {})
    assert judge(collected, every) == (pytest.approx(token_mean(every), rel=1e-6), False)


def test_few_discarded_responses_are_scored_with_the_rest():
    collected, kept, every = sampled_batch(np.random.default_rng(1), 8, likely=0.9)
    assert 0 < len(probes_of(collected)) == 4 * len(collected.discarded) <= PROBES
    judged = judge(collected, kept, probed=probed_of(collected, every))
    assert judged == (pytest.approx(token_mean(every), rel=1e-6), False)


def test_groups_of_later_batches_do_not_count():
    collected, kept, every = sampled_batch(np.random.default_rng(1), 8, likely=0.9)
    later, of_later, _ = sampled_batch(np.random.default_rng(2), 8, likely=0.2)
    collected = Collected([*collected.groups, *later.groups], collected.first, collected.discarded, {})
    judged = judge(collected, [*kept, *of_later], probed=probed_of(collected, every))
    assert judged == (pytest.approx(token_mean(every), rel=1e-6), False)


def test_the_estimate_is_unbiased_although_the_filter_looks_at_the_samples():
    """What is to be had for nothing is not: exact entropies of the kept groups, alone or together with the sampler's
    log-probabilities of the others."""
    generator = np.random.default_rng(3)
    errors: dict[str, list[float]] = {"judged": [], "kept": [], "mixed": [], "logprobs": []}
    for _ in range(400):
        collected, kept, every = sampled_batch(generator, 60, likely=0.97)
        exact, judged = token_mean(every), judge(collected, kept, probed=probed_of(collected, every))
        assert judged.estimated and len(probes_of(collected)) < PROBES
        own = {name: [-c.rollout_logprobs for g in groups for c in g.completions]
               for name, groups in (("discarded", collected.discarded), ("first", collected.first))}  # fmt: skip
        errors["judged"].append(judged.mean - exact)
        errors["kept"].append(token_mean(kept) - exact)
        errors["mixed"].append(token_mean([*kept, *own["discarded"]]) - exact)
        errors["logprobs"].append(token_mean(own["first"]) - exact)
    spread = {name: np.std(values) for name, values in errors.items()}
    standard_error = spread["judged"] / 400**0.5
    assert abs(np.mean(errors["judged"])) < 3 * standard_error
    assert np.mean(errors["kept"]) > 5 * standard_error
    assert np.mean(errors["mixed"]) < -20 * standard_error
    assert spread["judged"] < 0.3 * spread["logprobs"]


def test_probes_are_chosen_by_their_place_alone():
    collected, _, _ = sampled_batch(np.random.default_rng(4), 60, likely=0.97)
    nothing_kept = Collected([], collected.first, collected.first, {})
    order = [id(c.rollout_logprobs) for g in collected.first for c in g.completions]
    places = [order.index(id(s.rollout_logprobs)) for s in probes_of(nothing_kept).sequences]
    assert len(places) == PROBES and places[0] == 0 and places[-1] == len(order) - 1 and np.ptp(np.diff(places)) <= 1
    # those that are trained on need not be scored twice
    trained = {id(c.rollout_logprobs) for g in collected.groups for c in g.completions}
    rest = [order.index(id(s.rollout_logprobs)) for s in probes_of(collected).sequences]
    assert rest == [i for i in places if order[i] not in trained]


def test_only_as_much_of_a_response_is_judged_as_every_stage_samples():
    collected, kept, every = sampled_batch(np.random.default_rng(5), 8, likely=0.9)
    judged = judge(collected, kept, judged_tokens=2, probed=probed_of(collected, every))
    assert judged.mean == pytest.approx(token_mean([e[:2] for e in every]), rel=1e-6)

    tree = {"model": {"hf_path": "m"}, "data": {"path": "p"}, "rollout": {"max_tokens": 8}}
    assert parse_config(tree).judged_tokens == 8
    assert parse_config({**tree, "reheat": {"max_tokens": 3}}).judged_tokens == 3
    without = {**tree, "reheat": {"max_tokens": 3}, "controller": {"action": "stop"}}
    assert parse_config(without).judged_tokens == 8
