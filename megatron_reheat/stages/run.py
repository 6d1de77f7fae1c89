"""A whole run: build, restore, warm start, then RL and reheating as the controller decides, with everything on record."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_reheat.config import Config
from megatron_reheat.errors import NonFiniteLossError
from megatron_reheat.model.checkpoint import (
    install_checkpoint_fixes,
    latest_checkpoint,
    load_checkpoint,
    read_state,
    save_checkpoint,
)
from megatron_reheat.model.engine import Engine
from megatron_reheat.parallel import topology as parallel_topology
from megatron_reheat.parallel.seats import engine_seats
from megatron_reheat.parallel.topology import Topology
from megatron_reheat.rewards.pool import VerifierPool
from megatron_reheat.rollout.engine import RolloutEngine
from megatron_reheat.run_folder import RunFolder
from megatron_reheat.run_logger import RunLogger, StepRecord
from megatron_reheat.stages.controller import Controller, ControllerState, Verdict
from megatron_reheat.stages.evaluate import evaluate
from megatron_reheat.stages.inputs import Inputs, read_inputs
from megatron_reheat.stages.outcome import StepOutcome
from megatron_reheat.stages.policy import Policy
from megatron_reheat.stages.reheat import ReheatStage
from megatron_reheat.stages.rlvr import RLVRStage
from megatron_reheat.stages.sampler import start_sampler
from megatron_reheat.stages.sft import SFTStage
from megatron_reheat.stop_request import stop_requested


@dataclass
class RunState:
    """What a checkpoint keeps besides weights and optimizer. `step` counts every stage's steps, the warm start's first.

    `best` holds the best evaluation so far by the metric's name (`checkpoint.keep_best`).
    """

    step: int = 0
    policy_version: int = 0
    skipped_in_row: int = 0
    controller: dict[str, Any] = field(default_factory=lambda: ControllerState().to_json())
    cursor: dict[str, Any] | None = None
    sft_cursor: dict[str, Any] | None = None
    best: dict[str, float] = field(default_factory=dict)


def train(config: Config) -> bool:
    """Runs `config` to its end, from its own latest checkpoint, another run's (`run.fork_from`) or the start.

    Returns:
        False when it was asked to stop before the end (`stop_request`); everything is saved then.

    Raises:
        ReheatError: with one clear sentence; checkpoints written so far stay valid.
    """
    inputs = read_inputs(config)
    if inputs.source is not None and (done := read_state(inputs.source)["step"]) >= _total_steps(config):
        _say_it_is_finished(config, done)
        return True
    topology = parallel_topology.initialize(config)
    with _Helpers(config, topology, inputs) as helpers:
        ended = Run(config, topology, inputs, helpers.sampler, helpers.verifiers).go()
    if not ended:
        topology.barrier()  # a launcher takes the first rank that leaves early for a failure and ends the others
    # only after success: a rank that failed must not wait for the others to leave the groups with it
    parallel_topology.finalize()
    return ended


def _total_steps(config: Config) -> int:
    return config.sft.steps + config.run.steps


def _say_it_is_finished(config: Config, done: int) -> None:
    """Before anything is started: neither process group nor model nor engine is needed for it."""
    total, is_main = _total_steps(config), os.environ.get("RANK", "0") == "0"
    with RunLogger(config, RunFolder(config.run.path), is_main=is_main, start_step=done, total_steps=total) as logger:
        logger.log_event(f"nothing to do: {done} of {total} steps are done (run.steps)", "yellow")


class _Helpers:
    """The vLLM engine and verifiers of a rank that leads one; None on other ranks. Closed on the way out, whatever happens.

    The engine is started here, before the model is built, so that vLLM's imports run beside Megatron's.
    """

    def __init__(self, config: Config, topology: Topology, inputs: Inputs) -> None:
        leads = engine_seats(topology, config.rollout).is_leader
        if leads:
            RunFolder(config.run.path).make_folders()
        self.sampler = start_sampler(config, topology, inputs)
        self.verifiers = VerifierPool(config.reward) if leads else None

    def __enter__(self) -> _Helpers:
        return self

    def __exit__(self, *_: object) -> None:
        if self.sampler is not None:
            self.sampler.close()
        if self.verifiers is not None:
            self.verifiers.close()


class Run:
    """Holds the parts together; `go` is the loop."""

    def __init__(
        self,
        config: Config,
        topology: Topology,
        inputs: Inputs,
        sampler: RolloutEngine | None,
        verifiers: VerifierPool | None,
    ) -> None:
        install_checkpoint_fixes()
        self.config, self.topology, self.inputs = config, topology, inputs
        self.folder = RunFolder(config.run.path)
        self.engine = Engine(config, inputs.hf_folder, topology)
        self.policy = Policy(self.engine, topology, sampler, verifiers, self._decode)
        self.cursor, self.sft_cursor = inputs.cursors(config)
        self.controller = Controller(config.controller)
        self.state = RunState()
        self._sampler = sampler
        self._saved_step = -1
        self._build_stages()

    def go(self) -> bool:
        """Returns whether the run came to its end; False when it was asked to stop."""
        source, forked = self._restore()
        total = _total_steps(self.config)
        with RunLogger(
            self.config,
            self.folder,
            is_main=self.topology.is_main,
            start_step=self.state.step,
            total_steps=total,
        ) as self.logger:
            self._announce_start(source)
            if forked and (text := self._follow(self.controller.judge_rl())):
                self.logger.log_event(text)
            if self.state.step == 0 and not self.config.sft.steps:
                self._log(0, "rlvr", self._evaluate())
            while self.state.step < total and not self.controller.state.stopped:
                if self.topology.any(stop_requested()):
                    self._stop()
                    return False
                self._step()
            self._save()
            return True

    def _stop(self) -> None:
        if self.state.step:  # else there is nothing yet that a fresh start would not make again
            self._save()
        self.logger.log_event(f"asked to stop after step {self.state.step}; the same command goes on from there")

    # -- one step --------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        step, config = self.state.step + 1, self.config
        stage = "sft" if step <= config.sft.steps else self.controller.state.stage
        round_, event, border = self.controller.state.round, None, False
        if stage == "sft":
            self.policy.rest()
            outcome = self.sft.step(step)
            if border := step == config.sft.steps:
                self.engine.reset_optimizer()
                self.policy.publish(step)
        else:
            outcome, verdict = self._reheat_or_rl(step, stage)
            event, border = self._follow(verdict, outcome.entropy), verdict is not Verdict.CONTINUE
        self._count_skips(outcome, step)
        self.state.step = step
        metrics = dict(outcome.metrics)
        last = step == _total_steps(config)
        scheduled = stage == "rlvr" and config.eval.every and step % config.eval.every == 0
        if border or last or scheduled:
            metrics.update(self._evaluate())
        if stage != "sft" or border or step % config.sft.log_every == 0 or step == 1:
            self._log(step, stage, metrics, round_, event)
        self.logger.write_rollouts(step, outcome.groups, self._decode, config.logging.rollouts_per_step)
        is_best = self._is_best(metrics)
        if is_best or (config.checkpoint.every and step % config.checkpoint.every == 0):
            self._save(is_best)

    def _is_best(self, metrics: Mapping[str, float]) -> bool:
        """Whether this step's evaluation, if there was one, is the run's best yet; the first of equals counts."""
        name = self.config.checkpoint.keep_best
        if name is None or name not in metrics or metrics[name] <= self.state.best.get(name, -math.inf):
            return False
        self.state.best[name] = metrics[name]
        return True

    def _reheat_or_rl(self, step: int, stage: str) -> tuple[StepOutcome, Verdict]:
        if stage == "reheat":
            return self.reheat.step(step)
        state = self.controller.state
        temperature = self.config.rollout.temperature
        if state.temperature_raised:
            temperature = self.config.controller.rollout_temperature
        outcome = self.rlvr.step(
            step,
            stage_step=state.stage_steps,
            sampling_temperature=temperature,
            look_ahead=self.config.rollout.overlap and step < _total_steps(self.config),
        )
        if outcome.entropy is None:
            return outcome, Verdict.CONTINUE
        return outcome, self.controller.observe_rl(outcome.entropy)

    def _follow(self, verdict: Verdict, entropy: float | None = None) -> str | None:
        """Carries out a verdict and says what happened; stages do not inherit each other's optimizer moments."""
        if verdict is Verdict.CONTINUE:
            return None
        before = self.controller.state.stage
        text = self.controller.explain(verdict, self.controller.smoothed_entropy if entropy is None else entropy)
        self.controller.carry_out(verdict)
        if self.controller.state.stage != before:
            self.rlvr.forget_ahead()
            self.engine.reset_optimizer()
        return text

    def _count_skips(self, outcome: StepOutcome, step: int) -> None:
        if outcome.finite:
            self.state.skipped_in_row = 0
            return
        self.state.skipped_in_row += 1
        limit = self.config.optimizer.max_skipped_steps
        self.logger.log_event(
            f"step {step}: loss or gradient is not finite; update skipped ({self.state.skipped_in_row} in a row)", "red"
        )
        if self.state.skipped_in_row > limit:
            failure = NonFiniteLossError(
                f"loss or gradient was not finite for {self.state.skipped_in_row} steps in a row "
                f"(optimizer.max_skipped_steps {limit}); the latest good checkpoint is "
                f"{latest_checkpoint(self.folder.checkpoints) or 'none yet'}; lower optimizer.lr or check the data"
            )
            failure.on_every_rank = True
            raise failure

    # -- state -----------------------------------------------------------------------------------------------------

    def _restore(self) -> tuple[str, bool]:
        """Loads the newest state there is; returns where it came from and whether that was another run."""
        source, forked = self.inputs.source, self.inputs.forked
        if source is not None:
            self.state = RunState(**load_checkpoint(self.engine, source))
            self.controller.state = ControllerState(**self.state.controller)
            if self.state.cursor is not None:
                self.cursor.load_state(self.state.cursor)
            if self.state.sft_cursor is not None:
                self.sft_cursor.load_state(self.state.sft_cursor)
            self._saved_step = -1 if forked else self.state.step
        if forked:
            self.controller.state.stopped = False
            self.state.best = {}  # the other run's best checkpoint is not in this folder
        report = self.policy.publish(self.state.policy_version)
        self._first_sync = report
        return ("the Hugging Face folder" if source is None else str(source)), forked

    def _save(self, is_best: bool = False) -> None:
        if self._saved_step == self.state.step:
            return
        self.state.policy_version = self.policy.version
        self.state.controller = self.controller.state.to_json()
        self.state.cursor = self.rlvr.cursor_state()
        self.state.sft_cursor = self.sft_cursor.state()
        save_checkpoint(
            self.engine,
            self.folder.checkpoints,
            self.state.step,
            asdict(self.state),
            keep=self.config.checkpoint.keep,
            is_best=is_best,
        )
        self._saved_step = self.state.step

    # -- the rest --------------------------------------------------------------------------------------------------

    def _build_stages(self) -> None:
        config, inputs = self.config, self.inputs
        stops = inputs.stop_token_ids
        self.rlvr = RLVRStage(config, self.policy, self.cursor, stops)
        self.reheat = ReheatStage(config, self.policy, self.cursor, stops, self.controller)
        self.sft = SFTStage(
            config.sft, self.engine, self.sft_cursor, self._encode_solution, config.optimizer.weight_decay
        )

    def _encode_solution(self, solution: str) -> list[int]:
        tokenizer = self.inputs.tokenizer
        return [*tokenizer(solution, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    def _decode(self, token_ids: Any) -> str:
        return self.inputs.tokenizer.decode(token_ids, skip_special_tokens=True)

    def _evaluate(self) -> dict[str, float]:
        if self.inputs.eval_prompts is None:
            return {}
        started = time.perf_counter()
        result = evaluate(self.policy, self.inputs.eval_prompts, self.config.eval, self.inputs.stop_token_ids)
        return {**result, "time/eval_s": time.perf_counter() - started}

    def _log(self, step: int, stage: Any, metrics: dict[str, float], round_: int = 0, event: str | None = None) -> None:
        if metrics:
            metrics["rollout/engine_restarts"] = float(self.policy.engine_restarts)
            self.logger.log_step(StepRecord(step, stage, round_, self.policy.version, metrics, event))

    def _announce_start(self, source: str) -> None:
        t = self.topology
        start_s = self._sampler.wait_ready() if self._sampler is not None else 0.0
        sync, rollout = self._first_sync, self.config.rollout
        engines = f"{engine_seats(t, rollout).count} engine(s),"
        if rollout.mode == "server":
            engines = f"{len(rollout.servers) or rollout.num_servers} server(s),"
        for line in (
            f"{self.config.run.name}: {self.engine.num_parameters / 1e6:.2f}M parameters from {source}",
            f"layout: tensor {t.tensor_size} x pipeline {t.pipeline_size} x data {t.data_size} on {t.device.type}; "
            f"{self.engine.backend}",
            f"vLLM: {engines} ready {start_s:.1f} s after their start; first weight sync "
            f"{sync.num_bytes / 1e6:.1f} MB in {sync.seconds * 1e3:.0f} ms{', digests verified' if sync.verified else ''}",
        ):
            self.logger.log_event(line, "dim")
