"""Damaged checkpoints through the command line: one sentence that names the file and the newest whole checkpoint.

    python -m scripts.faults.damaged_checkpoints              # all of them, as a table of kinds; status 1 if one is not right
    python -m scripts.faults.damaged_checkpoints --show KIND  # the sentences of kinds with KIND in their name

Two ranks save twice and leave a run folder. Every damage of `damages` is done to a copy of it, from which then the run goes on
(`reheat train`), another one forks (`run.fork_from`) and the weights are converted (`reheat convert`), as far as the damage
concerns them: with real Megatron-Core on one rank, each in a fork of one process. Training ends where its first step would
begin; no vLLM is started, which reads none of these files. What is refused must be as it was before.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import stat
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_reheat.config import Config
from megatron_reheat.ports import free_port
from megatron_reheat.recipe import dump_config, load_config
from megatron_reheat.run_folder import RunFolder
from scripts.faults.case import Bench, make_good_model
from scripts.faults.damages import NEWEST, Damage, damages
from scripts.faults.forked import ACCEPTED, Accepted, Ended, reheat

RUN, ARM = "run", "arm"


@dataclass(frozen=True)
class Outcome:
    damage: Damage
    command: str
    ended: Ended
    executed: bool
    changed: Sequence[str]
    went_on_from: int | None

    @property
    def problems(self) -> list[str]:
        damage, found = self.damage, []
        if self.executed:
            found.append("CODE EXECUTED")
        if self.ended.status is None:
            return [*found, "hangs"]
        if damage.goes_on is not None:
            if self.went_on_from not in (damage.goes_on, None) or self.ended.status not in (0, ACCEPTED):
                found.append("refused" if self.went_on_from is None else f"goes on from {self.went_on_from}")
            return found
        if self.ended.status in (0, ACCEPTED):
            return [*found, "accepted"]
        if not self.ended.is_one_sentence:
            return [*found, "not one sentence"]
        if not any(word in self.ended.sentence for word in damage.words):
            found.append("does not name the file")
        if damage.whole and f"/{damage.whole}" not in self.ended.sentence:
            found.append("does not name the whole one")
        return found + [f"changed {name}" for name in self.changed]


# -- a run folder ------------------------------------------------------------------------------------------------------


def make_run(bench: Bench, recipe: Path) -> None:
    """What a run of two ranks leaves that was ended while it reheated; each rank is a fork of this process."""
    port, ranks = str(free_port()), []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            status = 1
            try:
                _save_twice(load_config(recipe, ["parallel.tensor=2"]))
                status = 0
            except BaseException:
                traceback.print_exc()
            os._exit(status)
        ranks.append(pid)
    if any(os.waitpid(pid, 0)[1] for pid in ranks):
        raise RuntimeError("the run could not be made")


def _save_twice(config: Config) -> None:
    from megatron_reheat.model.carried_files import read_carried_files
    from megatron_reheat.model.checkpoint import install_checkpoint_fixes
    from megatron_reheat.model.checkpoint_save import save_checkpoint
    from megatron_reheat.model.engine import Engine
    from megatron_reheat.parallel import topology as parallel_topology
    from megatron_reheat.run_logger import RunLogger, StepRecord
    from megatron_reheat.stages.inputs import read_inputs
    from megatron_reheat.stages.reference import Reference
    from megatron_reheat.stages.run_state import RunState

    inputs, folder = read_inputs(config), RunFolder(config.run.path)
    topology = parallel_topology.initialize(config)
    install_checkpoint_fixes()
    engine = Engine(config, inputs.hf_folder, topology)
    with RunLogger(config, folder, is_main=topology.is_main, start_step=0) as logger:
        reference = Reference(engine, folder.reference, inputs.hf_folder, inputs.stop_token_ids)
        _move(engine)
        reference.begin(keep=True)
        cursor, sft_cursor = inputs.cursors(config)
        for step in (1, 2, 3, 4):
            cursor.next(2)
            logger.log_step(StepRecord(step, "rlvr", 0, step, {"entropy/mean": 1.0}))
            if step % 2:
                continue
            _move(engine)
            state = RunState(
                step=step, policy_version=step, rl_step=step, entropy=1.0, cursor=cursor.state(),
                sft_cursor=sft_cursor.state(), date="2026-01-02", reference=reference.digest,
                controller={"stage": "reheat", "round": 1},
                method={"name": "adaptive_entropy", "state": {"coef": 0.01 * step}},
            )  # fmt: skip
            save_checkpoint(
                engine, folder.checkpoints, step, asdict(state), keep=9, is_best=step == 2,
                snapshots={"last_good": engine.masters.copy()},
                carried=read_carried_files(dump_config(config), inputs.hf_folder),
            )  # fmt: skip


def _move(engine: Any) -> None:
    import torch

    with torch.no_grad():
        for _, parameter in engine.module.named_parameters():
            parameter.add_(0.01)
    engine.optimizer.reload_model_params()


@contextlib.contextmanager
def _accepting() -> Iterator[None]:
    """`reheat train` without an engine, up to its first step."""
    from megatron_reheat.rollout.rollout_engine import SyncReport
    from megatron_reheat.stages import run

    def begin(self: Any) -> None:
        print(f"went on from step {self.state.step}", flush=True)
        raise Accepted

    published = SyncReport(0, 0, 0, 0.0, verified=True)
    with (
        mock.patch.object(run, "Helpers", _NoHelpers),
        mock.patch.object(run.Policy, "publish", lambda *_: published),
        mock.patch.object(run.Run, "_announce_start", lambda *_: None),
        mock.patch.object(run.Run, "_should_stop", begin),
    ):
        yield


class _NoHelpers:
    """In the place of an engine and of graders, which are not asked anything."""

    frozen: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, *_: object) -> None:
        self.sampler = self.verifiers = mock.sentinel.nobody

    def check_references(self, _: object) -> None:
        return None

    def __enter__(self) -> _NoHelpers:
        return self

    def __exit__(self, *_: object) -> None:
        return None


# -- the damages -------------------------------------------------------------------------------------------------------


class Trunk:
    """The run folder that all damages are done to copies of."""

    def __init__(self, root: Path) -> None:
        """
        Raises:
            RuntimeError: something does not go on from it, as it is.
        """
        bench = Bench(root / "trunk", make_good_model(root / "model"), copies_model=False)
        self._root, self._bench = root, bench
        bench.tree["logging"] = {"console": False, "tensorboard": False}
        bench.tree["run"] |= {"folder": str(root / "trunk" / "{name}")}
        bench.tree["rl"] = {"kl_coef": 0.01, "method": "adaptive_entropy", "prompts_per_step": 2}
        self.recipe = bench.recipe()
        _import_everything(self.recipe)
        make_run(bench, self.recipe)
        self.run = root / "trunk" / RUN
        whole = Damage("none", "none", lambda run, canary: None, goes_on=4)
        for outcome in self.outcomes(whole, root / "whole"):
            if outcome.problems or outcome.ended.status not in (0, ACCEPTED):
                raise RuntimeError(f"{outcome.command} of a whole run: {outcome.problems} {outcome.ended.errors}")

    def outcomes(self, damage: Damage, folder: Path) -> Iterator[Outcome]:
        """What each command makes of it."""
        for command in damage.commands:
            here = folder / command
            run, canary = Path(shutil.copytree(self.run, here / RUN, symlinks=True)), here / "executed"
            damage.make(run, canary)
            before = contents(run)
            ended = reheat(self._arguments(command, here), here, _accepting)
            after = contents(run)
            changed = [name for name, content in before.items() if after.get(name) != content]
            said = ended.output.rpartition("went on from step ")[2].split()
            went_on_from = int(said[0]) if ended.status == ACCEPTED else None
            yield Outcome(damage, command, ended, canary.exists(), changed, went_on_from)
            shutil.rmtree(here)

    def _arguments(self, command: str, here: Path) -> list[str]:
        train = ["train", str(self.recipe), f"run.folder={here}/{{name}}"]
        return {
            "resume": train,
            "fork": [*train, f"run.name={ARM}", f"run.fork_from={here / RUN}"],
            "convert": ["convert", "--no-verify", "--to-hf", str(here / RUN), str(here / "out")],
            "report": ["report", str(here / RUN)],
        }[command]


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every file below `folder` that can be read to its end, by its path; what else is there, by its kind."""
    found: dict[str, bytes | str] = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        name = str(path.relative_to(folder))
        if stat.S_ISREG(status.st_mode) and status.st_size < 1 << 30:
            found[name] = path.read_bytes()
        else:
            found[name] = os.readlink(path) if path.is_symlink() else str(stat.S_IFMT(status.st_mode))
    return found


def _import_everything(recipe: Path) -> None:
    import matplotlib.pyplot  # noqa: F401
    from pyarrow import parquet  # noqa: F401

    from megatron_reheat.analysis import report  # noqa: F401
    from megatron_reheat.commands import convert  # noqa: F401
    from megatron_reheat.parallel import cpu
    from megatron_reheat.rollout import load_check, vllm_version  # noqa: F401
    from megatron_reheat.stages import inputs, run  # noqa: F401

    cpu.install()
    inputs.read_inputs(load_config(recipe))


def print_table(outcomes: Sequence[Outcome]) -> None:
    columns = {"damages": 7, "tries": 5, "goes on": 7, "sentence": 8, "right": 5, "slowest s": 9, "code ran": 8}
    print(f"{'kind':<36} " + " ".join(f"{title:>{width}}" for title, width in columns.items()))
    for kind in (*dict.fromkeys(outcome.damage.kind for outcome in outcomes), None):
        own = [outcome for outcome in outcomes if kind in (outcome.damage.kind, None)]
        ran = sum(outcome.executed for outcome in own)
        print(
            f"{kind or 'all':<36} {len({id(outcome.damage) for outcome in own}):>7} {len(own):>5} "
            f"{sum(outcome.ended.status in (0, ACCEPTED) for outcome in own):>7} "
            f"{sum(outcome.ended.is_one_sentence for outcome in own):>8} {sum(not outcome.problems for outcome in own):>5} "
            f"{max(outcome.ended.seconds for outcome in own):>9.2f} {ran:>8}"
        )


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", nargs="+", metavar="KIND", help="print every sentence of these kinds")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every N-th damage")
    parsed = parser.parse_args(arguments)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as root:
        trunk = Trunk(Path(root))
        chosen = damages(trunk.run / "checkpoints" / NEWEST)
        if parsed.show is not None:
            chosen = [damage for damage in chosen if any(kind in damage.kind for kind in parsed.show)]
        for number, damage in enumerate(chosen[:: parsed.every]):
            for outcome in trunk.outcomes(damage, Path(root) / str(number)):
                outcomes.append(outcome)
                title = f"[{damage.kind}: {damage.name}: {outcome.command}]"
                if parsed.show is not None:
                    print(title, outcome.ended.sentence[:1000] or outcome.ended.output[-100:].strip(), flush=True)
                if outcome.problems:
                    print(
                        f"WRONG {title} {', '.join(outcome.problems)}: {outcome.ended.errors.strip()[-600:]}",
                        flush=True,
                    )
    print_table(outcomes)
    return 1 if any(outcome.problems for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
