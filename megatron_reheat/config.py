"""The sections of a recipe as frozen models: keys, defaults, meanings, and what makes no sense together.

All of it is checked before a model is loaded; every cross-field check names the key to change.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    field_validator,
    model_validator,
)

from megatron_reheat.config_checks import cross_field_problems
from megatron_reheat.config_data import EvalConfig, TrainDataConfig
from megatron_reheat.config_fields import (
    MAX_PROCESSES,
    MAX_PROMPTS,
    MAX_REWARD,
    MAX_SAMPLES,
    MAX_SEED,
    MAX_WAIT_S,
    FullDtypeName,
    Options,
    PathText,
    Section,
    Switch,
    Temperature,
    Url,
    absolute_file,
    eval_metric,
    weighted_functions,
)
from megatron_reheat.errors import ConfigError


class ModelConfig(Section):
    """The policy: a Hugging Face folder (or hub name) of the Qwen3, Qwen2, Llama or Mistral family."""

    hf_path: PathText = Field(min_length=1, description="the policy: a Hugging Face folder, or a hub name")
    revision: str | None = Field(
        default=None,
        min_length=1,
        description="of a hub name: branch, tag or commit; empty: the newest of its main branch",
    )
    dtype: Annotated[Literal["float32", "bfloat16"], FullDtypeName] = Field(
        default="bfloat16",
        description="of the weights, in training and sampling; masters are float32",
    )
    attention: Literal["auto", "sdpa", "transformer_engine"] = Field(
        default="auto",
        description="auto: Transformer Engine where it is installed and there is a GPU, otherwise PyTorch's SDPA",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        default="none",
        description="activations computed again in the backward pass: none, mainly the MLPs', or all (least memory)",
    )
    vocab_pad_multiple: int = Field(
        default=1, gt=0, le=2**16, description="pad the vocabulary to a multiple of this x TP"
    )
    fused_head: bool = Field(default=True, description="apply the LM head inside the loss, chunk by chunk")
    head_chunk_tokens: int = Field(default=1024, gt=0, description="tokens whose logits exist at a time")


class ParallelConfig(Section):
    """Megatron's layout. `data` may stay empty under torchrun: it is then WORLD_SIZE / (tensor x pipeline x context)."""

    tensor: int = Field(default=1, gt=0, le=MAX_PROCESSES, description="tensor parallel size (TP)")
    pipeline: int = Field(default=1, gt=0, le=MAX_PROCESSES, description="pipeline parallel size (PP)")
    virtual_pipeline: int = Field(
        default=1,
        gt=0,
        le=MAX_PROCESSES,
        description="model chunks of a pipeline rank (VPP), run interleaved: a shorter bubble for more messages between ranks",
    )
    context: int = Field(
        default=1,
        gt=0,
        le=MAX_PROCESSES,
        description="context parallel size (CP): so many copies of the model share a micro-batch, each with a part of every "
        "sequence",
    )
    data: int | None = Field(
        default=None,
        gt=0,
        le=MAX_PROCESSES,
        description="data parallel size (DP), of micro-batches at a time; empty: as many as there are processes for, 1 without "
        "torchrun",
    )
    sequence_parallel: bool = Field(
        default=False, description="split activations between tensor parallel regions over the TP ranks, too"
    )
    distributed_optimizer: bool = Field(
        default=True, description="split optimizer state and master weights over the replicas"
    )
    overlap_grad_reduce: Switch = Field(
        default="auto",
        description="sum gradients over the replicas while the backward pass still makes others; auto: on GPUs",
    )
    microbatch_tokens: int = Field(
        default=16384,
        gt=0,
        description="packed tokens of one micro-batch, at most, on all its context parallel ranks together",
    )
    timeout_s: float = Field(
        default=3600.0,
        gt=0,
        le=MAX_WAIT_S,
        description="longest wait of a rank for the others, while one of them samples, grades or saves",
    )

    @property
    def block(self) -> int:
        """Ranks that work on one micro-batch."""
        return self.tensor * self.pipeline * self.context

    def sizes(self, prefix: str = "") -> tuple[str, str]:
        """Names and sizes of what makes a `block`; context parallelism is named where there is any."""
        named = {"tensor": self.tensor, "pipeline": self.pipeline}
        named |= {"context": self.context} if self.context > 1 else {}
        return " x ".join(f"{prefix}{name}" for name in named), " x ".join(map(str, named.values()))

    def layout(self, data: int) -> str:
        """In words, with `data` replicas of a block."""
        chunks = f" ({self.virtual_pipeline} model chunks each)" if self.virtual_pipeline > 1 else ""
        context = f" x context {self.context}" if self.context > 1 else ""
        return f"tensor {self.tensor} x pipeline {self.pipeline}{chunks}{context} x data {data}"


Weight = Annotated[float, Field(ge=-MAX_REWARD, le=MAX_REWARD)]


class RewardConfig(Section):
    """Verification in worker processes that are killed on timeout."""

    kind: Literal["reasoning_gym", "math", "function"] = Field(
        default="math",
        description="math: boxed answers compared as mathematics; reasoning_gym: the task's own scorer; function: your own",
    )
    function: Annotated[
        Mapping[str, Weight] | None,
        BeforeValidator(weighted_functions, json_schema_input_type=str | dict[str, float] | None),
    ] = Field(
        default=None,
        description="path/to/file.py:name or package.module:name, called with response and record; or several with weights",
    )
    correct_at: float = Field(
        default=1.0,
        ge=-MAX_REWARD,
        le=MAX_REWARD,
        description="function: the reward from which a response counts as correct, unless the function says itself",
    )
    sandbox: bool = Field(
        default=True,
        description="false: functions may use network, files and processes, and get this process's environment",
    )
    workers: int = Field(default=2, gt=0, le=MAX_PROCESSES, description="per replica of the model")
    timeout_s: float = Field(
        default=10.0, gt=0, le=MAX_WAIT_S, description="of one answer, seconds; one that takes longer counts as wrong"
    )
    while_sampling: Switch = Field(
        default="auto",
        description="grade each response as soon as it is sampled, beside the engine, where one that runs out of time has its "
        "time again after the last; false: all of them after the last; auto: beside engines on GPUs",
    )
    correct: float = Field(default=1.0, ge=-MAX_REWARD, le=MAX_REWARD, description="reward of a right answer")
    incorrect: float = Field(default=0.0, ge=-MAX_REWARD, le=MAX_REWARD, description="reward of a wrong one")
    answer_chars: int = Field(
        default=300, gt=0, description="math: without a box, `Answer:` is sought in so many last characters"
    )

    @model_validator(mode="before")
    @classmethod
    def _function_is_a_kind(cls, section: Any) -> Any:
        """Naming a function is enough."""
        if isinstance(section, Mapping) and section.get("function") is not None and "kind" not in section:
            return {**section, "kind": "function"}
        return section

    @model_validator(mode="after")
    def _kind_has_its_function(self) -> RewardConfig:
        if self.kind == "function" and not self.function:
            raise ValueError("kind function needs `function`, e.g. rewards.py:score")
        if self.kind != "function" and self.function:
            raise ValueError(f"`function` is given, and kind is {self.kind}; leave one of them out")
        if self.kind != "function" and not self.sandbox:
            raise ValueError("sandbox=false is for functions of your own only; leave it out")
        return self


class RolloutConfig(Section):
    """vLLM: a process beside each data-parallel replica (`embedded`), on all of the trainer's GPUs in turn with it
    (`colocated`), or servers that all replicas share (`server`)."""

    mode: Literal["embedded", "colocated", "server"] = Field(
        default="embedded",
        description="embedded: an engine beside each replica; colocated: engines and trainer take turns; server: over HTTP",
    )
    servers: tuple[Url, ...] = Field(
        default=(), description="server: URLs of running servers (reheat serve); empty starts num_servers here"
    )
    num_servers: int = Field(default=1, gt=0, le=MAX_PROCESSES, description="server: how many to start on this machine")
    tensor: int = Field(
        default=1, gt=0, le=MAX_PROCESSES, description="colocated, server: tensor parallel size of one vLLM engine"
    )
    overlap: bool = Field(
        default=False,
        description="server: sample the next RL step's prompts while this one trains (one step off-policy)",
    )
    temperature: Temperature = Field(default=1.0, description="at which RL samples and trains; reheating samples at 1")
    max_tokens: int = Field(default=4096, gt=0, description="longest response, tokens")
    max_model_len: int | None = Field(
        default=None, gt=0, description="longest prompt and response together, tokens; empty: what data and stages need"
    )
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], FullDtypeName] = Field(
        default="auto", description="of the engine's weights; auto: model.dtype"
    )
    max_num_seqs: int = Field(
        default=256, gt=0, le=2**16, description="sequences that an engine decodes at a time, at most"
    )
    enforce_eager: bool = Field(
        default=False, description="do not compile or capture graphs in vLLM: faster start, slower sampling"
    )
    kv_cache_mb: int | None = Field(
        default=None, gt=0, le=2**24, description="fixed KV cache; empty lets vLLM take its share"
    )
    gpu_memory_utilization: float = Field(
        default=0.45, gt=0, le=1, description="share of a GPU's memory that vLLM may take"
    )
    threads: int | None = Field(default=None, gt=0, le=MAX_PROCESSES, description="OpenMP threads of a CPU engine")
    timeout_s: float = Field(
        default=1800.0, gt=0, le=MAX_WAIT_S, description="longest wait for one answer of the engine"
    )
    start_timeout_s: float = Field(
        default=900.0, gt=0, le=MAX_WAIT_S, description="longest wait for an engine or server to be ready, seconds"
    )
    max_restarts: int = Field(
        default=2, ge=0, description="how often an engine is replaced before the run ends; a server, within an hour"
    )
    sync_bucket_mb: int = Field(
        default=512, gt=0, le=2**16, description="weights travel to the engine in pieces of this size, MiB"
    )
    verify_every: int = Field(
        default=50, ge=0, description="digest check on the first and every N-th sync; 0: first only"
    )
    mismatch_limit: float = Field(default=0.1, gt=0, description="stop when mismatch_kl exceeds this")


class SFTConfig(Section):
    """Warm start on solved examples, so that a base policy can be made offline. `steps: 0` leaves it out."""

    steps: int = Field(default=0, ge=0, description="of the warm start; 0: none")
    batch_size: int = Field(default=64, gt=0, le=MAX_PROMPTS, description="solved examples of a step")
    lr: float = Field(default=2e-3, gt=0, description="peak learning rate; falls along a cosine after warmup_steps")
    warmup_steps: int = Field(default=50, ge=0, description="in which the rate rises from 0")
    log_every: int = Field(default=50, gt=0, description="steps from one line on record to the next")


class RLConfig(Section):
    """Defaults are the paper's DAPO settings (arXiv 2606.00755, training details)."""

    method: Annotated[str, AfterValidator(absolute_file)] = Field(
        default="grpo", description="a name in megatron_reheat.methods, or path/to/file.py:Class"
    )
    options: Options = Field(default_factory=dict, description="the method's own keys, as its file describes them")
    samplers: dict[str, str] = Field(
        default_factory=dict, description="frozen models that the method samples from: name: Hugging Face folder"
    )
    sampler_servers: dict[str, tuple[Url, ...]] = Field(
        default_factory=dict,
        description="server: URLs of running servers of a frozen model (reheat serve RECIPE model.hf_path=FOLDER), by the "
        "model's name; one that is left out gets rollout.num_servers started here",
    )
    aggregation: Literal["token_mean", "sequence_mean"] = Field(
        default="token_mean", description="token_mean: DAPO; sequence_mean: GRPO, each response weighs the same"
    )
    prompts_per_step: int = Field(
        default=64,
        gt=0,
        le=MAX_PROMPTS,
        description="prompts that a step samples for; its batch is these times group_size",
    )
    group_size: int = Field(
        default=8, gt=1, le=MAX_SAMPLES, description="responses to each prompt (G), among which advantages are relative"
    )
    minibatch_prompts: int | None = Field(default=None, gt=0, description="prompts per optimizer step; empty: all")
    clip_low: float = Field(default=0.2, gt=0, lt=1, description="the ratio's lower bound is 1 - clip_low")
    clip_high: float = Field(
        default=0.28, gt=0, description="the ratio's upper bound is 1 + clip_high (DAPO's clip-higher)"
    )
    dual_clip: float | None = Field(
        default=10.0, gt=1, description="caps the loss of a negative advantage A at this times |A|; empty: no cap"
    )
    normalize_by_std: bool = Field(
        default=True, description="divide advantages by the group's standard deviation; false: Dr. GRPO"
    )
    dynamic_sampling: bool = Field(
        default=True,
        description="leave out groups whose rewards are all equal, and sample others in their place (DAPO)",
    )
    max_generation_batches: int = Field(
        default=10,
        ge=0,
        description="dynamic sampling: 0 is unlimited, as long as one of 10 in a row brings a group to train on",
    )
    oversample: bool = Field(
        default=True,
        description="dynamic sampling: sample as many prompts at once as it took lately, up to 4 times prompts_per_step, "
        "instead of batch after batch; groups beyond those that a step trains on are left out",
    )
    max_staleness: int = Field(
        default=0,
        ge=0,
        description="dynamic sampling: groups beyond those that a step trains on come first in the next step, if the policy "
        "that sampled them is at most so many updates old; 0: left out",
    )
    overlong_buffer: int = Field(
        default=0,
        ge=0,
        description="soft overlong punishment (DAPO): so many last tokens cost more and more; 0: none",
    )
    overlong_penalty: float = Field(
        default=1.0, ge=0, le=MAX_REWARD, description="what a response of the full length costs by then"
    )
    tis_cap: float | None = Field(default=None, ge=1, description="truncated importance sampling; empty: off")
    entropy_coef: float = Field(default=0.0, description="of an entropy bonus in the loss; negative: a malus")
    kl_coef: float = Field(
        default=0.0,
        ge=0,
        description="of the KL to the policy with which this run's RL began, in the loss; 0: no such copy",
    )
    kl_estimator: Literal["k1", "k2", "k3", "k1+", "k3+"] = Field(
        default="k3",
        description="per sampled token; k1's gradient is zero in the mean, a + gives k2's, which is the KL's",
    )


class ReheatConfig(Section):
    """TS-OPSD (arXiv 2606.00755 section 3): match the policy's own temperature-flattened distribution."""

    teacher_temperature: float = Field(
        default=1.2,
        gt=0,
        description="at which the policy's own distribution is flattened into the teacher's; below 1 it is sharpened, for "
        "controller.action=cool",
    )
    teacher: Literal["current", "frozen"] = Field(
        default="current",
        description="whose distribution is flattened: current, the policy's as it is in each step, the paper's; frozen, that "
        "with which the round began, so that steps cannot add up to something else than flattening (needs model.fused_head)",
    )
    direction: Literal["forward", "reverse"] = Field(
        default="forward", description="of the KL: forward KL(teacher || policy), reverse KL(policy || teacher)"
    )
    lr: float = Field(default=1e-6, gt=0, description="learning rate of the reheating steps")
    weight_decay: float = Field(default=0.0, ge=0, description="of the reheating steps")
    prompts_per_step: int = Field(default=1024, gt=0, le=MAX_PROMPTS, description="prompts of a reheating step")
    group_size: int = Field(default=1, gt=0, le=MAX_SAMPLES, description="responses to each of them")
    max_tokens: int | None = Field(default=None, gt=0, description="of a response; empty: rollout.max_tokens")

    @model_validator(mode="after")
    def _moves(self) -> ReheatConfig:
        if self.teacher_temperature == 1.0:
            raise ValueError(
                "teacher_temperature 1 has no loss; raise it above 1, or lower it for controller.action=cool"
            )
        return self


class ControllerConfig(Section):
    """When to leave RL, what to do about a collapse, and when to stop doing it."""

    action: Literal["reheat", "flatten", "rollout_temperature", "cool", "stop", "none"] = Field(
        default="reheat",
        description="on a collapse; flatten: divide all logits by what makes the entropy reheat_to, at once; "
        "rollout_temperature: sample hotter from then on; none: train on. Instead on too much entropy; cool: the steps of "
        "reheating, towards the sharpened distribution",
    )
    collapse_below: float = Field(default=0.08, gt=0, description="nats, smoothed token-mean entropy")
    reheat_to: float = Field(default=0.12, gt=0, description="nats")
    cool_above: float | None = Field(
        default=None, gt=0, description="nats, smoothed token-mean entropy above which action cool begins"
    )
    cool_to: float | None = Field(default=None, gt=0, description="nats, below which it ends")
    smoothing_steps: int = Field(
        default=3, gt=0, description="steps over which the entropy is averaged before it is compared"
    )
    max_reheat_steps: int = Field(default=15, gt=0, description="of a round, at most")
    max_rounds: int = Field(default=3, ge=0, description="of reheating in a run, at most")
    cooldown_steps: int = Field(default=20, ge=0, description="RL steps after a round before the next may start")
    runaway_entropy: float = Field(default=0.5, gt=0, description="nats: above this, roll back to the last good step")
    runaway_jump: float = Field(default=0.2, gt=0, description="nats per step: above this, roll back")
    rollout_temperature: Temperature = Field(default=1.2, description="of action rollout_temperature")

    @model_validator(mode="after")
    def _thresholds_are_ordered(self) -> ControllerConfig:
        if not self.collapse_below < self.reheat_to < self.runaway_entropy:
            raise ValueError(
                f"need collapse_below < reheat_to < runaway_entropy, got {self.collapse_below}, {self.reheat_to}, "
                f"{self.runaway_entropy}; raise the later one or lower the earlier one"
            )
        return self

    @model_validator(mode="after")
    def _cooling_has_thresholds(self) -> ControllerConfig:
        above, to = self.cool_above, self.cool_to
        if self.action != "cool":
            if unused := [key for key in ("cool_above", "cool_to") if getattr(self, key) is not None]:
                raise ValueError(
                    f"{unused[0]} would not be read with action={self.action}; remove it, or set action=cool"
                )
        elif above is None or to is None:
            raise ValueError(
                f"action=cool needs {'cool_above' if above is None else 'cool_to'}, nats of entropy; set it"
            )
        elif to >= above:
            raise ValueError(f"need cool_to < cool_above, got {to} and {above}; lower cool_to")
        return self

    @property
    def trains(self) -> bool:
        """Whether the action is a stage of training, towards the policy's own tempered distribution."""
        return self.action in ("reheat", "cool")


class OptimizerConfig(Section):
    """AdamW of the RL stage; the reheat and sft stages bring their own learning rate, the rest is shared."""

    lr: float = Field(default=2e-6, gt=0, description="learning rate of RL, constant after warmup_steps")
    warmup_steps: int = Field(
        default=10,
        ge=0,
        description="in which the rate rises from 0, at the start of RL and after each round of reheating",
    )
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's, of the gradient's mean")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW's, of its square's")
    eps: float = Field(default=1e-8, gt=0, description="AdamW's")
    weight_decay: float = Field(default=0.1, ge=0, description="AdamW's, of RL and the warm start")
    grad_clip: float = Field(
        default=1.0, gt=0, description="largest norm of the gradient, above which it is scaled down"
    )
    max_skipped_steps: int = Field(default=3, ge=0, description="non-finite steps in a row before the run goes back")
    max_rollbacks: int = Field(
        default=2, ge=0, description="how often it goes back to a checkpoint that gave finite steps before it stops"
    )


class CheckpointConfig(Section):
    """When a run is saved, and which checkpoints stay."""

    every: int = Field(default=50, ge=0, description="steps; 0 saves only at the end")
    keep: int = Field(default=2, gt=0, description="most recent checkpoints that stay on disk")
    asynchronous: Switch = Field(
        default="auto",
        description="write while training goes on, from a copy in host memory; complete between two steps, once every rank has "
        "written. false: training waits, and the memory is given back; auto: on GPUs",
    )
    borders: bool = Field(
        default=False,
        description="also write the policy before and after each round of reheating or flattening, as Hugging Face folders in "
        "RUN/borders, which reheat compare RUN takes",
    )
    keep_best: Annotated[str, AfterValidator(eval_metric)] | None = Field(
        default=None,
        description="also keep the checkpoint of the best evaluation, as checkpoints/best: by eval/avg_at_k or eval/pass_at_k "
        "of eval.data, or eval/NAME/avg_at_k or eval/NAME/pass_at_k of a suite",
    )


class LoggingConfig(Section):
    """How a run is shown, beside metrics.jsonl, which is always written."""

    console: bool = Field(default=True, description="a line for each step on the terminal")
    tensorboard: bool = Field(default=True, description="event files in the run's folder")
    wandb_project: str | None = Field(default=None, description="sends metrics there; empty: no Weights & Biases")
    mlflow_experiment: str | None = Field(
        default=None, min_length=1, description="the same for MLflow, at the place that MLFLOW_TRACKING_URI names"
    )
    trackio_project: str | None = Field(
        default=None, min_length=1, description="the same for trackio, on this machine or where TRACKIO_SPACE_ID says"
    )
    rollouts_per_step: int = Field(default=2, ge=0, description="groups written to rollouts/ each step")


class RunConfig(Section):
    """What a run is called, where it writes, how long it is and what it starts from."""

    name: PathText = Field(default="run", min_length=1, description="of the run and its folder")
    folder: PathText = Field(
        default="runs/{name}", min_length=1, description="where it writes; `{name}` stands for run.name"
    )
    seed: int = Field(default=0, ge=0, le=MAX_SEED, description="of all that is drawn: prompts' order, samples")
    steps: int = Field(default=100, ge=0, description="RL and reheating steps together, so that arms are step-matched")
    fork_from: PathText | None = Field(
        default=None, description="run folder whose latest checkpoint this run starts from"
    )
    stop_grace_s: float = Field(
        default=600.0,
        ge=0,
        le=MAX_WAIT_S,
        description="after SIGTERM, for the step in progress and the save; then the run ends without",
    )

    @field_validator("name")
    @classmethod
    def _name_stays_in_the_folder(cls, name: str) -> str:
        if name.startswith("/") or not name.strip() or {".", ".."} & set(name.split("/")):
            raise ValueError(
                f"{name!r} does not name a folder of its own below run.folder; use letters, digits, - and _"
            )
        return name

    @field_validator("folder")
    @classmethod
    def _folder_is_a_template(cls, folder: str) -> str:
        try:
            fields = [rest for _, *rest in string.Formatter().parse(folder) if rest[0] is not None]
        except ValueError:
            fields = [[folder]]
        if any(field != ["name", "", None] for field in fields):
            raise ValueError(f"{folder!r} may hold {{name}} in braces and nothing else")
        return folder

    @property
    def path(self) -> Path:
        """`folder` with the name filled in; a relative one counts from the working directory."""
        return Path(self.folder.format(name=self.name))


class Config(Section):
    """A recipe, with defaults where it says nothing. What makes no sense together is refused."""

    model: ModelConfig
    data: TrainDataConfig
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
        for problem in cross_field_problems(self):
            raise ValueError(problem)
        return self

    @property
    def total_steps(self) -> int:
        """The warm start's and those of RL and reheating."""
        return self.sft.steps + self.run.steps

    @property
    def reheat_tokens(self) -> int:
        """The longest response of a reheating step."""
        return self.reheat.max_tokens or self.rollout.max_tokens

    @property
    def judged_tokens(self) -> int:
        """How much of a response counts in the entropy that the controller sees: as much as every stage samples."""
        return self.reheat_tokens if self.controller.trains else self.rollout.max_tokens

    def data_parallel(self, world_size: int | None = None) -> int:
        """Data parallel size; checks `world_size` (torchrun's WORLD_SIZE) against the layout when it is given."""
        p = self.parallel
        if world_size is None:
            return p.data or 1
        names, sizes = p.sizes("parallel.")
        if world_size % p.block:
            raise ConfigError(
                f"WORLD_SIZE {world_size} is not divisible by {names} = {sizes} = {p.block}; change "
                f"{names.replace(' x ', ' or ')}, or start a multiple of {p.block} processes"
            )
        if p.data is not None and p.data * p.block != world_size:
            raise ConfigError(
                f"WORLD_SIZE {world_size} is not {names} x parallel.data = {sizes} x {p.data} = {p.block * p.data}; start "
                f"{p.block * p.data} processes or set parallel.data={world_size // p.block}"
            )
        return world_size // p.block
