"""What people who come from other trainers type, and the key that means the same here.

The keys of verl's `ppo_trainer.yaml`, TRL's `GRPOConfig`, NeMo-RL's `grpo_math_1B.yaml` and prime-rl's `rl.toml`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_MINIBATCH = "rl.minibatch_prompts, in prompts"
_STEP = "rl.prompts_per_step, in prompts"

VERL = {
    "data.train_files": "data.path",
    "data.val_files": "eval.data.path",
    "data.max_prompt_length": "data.max_prompt_tokens",
    "data.max_response_length": "rollout.max_tokens",
    "data.train_batch_size": _STEP,
    "data.gen_batch_size": _STEP,
    "data.filter_overlong_prompts": "data.on_long_prompt=skip",
    "data.truncation": "data.on_long_prompt",
    "data.reward_fn_key": "reward.kind",
    "actor_rollout_ref.model.path": "model.hf_path",
    "actor_rollout_ref.model.enable_gradient_checkpointing": "model.recompute",
    "actor_rollout_ref.actor.ppo_mini_batch_size": _MINIBATCH,
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": "parallel.microbatch_tokens, in tokens",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": "parallel.microbatch_tokens",
    "actor_rollout_ref.actor.grad_clip": "optimizer.grad_clip",
    "actor_rollout_ref.actor.clip_ratio": "rl.clip_low and rl.clip_high",
    "actor_rollout_ref.actor.clip_ratio_low": "rl.clip_low",
    "actor_rollout_ref.actor.clip_ratio_high": "rl.clip_high",
    "actor_rollout_ref.actor.clip_ratio_c": "rl.dual_clip",
    "actor_rollout_ref.actor.entropy_coeff": "rl.entropy_coef",
    "actor_rollout_ref.actor.kl_loss_coef": "rl.kl_coef",
    "actor_rollout_ref.actor.kl_loss_type": "rl.kl_estimator",
    "actor_rollout_ref.actor.loss_agg_mode": "rl.aggregation",
    "actor_rollout_ref.actor.optim.lr": "optimizer.lr",
    "actor_rollout_ref.actor.optim.lr_warmup_steps": "optimizer.warmup_steps",
    "actor_rollout_ref.actor.optim.weight_decay": "optimizer.weight_decay",
    "actor_rollout_ref.actor.megatron.tensor_model_parallel_size": "parallel.tensor",
    "actor_rollout_ref.actor.megatron.pipeline_model_parallel_size": "parallel.pipeline",
    "actor_rollout_ref.actor.megatron.virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline",
    "actor_rollout_ref.actor.megatron.context_parallel_size": "parallel.context",
    "actor_rollout_ref.rollout.n": "rl.group_size",
    "actor_rollout_ref.rollout.temperature": "rollout.temperature",
    "actor_rollout_ref.rollout.gpu_memory_utilization": "rollout.gpu_memory_utilization",
    "actor_rollout_ref.rollout.tensor_model_parallel_size": "rollout.tensor",
    "actor_rollout_ref.rollout.enforce_eager": "rollout.enforce_eager",
    "actor_rollout_ref.rollout.max_num_seqs": "rollout.max_num_seqs",
    "actor_rollout_ref.rollout.max_model_len": "rollout.max_model_len",
    "actor_rollout_ref.rollout.val_kwargs.n": "eval.num_samples",
    "actor_rollout_ref.rollout.val_kwargs.temperature": "eval.temperature",
    "actor_rollout_ref.rollout.val_kwargs.top_p": "eval.top_p",
    "algorithm.norm_adv_by_std_in_grpo": "rl.normalize_by_std",
    "algorithm.filter_groups.enable": "rl.dynamic_sampling",
    "algorithm.filter_groups.max_num_gen_batches": "rl.max_generation_batches",
    "custom_reward_function.path": "reward.function=path/to/file.py:name",
    "custom_reward_function.name": "reward.function=path/to/file.py:name",
    "trainer.total_training_steps": "run.steps",
    "trainer.total_epochs": "run.steps, in steps",
    "trainer.save_freq": "checkpoint.every",
    "trainer.test_freq": "eval.every",
    "trainer.max_actor_ckpt_to_keep": "checkpoint.keep",
    "trainer.experiment_name": "run.name",
    "trainer.project_name": "logging.wandb_project",
    "trainer.default_local_dir": "run.folder",
}
TRL = {
    "model_name_or_path": "model.hf_path",
    "model_revision": "model.revision",
    "dataset_name": "data.source=datasets and data.name",
    "num_generations": "rl.group_size",
    "max_prompt_length": "data.max_prompt_tokens",
    "max_completion_length": "rollout.max_tokens",
    "per_device_train_batch_size": "parallel.microbatch_tokens, in tokens, and rl.prompts_per_step",
    "gradient_accumulation_steps": "rl.prompts_per_step and rl.minibatch_prompts",
    "generation_batch_size": _STEP,
    "steps_per_generation": _MINIBATCH,
    "learning_rate": "optimizer.lr",
    "warmup_steps": "optimizer.warmup_steps",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_epsilon": "optimizer.eps",
    "max_grad_norm": "optimizer.grad_clip",
    "beta": "rl.kl_coef",
    "epsilon": "rl.clip_low",
    "epsilon_high": "rl.clip_high",
    "delta": "rl.dual_clip",
    "loss_type": "rl.aggregation",
    "scale_rewards": "rl.normalize_by_std",
    "importance_sampling_level": "rl.method=gspo for sequence",
    "vllm_importance_sampling_cap": "rl.tis_cap",
    "reward_funcs": "reward.function",
    "reward_weights": "reward.function, weights by function",
    "vllm_mode": "rollout.mode",
    "vllm_gpu_memory_utilization": "rollout.gpu_memory_utilization",
    "vllm_tensor_parallel_size": "rollout.tensor",
    "max_steps": "run.steps",
    "num_train_epochs": "run.steps, in steps",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "eval_steps": "eval.every",
    "run_name": "run.name",
    "output_dir": "run.folder",
    "gradient_checkpointing": "model.recompute",
    "bf16": "model.dtype",
}
NEMO_RL = {
    "grpo.num_prompts_per_step": "rl.prompts_per_step",
    "grpo.num_generations_per_prompt": "rl.group_size",
    "grpo.max_num_steps": "run.steps",
    "grpo.normalize_rewards": "rl.normalize_by_std",
    "grpo.use_dynamic_sampling": "rl.dynamic_sampling",
    "grpo.val_period": "eval.every",
    "grpo.seed": "run.seed",
    "loss_fn.reference_policy_kl_penalty": "rl.kl_coef",
    "loss_fn.ratio_clip_min": "rl.clip_low",
    "loss_fn.ratio_clip_max": "rl.clip_high",
    "loss_fn.ratio_clip_c": "rl.dual_clip",
    "loss_fn.token_level_loss": "rl.aggregation",
    "loss_fn.sequence_level_importance_ratios": "rl.method=gspo",
    "checkpointing.save_period": "checkpoint.every",
    "checkpointing.keep_top_k": "checkpoint.keep and checkpoint.keep_best",
    "checkpointing.checkpoint_dir": "run.folder",
    "policy.model_name": "model.hf_path",
    "policy.precision": "model.dtype",
    "policy.train_global_batch_size": _MINIBATCH,
    "policy.max_total_sequence_length": "rollout.max_model_len",
    "policy.max_grad_norm": "optimizer.grad_clip",
    "policy.megatron_cfg.tensor_model_parallel_size": "parallel.tensor",
    "policy.megatron_cfg.pipeline_model_parallel_size": "parallel.pipeline",
    "policy.megatron_cfg.context_parallel_size": "parallel.context",
    "policy.megatron_cfg.sequence_parallel": "parallel.sequence_parallel",
    "policy.megatron_cfg.optimizer.lr": "optimizer.lr",
    "policy.sequence_packing.train_mb_tokens": "parallel.microbatch_tokens",
    "policy.generation.max_new_tokens": "rollout.max_tokens",
    "policy.generation.temperature": "rollout.temperature",
    "policy.generation.vllm_cfg.gpu_memory_utilization": "rollout.gpu_memory_utilization",
    "policy.generation.vllm_cfg.tensor_parallel_size": "rollout.tensor",
    "policy.generation.vllm_cfg.max_model_len": "rollout.max_model_len",
    "policy.generation.colocated.enabled": "rollout.mode",
    "logger.log_dir": "run.folder",
    "logger.wandb.project": "logging.wandb_project",
}
PRIME_RL = {
    "max_steps": "run.steps",
    "seq_len": "rollout.max_model_len",
    "model.name": "model.hf_path",
    "wandb.project": "logging.wandb_project",
    "wandb.name": "run.name",
    "ckpt.interval": "checkpoint.every",
    "orchestrator.batch_size": "rl.prompts_per_step, which is it over rl.group_size",
    "orchestrator.group_size": "rl.group_size",
    "orchestrator.rollouts_per_example": "rl.group_size",
    "orchestrator.seq_len": "rollout.max_model_len",
    "orchestrator.sampling.temperature": "rollout.temperature",
    "orchestrator.sampling.max_tokens": "rollout.max_tokens",
    "orchestrator.eval.interval": "eval.every",
    "trainer.optim.lr": "optimizer.lr",
    "trainer.optim.weight_decay": "optimizer.weight_decay",
    "trainer.optim.max_norm": "optimizer.grad_clip",
    "inference.model.max_model_len": "rollout.max_model_len",
    "inference.gpu_memory_utilization": "rollout.gpu_memory_utilization",
    "inference.parallel.tp": "rollout.tensor",
}
PROJECTS = {"verl": VERL, "TRL": TRL, "NeMo-RL": NEMO_RL, "prime-rl": PRIME_RL}


def translations(key: str, value: Any) -> list[str]:
    """Sentences on what of an unknown key has another name here; `value` is what it was given, whose own keys count."""
    found: dict[str, str] = {}
    for given in (key, *(f"{key}.{inner}" for inner in _leaves(value))):
        for project, table in PROJECTS.items():
            if given in table:
                found.setdefault(given, f"{project}'s {given} is {table[given]}")
    return list(found.values())


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield str(name)
            yield from (f"{name}.{deeper}" for deeper in _leaves(inner))
