"""`reheat eval`: samples a Hugging Face model with vLLM on named suites and reports avg@n and pass@k.

One engine process per replica, given the folder's weights the way training gives them; problems are dealt out over the
replicas. The same model, suites, settings and number of replicas give the same samples.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from megatron_reheat.config import ModelConfig, RewardConfig, RolloutConfig
from megatron_reheat.config_fields import MAX_SAMPLES, MAX_TEMPERATURE, MIN_TEMPERATURE
from megatron_reheat.data.prompts import check_vocabulary
from megatron_reheat.data.responses import response_text
from megatron_reheat.data.tokenizer import read_tokenizer, stop_token_ids
from megatron_reheat.errors import ConfigError, EngineDied
from megatron_reheat.evaluation.results import EvalOptions, SuiteResult, estimates, write_results, write_samples
from megatron_reheat.evaluation.suites import SuitePrompts, load_suites
from megatron_reheat.model.hf_reader import HFReader
from megatron_reheat.model.hf_weights import read_model_folder, tensor_shapes
from megatron_reheat.model.provider import resolve_hf_folder
from megatron_reheat.recipe import apply_override, parse_config
from megatron_reheat.rewards.pool import VerifierPool
from megatron_reheat.rewards.self_check import check_references
from megatron_reheat.rollout.embedded import EmbeddedEngine
from megatron_reheat.rollout.vllm_version import require_vllm
from megatron_reheat.rollout.weight_sync import WeightSync
from megatron_reheat.stop_request import stop_requested
from megatron_reheat.types import Completion, Prompt, SamplingParams

T = TypeVar("T")

MAX_GRADERS = 8
# a whole suite is one request to the engine: this is a bound on a hang, a dead engine is noticed at once
ENGINE_DEFAULTS = {"timeout_s": 24 * 3600.0, "gpu_memory_utilization": 0.9}
# settings of the rollout section that an evaluation has other options for, or nothing to do with
NOT_ENGINE = ("mode", "servers", "num_servers", "tensor", "overlap", "temperature", "max_tokens", "mismatch_limit")


@dataclass(frozen=True)
class _Model:
    """A Hugging Face folder, checked, and what of it the samplers need."""

    folder: Path
    hf: Any
    tokenizer: Any
    stop_token_ids: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.hf.dtype == torch.bfloat16 else "float32"


def evaluate(options: EvalOptions, results: list[SuiteResult]) -> None:
    """Evaluates every suite, writes `results.json` and `samples-<suite>.jsonl`, and says where.

    `results` grows by a suite at a time. The notice to stop (`stop_request`) is heeded between two suites.

    Raises:
        ConfigError: before any engine starts, naming the option, suite or file to change.
        ReheatError: an engine keeps dying, or the graders cannot be started.
    """
    _check(options)
    rollout = _engine_config(options)
    model = _read_model(options.folder or options.model, chat=options.template == "chat")
    suites = load_suites(
        options.suites,
        model.tokenizer,
        template=options.template,
        chat_template_kwargs=options.chat_template_kwargs,
        limit=options.limit,
        data_root=options.data_root,
    )
    for note in dict.fromkeys(note for suite in suites for note in suite.notes):
        print(f"note: {note}", flush=True)
    rollout = rollout.model_copy(update={"max_model_len": _context_length(options, rollout, model, suites)})
    out = options.out or Path("runs") / "eval" / Path(options.model).name / time.strftime("%Y%m%d-%H%M%S")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: cannot make {out} ({error.strerror}); name another folder") from None
    with ExitStack() as stack:
        replicas = stack.enter_context(_Replicas(model, rollout, options.replicas, out / "logs"))
        workers = min(MAX_GRADERS, len(os.sched_getaffinity(0)))
        pools = {
            kind: stack.enter_context(VerifierPool(RewardConfig(kind=kind, workers=workers)))
            for kind in {suite.reward_kind for suite in suites}
        }
        for suite in suites:  # while the engines start
            check = check_references(pools[suite.reward_kind], suite.prompts.verifiers())
            if check.failed:
                print(f"{suite.name}: {check}", flush=True)
        for suite in suites:
            replicas.load()  # not a part of the sampling that is timed
            if stop_requested():
                break
            result = _evaluate_suite(suite, options, model, replicas, pools[suite.reward_kind], out)
            print(
                f"{suite.name}: {result.problems} problems x {options.n} samples in {result.seconds:.1f} s", flush=True
            )
            results.append(result)
            write_results(out, options, results)
    if results:
        print(f"results: {out / 'results.json'}; every answer: {out / 'samples-<suite>.jsonl'}", flush=True)


# -- what is checked before an engine starts -------------------------------------------------------------------------


def _check(options: EvalOptions) -> None:
    require_vllm()
    for name, value in {
        "n": options.n,
        "max-tokens": options.max_tokens,
        "replicas": options.replicas,
        "limit": options.limit,
    }.items():
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value} must be at least 1")
    if options.n > MAX_SAMPLES:
        raise ConfigError(f"--n {options.n} is above vLLM's limit of {MAX_SAMPLES}")
    if options.seed < 0:
        raise ConfigError(f"--seed {options.seed} must not be negative")
    if not 0 <= options.temperature <= MAX_TEMPERATURE:
        raise ConfigError(f"--temperature {options.temperature:g} is outside 0 to {MAX_TEMPERATURE:g}")
    if 0 < options.temperature < MIN_TEMPERATURE:
        raise ConfigError(
            f"--temperature {options.temperature:g} is below {MIN_TEMPERATURE:g}, at which vLLM would sample instead; raise "
            "it, or use 0 for greedy"
        )
    if options.temperature == 0 and options.n > 1:
        raise ConfigError(f"--temperature 0 is greedy: {options.n} samples would be the same one; use --n 1")
    if not 0 < options.top_p <= 1:
        raise ConfigError(f"--top-p {options.top_p:g} must be above 0 and at most 1")
    if torch.cuda.is_available() and options.replicas > torch.cuda.device_count():
        raise ConfigError(f"--replicas {options.replicas}: there are {torch.cuda.device_count()} GPUs; lower it")


def _engine_config(options: EvalOptions) -> RolloutConfig:
    """`--engine` over the rollout section's defaults, with its own checks and suggestions."""
    # compiling takes vLLM minutes on a CPU, more than it saves
    eager = {} if torch.cuda.is_available() else {"enforce_eager": True}
    tree: dict[str, Any] = {
        "model": {"hf_path": options.model},
        "data": {"source": "datasets", "name": "unused"},
        "parallel": {"microbatch_tokens": 2**31},
        "rollout": {**ENGINE_DEFAULTS, **eager},
    }
    origins: dict[str, str] = {}
    try:
        for setting in options.engine:
            keys = apply_override(tree, f"rollout.{setting}")
            origins |= dict.fromkeys(keys, "on the command line")
            if (name := keys[0].removeprefix("rollout.")) in NOT_ENGINE:
                raise ConfigError(
                    f"{name} has no part in an evaluation; leave it out, or use the command's own options"
                )
        return parse_config(tree, origins).rollout
    except ConfigError as error:
        raise ConfigError(f"--engine: {error}") from None


def _read_model(name: str, *, chat: bool = False) -> _Model:
    try:
        folder = resolve_hf_folder(ModelConfig(hf_path=name))
        hf = read_model_folder(folder)
        tokenizer = read_tokenizer(folder)
        check_vocabulary(tokenizer, hf.vocab_size)
        return _Model(folder, hf, tokenizer, stop_token_ids(hf, tokenizer, folder, chat=chat))
    except ConfigError as error:
        raise ConfigError(str(error).replace("model.hf_path: ", "MODEL: ")) from None


def _context_length(options: EvalOptions, rollout: RolloutConfig, model: _Model, suites: Sequence[SuitePrompts]) -> int:
    longest, suite = max((suite.prompts.longest, suite.name) for suite in suites)
    needed = longest + options.max_tokens
    limit = min(rollout.max_model_len or needed, model.hf.max_position_embeddings)
    if needed > limit:
        raise ConfigError(
            f"suite {suite}: a prompt of {longest} tokens + --max-tokens {options.max_tokens} exceeds the context of "
            f"{limit} tokens; lower --max-tokens"
        )
    return needed


# -- sampling and grading --------------------------------------------------------------------------------------------


class _Replicas:
    """The engines, each with the model's weights; one that dies is replaced up to `rollout.max_restarts` times."""

    def __init__(self, model: _Model, config: RolloutConfig, count: int, logs: Path) -> None:
        self._model = model
        self._engines = [
            EmbeddedEngine(
                str(model.folder),
                config,
                dtype=model.dtype,
                log_file=logs / f"vllm-{i}.log",
                local_engines=count,
                gpus=(i,) if torch.cuda.is_available() else (),
            )
            for i in range(count)
        ]
        self._syncs = [WeightSync(engine, config) for engine in self._engines]

    def __enter__(self) -> _Replicas:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def load(self) -> None:
        """Gives the weights to the engines that lack them."""
        self._ask(self._load)

    def sample(self, prompts: Sequence[Prompt], params: SamplingParams, n: int, seed: int) -> list[list[Completion]]:
        """`n` completions per prompt, in the order of the prompts; replica r samples prompts r, r + R, r + 2R, ..."""
        count = len(self._engines)

        def generate(i: int) -> list[list[Completion]]:
            self._load(i)
            return self._engines[i].generate([p.token_ids for p in prompts[i::count]], params, n, seed + i)

        shares = self._ask(generate)
        return [shares[p % count][p // count] for p in range(len(prompts))]

    def _ask(self, action: Callable[[int], T]) -> list[T]:
        """Runs `action` for all replicas at a time; those whose engine dies get a new one and are asked again."""
        answers: dict[int, T] = {}

        def attempt(i: int) -> EngineDied | None:
            try:
                answers[i] = action(i)
            except EngineDied as died:
                return died
            return None

        while missing := [i for i in range(len(self._engines)) if i not in answers]:
            with ThreadPoolExecutor(len(missing)) as threads:
                try:
                    died = list(threads.map(attempt, missing))
                except BaseException:
                    self._close()  # the other threads wait for engines that may be busy for hours
                    raise
            for i, failure in zip(missing, died, strict=True):
                if failure is not None:
                    self._engines[i].restart()  # here, because an engine ends with the thread that started it
        return [answers[i] for i in range(len(self._engines))]

    def _close(self) -> None:
        for engine in self._engines:
            engine.close()

    def _load(self, i: int) -> None:
        if self._engines[i].policy_version is None:
            # a reader of its own: the files are mapped, and threads need not share the handles
            reader = HFReader(self._model.folder)
            self._syncs[i].push(((name, reader.get(name)) for name in tensor_shapes(self._model.hf)), version=0)


def _evaluate_suite(
    suite: SuitePrompts, options: EvalOptions, model: _Model, replicas: _Replicas, pool: VerifierPool, out: Path
) -> SuiteResult:
    params = SamplingParams(options.temperature, options.max_tokens, options.top_p, model.stop_token_ids)
    prompts = list(suite.prompts)
    started = time.perf_counter()
    completions = replicas.sample(prompts, params, options.n, options.seed)
    sampled = time.perf_counter()
    texts = [[_decode(model, c) for c in cs] for cs in completions]
    flat = iter(pool.grade([(text, p.verifier) for p, ts in zip(prompts, texts, strict=True) for text in ts]))
    rewards = [[next(flat) for _ in ts] for ts in texts]
    graded = time.perf_counter()
    write_samples(out / f"samples-{suite.file_name}.jsonl", prompts, completions, texts, rewards)
    lengths = np.array([[len(c.token_ids) for c in cs] for cs in completions])
    correct = np.array([[r.correct for r in rs] for rs in rewards])
    pass_at = estimates(correct)
    return SuiteResult(
        suite=suite.name,
        source=suite.source,
        problems=len(prompts),
        samples=options.n,
        avg=pass_at[1],
        pass_at=pass_at,
        mean_tokens=float(lengths.mean()),
        truncated_fraction=float(np.mean([c.finish_reason == "length" for cs in completions for c in cs])),
        timeouts=sum(r.timed_out for rs in rewards for r in rs),
        seconds=sampled - started,
        grade_s=graded - sampled,
        tokens_per_s=float(lengths.sum() / (sampled - started)),
    )


def _decode(model: _Model, completion: Completion) -> str:
    return response_text(model.tokenizer, completion.token_ids.tolist(), model.stop_token_ids)
