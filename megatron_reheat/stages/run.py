"""A whole run: build, restore, warm start, then RL and reheating as the controller decides, with everything on record."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_reheat.checkpoint_folder import (
    set_newer_aside,
)
from megatron_reheat.config import Config
from megatron_reheat.errors import RankLost, ReheatError
from megatron_reheat.model.carried_files import read_carried_files
from megatron_reheat.model.checkpoint import (
    install_checkpoint_fixes,
    load_checkpoint,
    load_snapshot,
)
from megatron_reheat.model.checkpoint_save import CheckpointSaver, Contents
from megatron_reheat.model.engine import Engine
from megatron_reheat.parallel import topology as parallel_topology
from megatron_reheat.parallel.seats import engine_seats
from megatron_reheat.parallel.topology import Topology
from megatron_reheat.phases import announce
from megatron_reheat.recipe import dump_config
from megatron_reheat.rewards.pool import VerifierPool
from megatron_reheat.rewards.self_check import ReferenceCheck, check_references, try_functions
from megatron_reheat.rollout.head_start import HeadStart
from megatron_reheat.run_folder import RunFolder
from megatron_reheat.run_lock import RunLock
from megatron_reheat.run_logger import RunLogger, StepRecord
from megatron_reheat.stages.borders import Borders
from megatron_reheat.stages.collect import Collector, StepAbandoned
from megatron_reheat.stages.controller import Controller, ControllerState, Verdict
from megatron_reheat.stages.engines import frozen_weights, start_frozen, start_sampler
from megatron_reheat.stages.flatten import flatten
from megatron_reheat.stages.held_out import evaluate_all
from megatron_reheat.stages.inputs import Inputs, agree_on_date, read_inputs
from megatron_reheat.stages.outcome import Stage, StepOutcome, derive_seed
from megatron_reheat.stages.policy import FrozenSampler, Policy
from megatron_reheat.stages.reference import Reference
from megatron_reheat.stages.reheat import ReheatStage
from megatron_reheat.stages.rlvr import RLVRStage
from megatron_reheat.stages.run_state import RunState, other_version, read_run_state
from megatron_reheat.stages.setbacks import not_finite, proven_checkpoint
from megatron_reheat.stages.sft import SFTStage
from megatron_reheat.stop_request import asked_to_stop, how_to_go_on, stop_requested
from megatron_reheat.types import At


def train(config: Config, head_start: HeadStart | None = None) -> bool:
    """Runs `config` to its end, from its own latest checkpoint, another run's (`run.fork_from`) or the start.

    Args:
        head_start: may have begun to start this rank's engine.

    Returns:
        False when it was asked to stop before the end (`stop_request`); everything is saved then.

    Raises:
        ReheatError: with one clear sentence; checkpoints written so far stay valid.
    """
    try:
        with RunLock(config.run.path) if _is_main() else nullcontext():
            return _train(config, head_start)
    except RuntimeError as error:
        if isinstance(error, ReheatError) or not parallel_topology.is_lost_rank(error):
            raise
        waited, reason = config.parallel.timeout_s, str(error).partition("\n")[0]
        raise RankLost(
            f"another rank ended, or did not answer within {waited:g} s (parallel.timeout_s): {reason}; "
            + how_to_go_on(RunFolder(config.run.path))
        ) from error


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _train(config: Config, head_start: HeadStart | None) -> bool:
    announce("reading the model's folder and the data")
    inputs = read_inputs(config)
    if inputs.source is not None and (done := read_run_state(inputs.source).step) >= config.total_steps:
        _say_it_is_finished(config, done)
        return True
    topology = parallel_topology.initialize(config)
    if topology.any(stop_requested()):  # before the minutes that engines and model take to start
        ended = False
        if topology.is_main:
            print(asked_to_stop(0 if inputs.source is None or inputs.forked else done), flush=True)
    else:
        inputs = agree_on_date(inputs, config, topology)
        announce("starting vLLM and the graders, trying the data's references on these")
        with Helpers(config, topology, inputs, head_start) as helpers:
            # here, because the main rank has time for it while the engine starts
            references = helpers.check_references(inputs) if topology.is_main else None
            ended = Run(config, topology, inputs, helpers, references).go()
    if not ended:
        topology.barrier()  # a launcher takes the first rank that leaves early for a failure and ends the others
    # only after success: a rank that failed must not wait for the others to leave the groups with it
    parallel_topology.finalize()
    return ended


def _say_it_is_finished(config: Config, done: int) -> None:
    """Before anything is started: neither process group nor model nor engine is needed for it."""
    total, folder = config.total_steps, RunFolder(config.run.path)
    with RunLogger(config, folder, is_main=_is_main(), start_step=done, total_steps=total) as logger:
        logger.log_event(f"nothing to do: {done} of {total} steps are done (run.steps)", "yellow")


class Helpers:
    """The vLLM engines and verifiers of a rank that leads one; None on other ranks. Closed on the way out, whatever happens.

    `frozen` are the engines of `rl.samplers`. Engines are started here, before the model is built, so that vLLM's imports run
    beside Megatron's.
    """

    def __init__(self, config: Config, topology: Topology, inputs: Inputs, head_start: HeadStart | None = None) -> None:
        leads = engine_seats(topology, config.rollout).is_leader
        if leads:
            RunFolder(config.run.path).make_folders()
        self.sampler = start_sampler(config, topology, inputs, head_start)
        self.frozen = {name: start_frozen(name, config, topology, inputs, head_start) for name in inputs.frozen}
        while_sampling = topology.is_on(config.reward.while_sampling)
        reward = config.reward.model_copy(update={"while_sampling": while_sampling})
        self.verifiers = VerifierPool(reward) if leads else None
        if self.verifiers is not None:
            self.verifiers.start()
        self._own_functions = config.reward.kind == "function"

    def check_references(self, inputs: Inputs) -> ReferenceCheck | None:
        """Grades the references of all data against themselves; None where that was not done.

        Reward functions are tried instead. Ranks without verifiers do neither.

        Raises:
            ConfigError: a reward function fails on an empty response.
        """
        if self.verifiers is None:
            return None
        data = (inputs.prompts, *inputs.held_out.values())
        if self._own_functions:
            for prompts in data:
                try_functions(self.verifiers, prompts.verifiers())
            return None
        return check_references(self.verifiers, itertools.chain(*(d.verifiers() for d in data)))

    def __enter__(self) -> Helpers:
        return self

    def __exit__(self, *_: object) -> None:
        for engine in (self.sampler, *self.frozen.values()):
            if engine is not None:
                engine.close()
        if self.verifiers is not None:
            self.verifiers.close()


class Run:
    """Holds the parts together; `go` is the loop."""

    def __init__(
        self,
        config: Config,
        topology: Topology,
        inputs: Inputs,
        helpers: Helpers,
        references: ReferenceCheck | None,
    ) -> None:
        install_checkpoint_fixes()
        self.config, self.topology, self.inputs = config, topology, inputs
        self.folder = RunFolder(config.run.path)
        announce("building the model and loading its weights")
        self.engine = Engine(config, inputs.hf_folder, topology)
        self.method = inputs.method
        self._method_name = Path(config.rl.method).name  # a user's file may lie elsewhere when the run goes on
        self._carried = read_carried_files(dump_config(config), inputs.hf_folder) if topology.is_main else None
        self.policy = Policy(self.engine, topology, helpers.sampler, helpers.verifiers, inputs.decode)
        self.frozen = {
            name: FrozenSampler(
                config.rollout,
                topology,
                helpers.frozen[name],
                helpers.verifiers,
                inputs.decode,
                frozen_weights(model, config.rollout, topology),
            )
            for name, model in inputs.frozen.items()
        }
        self.cursor, self.sft_cursor = inputs.cursors(config)
        self.controller = Controller(config.controller)
        self.reference = None
        if self.method.needs_reference(config, self.method.options):
            self.reference = Reference(self.engine, self.folder.reference, inputs.hf_folder, inputs.stop_token_ids)
        self.state = RunState()
        self.borders = None
        if config.checkpoint.borders:
            self.borders = Borders(self.engine, self.folder, inputs.hf_folder, inputs.stop_token_ids)
        self._sampler = helpers.sampler
        self._references = references
        in_background = topology.is_on(config.checkpoint.asynchronous)
        self._saver = CheckpointSaver(self.engine, self.folder.checkpoints, in_background=in_background)
        self._saved_step = -1
        self._save_is_due = False
        self._save_times: dict[str, float] = {}  # since the last step that was logged
        self._build_stages()

    def go(self) -> bool:
        """Returns whether the run came to its end; False when it was asked to stop."""
        announce("restoring, and the first weight sync as soon as vLLM is ready")
        source, forked = self._restore()
        total = self.config.total_steps
        with RunLogger(
            self.config,
            self.folder,
            is_main=self.topology.is_main,
            start_step=self.state.step,
            total_steps=total,
        ) as self.logger:
            self._announce_start(source)
            self._set_newer_aside()
            # what is flattened is measured on responses of this run
            judges = forked and self.controller.state.stage == "rlvr" and self.config.controller.action != "flatten"
            if judges and (text := self._follow(self.controller.judge_rl())):
                self.logger.log_event(text)
            if self.state.step == 0 and not self.config.sft.steps:
                if held_out := self.inputs.held_out.values():
                    announce(f"evaluating on {sum(map(len, held_out))} prompts before the first step")
                self._log(0, "rlvr", self._evaluate())
            return self._go_on_or_complete(total)

    def _go_on_or_complete(self, total: int) -> bool:
        """A checkpoint that is begun when a step fails would be lost."""
        try:
            return self._go_on(total)
        except Exception as error:
            # not a failure of this rank alone: it would wait for the others
            if self.topology.world_size == 1 or (isinstance(error, ReheatError) and error.on_every_rank):
                with suppress(ReheatError):
                    self._finish_save(wait=True)
            raise

    def _go_on(self, total: int) -> bool:
        while self.state.step < total and not self.controller.state.stopped:
            if self._should_stop():
                return self._stop()
            try:
                self._step()
            except StepAbandoned:
                return self._stop()
        self._save(wait=True)
        if self.state.skipped_in_row:
            self.logger.log_event(f"the run ends with steps that are {self._not_saved()}", "red")
        return True

    def _should_stop(self) -> bool:
        return self.topology.any(stop_requested())

    def _stop(self) -> bool:
        if self.state.step:  # else there is nothing yet that a fresh start would not make again
            self._save(wait=True)
        text = asked_to_stop(self.state.step)
        if self.state.skipped_in_row:
            text = f"asked to stop after steps that are {self._not_saved()}"
        self.logger.log_event(text)
        return False

    def _not_saved(self) -> str:
        source = f"step {self._saved_step}" if self._saved_step > 0 else "the start"
        return f"not saved ({self.state.skipped_in_row} without a finite loss); the same command goes on from {source}"

    # -- one step --------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        self._finish_save()
        step, config = self.state.step + 1, self.config
        stage = "sft" if step <= config.sft.steps else self.controller.state.stage
        round_, event, border = self.controller.state.round, None, False
        outcome, verdict = self.stages[stage].step(self._at(stage))
        if stage == "sft":
            if border := step == config.sft.steps:
                self.engine.reset_optimizer()
                self.policy.publish(step)
                if self.reference is not None:
                    self.reference.begin(keep=True)
        else:
            event = self._follow(verdict, outcome.entropy, rolled_back=outcome.rolled_back)
            if verdict is Verdict.FLATTEN:
                flattened = flatten(
                    self.policy, outcome.sampled, config.controller.reheat_to, judged_tokens=config.judged_tokens
                )
                if self.borders is not None:
                    self.borders.write(self.controller.state.round, "after")
                event = f"{event} at temperature {flattened.temperature:.3f}, which makes it {flattened.after:.3f} nats"
                outcome.metrics["flatten/temperature"] = flattened.temperature
                outcome.metrics["flatten/entropy"] = flattened.after
            border = verdict is not Verdict.CONTINUE
            self.state.rl_step += stage == "rlvr"
            self.state.entropy = self.state.entropy if outcome.entropy is None else outcome.entropy
        self._count_skips(outcome, step)
        self.state.step = step
        metrics = dict(outcome.metrics)
        last = step == config.total_steps
        scheduled = stage == "rlvr" and config.eval.every and step % config.eval.every == 0
        if border or last or scheduled:
            metrics.update(self._evaluate())
        if stage != "sft" or border or step % config.sft.log_every == 0 or step == 1:
            self._log(step, stage, metrics, round_, event)
        self.logger.write_rollouts(step, outcome.groups, self.inputs.decode, config.logging.rollouts_per_step)
        is_best = not self.state.skipped_in_row and self._is_best(metrics)
        if config.checkpoint.every and step % config.checkpoint.every == 0:
            self._save_is_due = True  # while steps are being skipped, until the first that is not
        if is_best or self._save_is_due:
            self._save(is_best)

    def _is_best(self, metrics: Mapping[str, float]) -> bool:
        """Whether this step's evaluation, if there was one, is the run's best yet; the first of equals counts."""
        name = self.config.checkpoint.keep_best
        if name is None or name not in metrics or metrics[name] <= self.state.best.get(name, -math.inf):
            return False
        self.state.best[name] = metrics[name]
        return True

    def _at(self, stage: str) -> At:
        """The step that comes next."""
        state, step = self.controller.state, self.state.step + 1
        raised = stage == "rlvr" and state.temperature_raised
        return At(
            step=step,
            rl_step=self.state.rl_step + 1,
            stage_step=state.stage_steps,
            temperature=self.config.controller.rollout_temperature if raised else self.config.rollout.temperature,
            seed=derive_seed(self.config.run.seed, step),
            entropy=self.state.entropy,
        )

    def _follow(self, verdict: Verdict, entropy: float | None = None, *, rolled_back: bool = False) -> str | None:
        """Carries out a verdict and says what happened; stages do not inherit each other's optimizer moments."""
        if verdict is Verdict.CONTINUE:
            return None
        before = self.controller.state.stage
        if entropy is None:
            entropy = self.controller.smoothed_entropy
        text = self.controller.explain(verdict, entropy, rolled_back=rolled_back)
        round_ = self.controller.state.round
        self.controller.carry_out(verdict)
        if self.borders is not None:
            self.borders.keep(max(round_, self.controller.state.round), verdict)
        if self.controller.state.stage != before or verdict is Verdict.FLATTEN:
            self.collector.forget()
            self.engine.reset_optimizer()
        return text

    def _count_skips(self, outcome: StepOutcome, step: int) -> None:
        if outcome.finite or outcome.applied:
            self.state.skipped_in_row = 0
        if outcome.finite:
            return
        if outcome.applied:
            skipped = outcome.metrics["optimizer/skipped_updates"]
            self.logger.log_event(f"step {step}: {skipped:.0f} of its updates had no finite gradient: skipped", "red")
            return
        self.state.skipped_in_row += 1
        self.logger.log_event(
            f"step {step}: loss or gradient is not finite; update skipped ({self.state.skipped_in_row} in a row)", "red"
        )
        if self.state.skipped_in_row > self.config.optimizer.max_skipped_steps:
            self._go_back(step)

    def _go_back(self, step: int) -> None:
        """To the newest checkpoint that is known to give finite steps; steps and prompts go on from here.

        Raises:
            NonFiniteLossError: there is none, or the run went back too often.
        """
        self._finish_save(wait=True)
        skipped, optimizer = self.state.skipped_in_row, self.config.optimizer
        # not into the warm start, whose steps are over
        since = self.config.sft.steps if step > self.config.sft.steps else 0
        seen = proven_checkpoint(self.folder.checkpoints, step - skipped, since=since)
        found = self.topology.share_from_all(seen)[0]  # as the main rank sees the folder, which may be a network's
        if found is None or self.state.rollbacks >= optimizer.max_rollbacks:
            source = self.inputs.source if self.inputs.forked else None
            raise not_finite(skipped, optimizer.max_skipped_steps, self.folder.checkpoints, step - skipped, source)
        self.collector.forget()
        before = self._load(found)
        self.topology.barrier()
        if self.topology.is_main:
            set_newer_aside(found)
        self.policy.publish(self.policy.version + 1)
        self.state.skipped_in_row = 0
        self.state.rollbacks += 1
        self.logger.log_event(
            f"step {step}: {skipped} steps in a row were not finite; back to the weights of step {before.step}, and on with "
            f"the prompts that come next (rollback {self.state.rollbacks} of {optimizer.max_rollbacks})",
            "red",
        )

    # -- state -----------------------------------------------------------------------------------------------------

    def _restore(self) -> tuple[str, bool]:
        """Loads the newest state there is; returns where it came from and whether that was another run."""
        source, forked = self.inputs.source, self.inputs.forked
        if source is not None:
            self.state = self._load(source, own=not forked)
            if self.state.cursor is not None:
                self.cursor.load_state(self.state.cursor)
            if self.state.sft_cursor is not None:
                self.sft_cursor.load_state(self.state.sft_cursor)
            self.collector.kept_fraction = self.state.kept_fraction
            if not forked:
                self.collector.surplus.load_state(self.state.surplus, self.cursor.dataset.take)
            self._saved_step = -1 if forked else self.state.step
        if forked:
            self.controller.state.stopped = False
            self.state.best = {}  # the other run's best checkpoint is not in this folder
            self.state.rl_step, self.state.method, self.state.reference = 0, {}, None
        self._restore_reference(is_start=source is None, goes_on=source is not None and not forked)
        self._first_syncs = {"": self.policy.publish(self.state.policy_version)}
        for name, sampler in self.frozen.items():
            self.policy.rest()  # where engines share devices, they take turns from the start
            self._first_syncs[name] = sampler.publish(0)
            sampler.rest()
        return ("the Hugging Face folder" if source is None else str(source)), forked

    def _load(self, checkpoint: Path, *, own: bool = True) -> RunState:
        """Weights, optimizer, where the controller was and, of this run's `own`, the method; returns the rest."""
        load_checkpoint(self.engine, checkpoint)
        state = read_run_state(checkpoint)
        self.controller.state = ControllerState(**state.controller)
        names = self.reheat.snapshot_names if self.controller.state.stage == "reheat" else ()
        self.reheat.go_on_with({name: load_snapshot(self.engine, checkpoint, name) for name in names})
        if own and state.method.get("name") == self._method_name:
            try:
                self.method.load_state(state.method["state"])
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                problem = f"method.state is not what {self._method_name} keeps ({type(error).__name__}: {error})"
                raise other_version(checkpoint, problem) from None
        return state

    def _restore_reference(self, *, is_start: bool, goes_on: bool) -> None:
        """Once the weights are those that the run goes on with."""
        warm = self.config.sft.steps
        if self.reference is None or self.state.step < warm:
            return
        if goes_on and self.state.step > warm:
            self.reference.resume(self.state.reference)
        else:
            self.reference.begin(keep=not is_start)

    def _set_newer_aside(self) -> None:
        """`latest` may name an older checkpoint, by the user's hand; the steps after it are made anew."""
        source = self.inputs.source
        if source is None or self.inputs.forked or not self.topology.is_main:
            return
        if places := set_newer_aside(source):
            names = ", ".join(place.name for place in places)
            self.logger.log_event(f"going on from step {self.state.step}; later checkpoints are set aside as {names}")

    def _save(self, is_best: bool = False, *, wait: bool = False) -> None:
        """Begins to save this step, once the save before is complete; with `wait` it is on disk behind it."""
        # weights from which no step is finite must not take the place of those from which one was
        if self._saved_step == self.state.step or self.state.skipped_in_row:
            self._finish_save(wait=wait)
            return
        self._finish_save()
        if self._saver.step is not None:
            self.logger.log_event(f"step {self.state.step} waits to be saved until step {self._saver.step} is", "dim")
            self._finish_save(wait=True)
        self.state.policy_version = self.policy.version
        self.state.controller = self.controller.state.to_json()
        self.state.cursor, self.state.kept_fraction = self.collector.cursor_state(), self.collector.kept_fraction
        self.state.surplus = self.collector.surplus.state()
        self.state.sft_cursor = self.sft_cursor.state()
        self.state.date = self.inputs.today.isoformat()
        self.state.method = {"name": self._method_name, "state": self.method.state()}
        # of a run that goes on without it for a while, what it was stays on record
        self.state.reference = self.state.reference if self.reference is None else self.reference.digest
        self.logger.sync()
        contents = Contents(
            self.state.step, asdict(self.state), self.config.checkpoint.keep, is_best, self._carried or {}
        )
        with self._held_up():
            self._saver.begin(contents, self.reheat.snapshots)
        self._saved_step = self.state.step
        self._save_is_due = False
        if wait or not self._saver.in_background:
            self._finish_save(wait=True)

    def _finish_save(self, *, wait: bool = False) -> None:
        """Completes the save that was begun if every rank has written it; with `wait` it is waited for."""
        if self._saver.step is None:
            return
        with self._held_up():
            saved = self._saver.finish(wait=wait)
        if saved is not None:
            self._save_times["time/save_write_s"] = saved.write_s

    @contextmanager
    def _held_up(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        spent = time.perf_counter() - started
        self._save_times["time/save_s"] = self._save_times.get("time/save_s", 0.0) + spent

    # -- the rest --------------------------------------------------------------------------------------------------

    def _build_stages(self) -> None:
        config, inputs = self.config, self.inputs
        stops = inputs.stop_token_ids
        self.collector = Collector(config, self.policy, self.cursor, stops, self._should_stop, self.frozen)
        self.reheat = ReheatStage(config, self.policy, self.cursor, stops, self.controller)
        self.stages: dict[str, Stage] = {
            "sft": SFTStage(config, self.policy, self.sft_cursor, inputs.encode),
            "rlvr": RLVRStage(config, self.policy, self.collector, self.method, self.controller, self.reference),
            "reheat": self.reheat,
        }

    def _evaluate(self) -> dict[str, float]:
        if not self.inputs.held_out:
            return {}
        started = time.perf_counter()
        result = evaluate_all(self.policy, self.inputs.held_out, self.config.eval, self.inputs.stop_token_ids)
        return {**result, "time/eval_s": time.perf_counter() - started}

    def _log(self, step: int, stage: Any, metrics: dict[str, float], round_: int = 0, event: str | None = None) -> None:
        if metrics:
            samplers = (self.policy, *self.frozen.values())
            metrics["rollout/engine_restarts"] = float(sum(s.engine_restarts for s in samplers))
            metrics |= self._save_times
            self._save_times.clear()
            self.logger.log_step(StepRecord(step, stage, round_, self.policy.version, metrics, event))

    def _announce_start(self, source: str) -> None:
        t = self.topology
        start_s = self._sampler.wait_ready() if self._sampler is not None else 0.0
        rollout = self.config.rollout
        engines = f"{engine_seats(t, rollout).count} engine(s),"
        if rollout.mode == "server":
            engines = f"{len(rollout.servers) or rollout.num_servers} server(s),"
        for line in (
            f"{self.config.run.name}: {self.engine.num_parameters / 1e6:.2f}M parameters from {source}",
            f"layout: {self.config.parallel.layout(t.data_size)} on {t.device.type}; {self.engine.backend}",
            f"vLLM: {engines} ready {start_s:.1f} s after their start; {self._first_sync('')}",
            *(
                f"{name}: {model.folder.path} in {model.dtype}, frozen, on as many; {self._first_sync(name)}"
                for name, model in self.inputs.frozen.items()
            ),
            *self.inputs.describe(),
        ):
            self.logger.log_event(line, "dim")
        if self._references is not None:
            self.logger.log_event(str(self._references), "yellow" if self._references.failed else "dim")

    def _first_sync(self, name: str) -> str:
        sync = self._first_syncs[name]
        verified = ", digests verified" if sync.verified else ""
        return f"first weight sync {sync.num_bytes / 1e6:.1f} MB in {sync.seconds * 1e3:.0f} ms{verified}"
