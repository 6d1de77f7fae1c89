"""What makes no sense together in a recipe, each a sentence that names the key to change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_reheat.config_data import data_place, eval_place

if TYPE_CHECKING:
    from megatron_reheat.config import Config


def cross_field_problems(c: Config) -> Iterator[str]:
    """Of sections that are each valid alone."""
    minibatch = c.rl.minibatch_prompts
    if minibatch and c.rl.prompts_per_step % minibatch:
        yield (
            f"rl.prompts_per_step {c.rl.prompts_per_step} is not a multiple of rl.minibatch_prompts {minibatch}; "
            "change one of them"
        )
    context = c.rollout.max_model_len
    yield from _tempering_problems(c)
    if c.controller.trains and c.reheat_tokens > c.rollout.max_tokens:
        yield (
            f"reheat.max_tokens {c.reheat_tokens} exceeds rollout.max_tokens {c.rollout.max_tokens}: the entropies that "
            "start and end a reheating stage would be of different lengths; lower reheat.max_tokens, or leave it empty"
        )
    if c.controller.trains and c.reheat.teacher == "frozen" and not c.model.fused_head:
        yield (
            "reheat.teacher frozen is compared with the policy chunk by chunk inside the fused head, and "
            "model.fused_head=false makes all logits at once; set model.fused_head=true, or reheat.teacher=current"
        )
    longest = c.rollout.max_tokens
    if context and c.data.max_prompt_tokens + longest > context:
        yield (
            f"data.max_prompt_tokens {c.data.max_prompt_tokens} + the longest response {longest} exceeds "
            f"rollout.max_model_len {context}; raise rollout.max_model_len or lower one of the others"
        )
    sequence = c.data.max_prompt_tokens + longest
    if sequence > c.parallel.microbatch_tokens:
        yield (
            f"data.max_prompt_tokens {c.data.max_prompt_tokens} + the longest response {longest} exceeds "
            f"parallel.microbatch_tokens {c.parallel.microbatch_tokens}; one sequence must fit one micro-batch: raise "
            f"parallel.microbatch_tokens to {sequence}"
        )
    for name, held_out in c.eval.sets.items():
        eval_sequence, place = held_out.max_prompt_tokens + c.eval.max_tokens, eval_place(name)
        if eval_sequence > c.parallel.microbatch_tokens:
            yield (
                f"{place}.max_prompt_tokens + eval.max_tokens = {eval_sequence} exceeds parallel.microbatch_tokens "
                f"{c.parallel.microbatch_tokens}; one sequence must fit one micro-batch: raise parallel.microbatch_tokens "
                "or lower eval.max_tokens"
            )
    if c.eval.temperature == 0:
        asked = {f"eval.suites.{name}.num_samples": suite.num_samples for name, suite in c.eval.suites.items()}
        for key, k in {"eval.num_samples": c.eval.num_samples, **asked}.items():
            if k is not None and k > 1:
                yield f"eval.temperature 0 is greedy: {key} {k} would be the same sample; set {key}=1"
    if c.reward.correct <= c.reward.incorrect:
        yield (
            f"reward.correct {c.reward.correct:g} must be above reward.incorrect {c.reward.incorrect:g}, or right answers "
            "teach nothing or the opposite; raise reward.correct"
        )
    if c.checkpoint.keep_best:
        name = c.checkpoint.keep_best.removeprefix("eval/").rpartition("/")[0]
        if not name and c.eval.data is None:
            another = f", or name a suite (eval/{next(iter(c.eval.suites))}/avg_at_k)" if c.eval.suites else ""
            yield f"checkpoint.keep_best needs eval.data, the held-out prompts to evaluate on{another}"
        elif name and name not in c.eval.suites:
            yield f"checkpoint.keep_best: there is no {name!r} in eval.suites; add it or correct the name"
    if c.rl.overlong_buffer > c.rollout.max_tokens:
        yield f"rl.overlong_buffer {c.rl.overlong_buffer} exceeds rollout.max_tokens {c.rollout.max_tokens}; lower it"
    if c.sft.steps:
        for name, part in c.data.parts.items():
            if part.solution_template is None:
                place = data_place(name)
                yield f"sft.steps needs {place}.solution_template, the worked answer to imitate (e.g. '{{answer}}')"
    if c.rollout.tensor > 1 and c.rollout.mode == "embedded":
        yield "rollout.tensor needs rollout.mode colocated or server; an embedded engine has one device"
    if c.rl.max_staleness and not c.rl.dynamic_sampling:
        yield "rl.max_staleness needs rl.dynamic_sampling: a step has no surplus groups without; set it to true, or this to 0"
    if c.rollout.overlap and c.rollout.mode != "server":
        yield "rollout.overlap needs rollout.mode=server: the other engines share their devices with the trainer"
    urls = [*c.rollout.servers, *(url for of_one in c.rl.sampler_servers.values() for url in of_one)]
    if len(set(urls)) < len(urls):
        where = "rollout.servers and rl.sampler_servers name" if c.rl.sampler_servers else "rollout.servers names"
        yield f"{where} a server twice, and a server holds one model; name each once"
    if unknown := c.rl.sampler_servers.keys() - c.rl.samplers.keys():
        yield f"rl.sampler_servers.{min(unknown)}: there is no model of that name in rl.samplers; add it or correct the name"
    if c.rl.sampler_servers and c.rollout.mode != "server":
        yield "rl.sampler_servers needs rollout.mode=server"
    if c.rollout.servers and c.rollout.mode != "server":
        yield "rollout.servers needs rollout.mode=server"
    if c.parallel.context > 1 and sequence < 2 * c.parallel.context:
        yield (
            f"parallel.context {c.parallel.context} cuts every sequence into {2 * c.parallel.context} chunks, and the longest, "
            f"data.max_prompt_tokens + the longest response, has {sequence} tokens; lower parallel.context"
        )
    if c.parallel.sequence_parallel and c.parallel.tensor == 1:
        yield "parallel.sequence_parallel needs parallel.tensor > 1; set it to false or raise parallel.tensor"
    if c.parallel.virtual_pipeline > 1 and c.parallel.pipeline == 1:
        yield "parallel.virtual_pipeline needs parallel.pipeline > 1; set it to 1 or raise parallel.pipeline"


def _tempering_problems(c: Config) -> Iterator[str]:
    """A teacher that sharpens is only ever meant where it was asked for by name."""
    temperature, cools = c.reheat.teacher_temperature, c.controller.action == "cool"
    if temperature < 1 and not cools:
        yield (
            f"reheat.teacher_temperature {temperature:g} is below 1 and would sharpen the policy further; raise it above 1, or "
            "set controller.action=cool"
        )
    if cools and temperature > 1:
        yield (
            f"controller.action=cool needs reheat.teacher_temperature below 1, and it is {temperature:g}; set it, for example "
            "to 0.8"
        )
