"""YAML -> validated, frozen configuration.

A recipe names a `base:` and holds only what differs; `key=value` arguments come last. Unknown keys are refused with a
suggestion, and every cross-field check names the key to change. All of it runs before a model is loaded.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from megatron_reheat.errors import ConfigError


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is not the URL of a server (e.g. http://gpu-7:8300)")
    return url


class ModelConfig(Section):
    """The policy: a Hugging Face folder (or hub name) of the Qwen3 or Llama family."""

    hf_path: str
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    attention: Literal["auto", "sdpa", "transformer_engine"] = "auto"
    recompute: Literal["none", "selective", "full"] = "none"
    vocab_pad_multiple: int = Field(default=1, gt=0, description="pad the vocabulary to a multiple of this x TP")
    fused_head: bool = Field(default=True, description="apply the LM head inside the loss, chunk by chunk")
    head_chunk_tokens: int = Field(default=1024, gt=0, description="tokens whose logits exist at a time")


class ParallelConfig(Section):
    """Megatron's layout. `data` may stay empty under torchrun: it is then WORLD_SIZE / (tensor x pipeline)."""

    tensor: int = Field(default=1, gt=0)
    pipeline: int = Field(default=1, gt=0)
    data: int | None = Field(default=None, gt=0)
    sequence_parallel: bool = False
    distributed_optimizer: bool = True
    microbatch_tokens: int = Field(default=16384, gt=0, description="packed tokens of one micro-batch, at most")


class DataConfig(Section):
    """Where prompts come from and how they become text.

    `template: raw` fills `raw_template` with the record's fields; `chat` goes through the tokenizer's chat template.
    """

    source: Literal["reasoning_gym", "jsonl", "datasets"] = "jsonl"
    name: str | None = Field(default=None, description="reasoning-gym task, or dataset name for `datasets`")
    path: str | None = Field(default=None, description="JSONL file, or local folder for `datasets`")
    split: str = "train"
    options: dict[str, Any] = Field(default_factory=dict, description="passed to the reasoning-gym task")
    size: int | None = Field(default=None, gt=0, description="keep this many records")
    seed: int = 0
    shuffle: bool = True
    template: Literal["raw", "chat"] = "raw"
    raw_template: str = "{question}"
    solution_template: str | None = Field(default=None, description="worked answer for the sft warm start")
    system_prompt: str | None = None
    prompt_key: str = "question"
    answer_key: str = "answer"
    max_prompt_tokens: int = Field(default=2048, gt=0)
    on_long_prompt: Literal["error", "skip"] = "error"

    @model_validator(mode="after")
    def _source_is_complete(self) -> DataConfig:
        if self.source == "reasoning_gym" and not self.name:
            raise ValueError("source reasoning_gym needs `name`, the task (e.g. countdown)")
        if self.source == "jsonl" and not self.path:
            raise ValueError("source jsonl needs `path`, the .jsonl file")
        if self.source == "datasets" and not (self.name or self.path):
            raise ValueError("source datasets needs `name` (hub) or `path` (local folder)")
        return self


class RewardConfig(Section):
    """Verification in worker processes that are killed on timeout."""

    kind: Literal["reasoning_gym", "math"] = "math"
    workers: int = Field(default=2, gt=0, description="per data-parallel replica")
    timeout_s: float = Field(default=10.0, gt=0)
    correct: float = 1.0
    incorrect: float = 0.0
    answer_chars: int = Field(default=300, gt=0, description="math: only this many last characters are parsed")


class RolloutConfig(Section):
    """vLLM: a process beside each data-parallel replica (`embedded`), on all of the trainer's GPUs in turn with it
    (`colocated`), or servers that all replicas share (`server`)."""

    mode: Literal["embedded", "colocated", "server"] = "embedded"
    servers: tuple[Annotated[str, AfterValidator(_checked_url)], ...] = Field(
        default=(), description="server: URLs of running servers (reheat serve); empty starts num_servers here"
    )
    num_servers: int = Field(default=1, gt=0, description="server: how many to start on this machine")
    tensor: int = Field(default=1, gt=0, description="colocated, server: tensor parallel size of one vLLM engine")
    overlap: bool = Field(
        default=False,
        description="server: sample the next RL step's prompts while this one trains (one step off-policy)",
    )
    temperature: float = Field(default=1.0, gt=0)
    max_tokens: int = Field(default=4096, gt=0)
    max_model_len: int | None = Field(default=None, gt=0)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    max_num_seqs: int = Field(default=256, gt=0)
    enforce_eager: bool = False
    kv_cache_mb: int | None = Field(default=None, gt=0, description="fixed KV cache; empty lets vLLM take its share")
    gpu_memory_utilization: float = Field(default=0.45, gt=0, le=1)
    threads: int | None = Field(default=None, gt=0, description="OpenMP threads of a CPU engine")
    timeout_s: float = Field(default=1800.0, gt=0, description="longest wait for one answer of the engine")
    start_timeout_s: float = Field(default=900.0, gt=0)
    max_restarts: int = Field(default=2, ge=0)
    sync_bucket_mb: int = Field(default=512, gt=0)
    verify_every: int = Field(
        default=50, ge=0, description="digest check on the first and every N-th sync; 0: first only"
    )
    mismatch_limit: float = Field(default=0.1, gt=0, description="stop when mismatch_kl exceeds this")


class SFTConfig(Section):
    """Warm start on solved examples, so that a base policy can be made offline. `steps: 0` leaves it out."""

    steps: int = Field(default=0, ge=0)
    batch_size: int = Field(default=64, gt=0)
    lr: float = Field(default=2e-3, gt=0)
    warmup_steps: int = Field(default=50, ge=0)
    log_every: int = Field(default=50, gt=0)


class RLConfig(Section):
    """GRPO/DAPO. Defaults are the paper's DAPO settings (arXiv 2606.00755, training details)."""

    aggregation: Literal["token_mean", "sequence_mean"] = Field(
        default="token_mean", description="token_mean: DAPO; sequence_mean: GRPO, each response weighs the same"
    )
    prompts_per_step: int = Field(default=64, gt=0)
    group_size: int = Field(default=8, gt=1)
    minibatch_prompts: int | None = Field(default=None, gt=0, description="prompts per optimizer step; empty: all")
    clip_low: float = Field(default=0.2, gt=0)
    clip_high: float = Field(default=0.28, gt=0)
    dual_clip: float | None = Field(default=10.0, gt=1)
    normalize_by_std: bool = True
    dynamic_sampling: bool = True
    max_generation_batches: int = Field(default=10, ge=0, description="dynamic sampling: 0 is unlimited")
    overlong_buffer: int = Field(default=0, ge=0)
    overlong_penalty: float = Field(default=1.0, ge=0)
    tis_cap: float | None = Field(default=None, gt=0, description="truncated importance sampling; empty: off")
    entropy_coef: float = 0.0


class ReheatConfig(Section):
    """TS-OPSD (arXiv 2606.00755 section 3): match the policy's own temperature-flattened distribution."""

    teacher_temperature: float = Field(default=1.2, gt=0)
    direction: Literal["forward", "reverse"] = "forward"
    lr: float = Field(default=1e-6, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    prompts_per_step: int = Field(default=1024, gt=0)
    group_size: int = Field(default=1, gt=0)
    max_tokens: int = Field(default=4096, gt=0)

    @model_validator(mode="after")
    def _flattens(self) -> ReheatConfig:
        if self.teacher_temperature <= 1.0:
            raise ValueError("teacher_temperature must be above 1: at 1 the loss is zero, below 1 it sharpens")
        return self


class ControllerConfig(Section):
    """When to leave RL, what to do about a collapse, and when to stop doing it."""

    action: Literal["reheat", "rollout_temperature", "stop", "none"] = "reheat"
    collapse_below: float = Field(default=0.08, gt=0, description="nats, smoothed token-mean entropy")
    reheat_to: float = Field(default=0.12, gt=0, description="nats")
    smoothing_steps: int = Field(default=3, gt=0)
    max_reheat_steps: int = Field(default=15, gt=0)
    max_rounds: int = Field(default=3, ge=0)
    cooldown_steps: int = Field(default=20, ge=0, description="RL steps after a round before the next may start")
    runaway_entropy: float = Field(default=0.5, gt=0, description="nats: above this, roll back to the last good step")
    runaway_jump: float = Field(default=0.2, gt=0, description="nats per step: above this, roll back")
    rollout_temperature: float = Field(default=1.2, gt=0)

    @model_validator(mode="after")
    def _thresholds_are_ordered(self) -> ControllerConfig:
        if not self.collapse_below < self.reheat_to < self.runaway_entropy:
            raise ValueError(
                f"need collapse_below < reheat_to < runaway_entropy, got {self.collapse_below}, {self.reheat_to}, "
                f"{self.runaway_entropy}; raise the later one or lower the earlier one"
            )
        return self


class OptimizerConfig(Section):
    """AdamW of the RL stage; the reheat and sft stages bring their own learning rate, the rest is shared."""

    lr: float = Field(default=2e-6, gt=0)
    warmup_steps: int = Field(default=10, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    grad_clip: float = Field(default=1.0, gt=0)
    max_skipped_steps: int = Field(default=3, ge=0, description="non-finite steps in a row before the run stops")


class CheckpointConfig(Section):
    every: int = Field(default=50, ge=0, description="steps; 0 saves only at the end")
    keep: int = Field(default=2, gt=0, description="most recent checkpoints that stay on disk")
    keep_best: Literal["eval/avg_at_k", "eval/pass_at_k"] | None = Field(
        default=None, description="also keep the checkpoint of the best evaluation by this metric, as checkpoints/best"
    )


class LoggingConfig(Section):
    console: bool = True
    tensorboard: bool = True
    wandb_project: str | None = None
    rollouts_per_step: int = Field(default=2, ge=0, description="groups written to rollouts/ each step")


class EvalConfig(Section):
    """avg@k and pass@k on held-out prompts, sampled by the run's own engines."""

    data: DataConfig | None = None
    every: int = Field(default=0, ge=0, description="RL steps between evaluations; 0 evaluates at stage borders only")
    num_samples: int = Field(default=8, gt=0)
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=0.7, gt=0, le=1)
    max_tokens: int = Field(default=8192, gt=0)


class RunConfig(Section):
    name: str = "run"
    folder: str = "runs/{name}"
    seed: int = 0
    steps: int = Field(default=100, ge=0, description="RL and reheating steps together, so that arms are step-matched")
    fork_from: str | None = Field(default=None, description="run folder whose latest checkpoint this run starts from")

    @field_validator("folder")
    @classmethod
    def _folder_is_a_template(cls, folder: str) -> str:
        try:
            folder.format(name="")
        except (AttributeError, IndexError, KeyError, ValueError):
            raise ValueError(f"{folder!r} may hold {{name}} in braces and nothing else") from None
        return folder

    @property
    def path(self) -> Path:
        return Path(self.folder.format(name=self.name))


class Config(Section):
    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig = ParallelConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    sft: SFTConfig = SFTConfig()
    rl: RLConfig = RLConfig()
    reheat: ReheatConfig = ReheatConfig()
    controller: ControllerConfig = ControllerConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    eval: EvalConfig = EvalConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _fields_agree(self) -> Config:
        for problem in _cross_field_problems(self):
            raise ValueError(problem)
        return self

    def data_parallel(self, world_size: int | None = None) -> int:
        """Replicas; checks `world_size` (torchrun's WORLD_SIZE) against the layout when it is given."""
        p = self.parallel
        model_parallel = p.tensor * p.pipeline
        if world_size is None:
            return p.data or 1
        if world_size % model_parallel:
            raise ConfigError(
                f"WORLD_SIZE {world_size} is not divisible by parallel.tensor x parallel.pipeline = {p.tensor} x "
                f"{p.pipeline} = {model_parallel}; change parallel.tensor or parallel.pipeline, or start a multiple of "
                f"{model_parallel} processes"
            )
        if p.data is not None and p.data * model_parallel != world_size:
            raise ConfigError(
                f"WORLD_SIZE {world_size} is not parallel.tensor x parallel.pipeline x parallel.data = {p.tensor} x "
                f"{p.pipeline} x {p.data} = {model_parallel * p.data}; start {model_parallel * p.data} processes or "
                f"set parallel.data={world_size // model_parallel}"
            )
        return world_size // model_parallel


def _cross_field_problems(c: Config) -> Iterator[str]:
    minibatch = c.rl.minibatch_prompts
    if minibatch and c.rl.prompts_per_step % minibatch:
        yield (
            f"rl.prompts_per_step {c.rl.prompts_per_step} is not a multiple of rl.minibatch_prompts {minibatch}; "
            "change one of them"
        )
    context = c.rollout.max_model_len
    longest = max(c.rollout.max_tokens, c.reheat.max_tokens if c.controller.action == "reheat" else 0)
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
    eval_sequence = c.eval.data.max_prompt_tokens + c.eval.max_tokens if c.eval.data else 0
    if eval_sequence > c.parallel.microbatch_tokens:
        yield (
            f"eval.data.max_prompt_tokens + eval.max_tokens = {eval_sequence} exceeds parallel.microbatch_tokens "
            f"{c.parallel.microbatch_tokens}; one sequence must fit one micro-batch: raise parallel.microbatch_tokens "
            "or lower eval.max_tokens"
        )
    if c.checkpoint.keep_best and c.eval.data is None:
        yield "checkpoint.keep_best needs eval.data, the held-out prompts to evaluate on"
    if c.rl.overlong_buffer > c.rollout.max_tokens:
        yield f"rl.overlong_buffer {c.rl.overlong_buffer} exceeds rollout.max_tokens {c.rollout.max_tokens}; lower it"
    if c.sft.steps and c.data.solution_template is None:
        yield "sft.steps needs data.solution_template, the worked answer to imitate (e.g. '{answer}')"
    if c.rollout.tensor > 1 and c.rollout.mode == "embedded":
        yield "rollout.tensor needs rollout.mode colocated or server; an embedded engine has one device"
    if c.rollout.overlap and c.rollout.mode != "server":
        yield "rollout.overlap needs rollout.mode=server: the other engines share their devices with the trainer"
    if c.rollout.overlap and c.rl.tis_cap is None:
        yield "rollout.overlap samples from the policy of a step before; set rl.tis_cap (e.g. 2.0) to correct for it"
    if c.rollout.servers and c.rollout.mode != "server":
        yield "rollout.servers needs rollout.mode=server"
    if c.parallel.sequence_parallel and c.parallel.tensor == 1:
        yield "parallel.sequence_parallel needs parallel.tensor > 1; set it to false or raise parallel.tensor"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a recipe, applies `key=value` overrides and validates.

    Raises:
        ConfigError: naming the file and key, with the fix.
    """
    tree = _read_tree(Path(path), seen=())
    for override in overrides:
        apply_override(tree, override)
    return parse_config(tree)


def parse_config(tree: dict[str, Any]) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(e) for e in error.errors())) from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, loadable by `load_config`."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_tree(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path}: base files form a loop: {' -> '.join(p.name for p in (*seen, path))}")
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except FileNotFoundError:
        referrer = f", named as base by {seen[-1]}" if seen else ""
        raise ConfigError(f"no such config file: {path}{referrer}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, not a {type(tree).__name__}")
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base must be the path of one recipe, not {base!r}")
    return _merge(_read_tree(path.parent / base, (*seen, path)), tree)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets one `section.key=value` in `tree`; the value is YAML.

    Raises:
        ConfigError: it is not of that form.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} is not of the form key=value (e.g. rl.group_size=16)")
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {key}: {parent} is a value, not a section")
    try:
        node[leaf] = yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        raise ConfigError(f"override {key}: {text!r} is not a valid YAML value; quote it") from None


def _explain(error: Any) -> str:
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key{_suggestion(location)}"
    if error["type"] == "missing":
        return f"{key}: this key is required"
    if error["type"] == "model_type":
        return f"{key or 'the recipe'}: must hold keys and values, not {error['input']!r}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message


def _suggestion(location: list[str]) -> str:
    section: type[BaseModel] = Config
    for part in location[:-1]:
        section = next((t for t in _section_types(section.model_fields[part].annotation)), section)
    close = difflib.get_close_matches(location[-1], section.model_fields, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; known keys: {', '.join(section.model_fields)}"


def _section_types(annotation: Any) -> Iterator[type[BaseModel]]:
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            yield candidate
