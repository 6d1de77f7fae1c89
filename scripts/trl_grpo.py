"""TRL's GRPO on the countdown demo, one rank of it: what `bench_trl` starts, and writes the times of its steps.

    torchrun --nproc-per-node 2 -m scripts.trl_grpo FOLDER --out times.json [--vllm float32] [--steps 15] ...

FOLDER has the demo's model/ and task/. Settings are those of yaml/countdown_cpu.yaml: the same prompts, completions, loss and
optimizer, in float32, strictly on-policy. Everything else is left as TRL has it, but for one thing: weights are not sent to
vLLM, whose layers have repacked theirs on a CPU and cannot take what TRL sends. That is to TRL's advantage.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--vllm", metavar="DTYPE", help="sample with vLLM in colocate mode; auto: in TRL's choice, bfloat16"
    )
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--rows", type=int, default=256, help="sequences of a micro-batch")
    options = parser.parse_args()

    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from megatron_reheat.rewards.reasoning_gym import verify_reasoning_gym

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.time())

    def reward(completions: Sequence[str], entry: Sequence[str], **_: Any) -> list[float]:
        return [
            verify_reasoning_gym(text, {"task": "countdown", "entry": json.loads(record)})
            for text, record in zip(completions, entry, strict=True)
        ]

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    sequences = options.prompts * options.group_size // ranks
    rows = min(options.rows, sequences)
    records = [json.loads(line) for line in (options.folder / "task" / "train.jsonl").read_text().splitlines()]
    data = Dataset.from_list([{"prompt": prompt_of(record), "entry": json.dumps(record)} for record in records])
    if options.vllm:
        from trl.generation import vllm_generation

        vllm_generation.LLM = partial(vllm_generation.LLM, dtype=options.vllm)
    clock = Clock()
    torch.manual_seed(0)
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.folder / "model", dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(options.folder / "model"),
        reward_funcs=[reward],
        train_dataset=data,
        callbacks=[clock],
        args=GRPOConfig(
            output_dir=str(options.out.parent / "trl"),
            use_cpu=True,
            max_steps=options.steps,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=sequences // rows,
            num_generations=options.group_size,
            max_completion_length=options.max_tokens,
            temperature=1.0,
            top_p=1.0,
            beta=0.0,
            loss_type="dapo",
            epsilon_high=0.28,
            learning_rate=1e-12,  # both sides train the same policy in every step
            lr_scheduler_type="constant",
            weight_decay=0.0,
            gradient_checkpointing=False,
            bf16=False,
            use_vllm=options.vllm is not None,
            vllm_mode="colocate",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
    )
    if options.vllm:
        trainer.vllm_generation.sync_weights = lambda: None
    trainer.train()
    if int(os.environ.get("RANK", "0")) == 0:
        lengths = [entry["completions/mean_length"] for entry in trainer.state.log_history if "reward" in entry]
        options.out.write_text(json.dumps({"ends": clock.ends, "lengths": lengths}))


def prompt_of(record: dict[str, Any]) -> str:
    """As `data.raw_template` of the demo's recipe writes it."""
    metadata = record["metadata"]
    return f"{metadata['target']}|{','.join(map(str, metadata['numbers']))}="


if __name__ == "__main__":
    main()
