"""One seed: a policy is collapsed, reheated in several ways, cooled again, and looked at before and after.

Every run is an ordinary recipe, yaml/countdown_cpu.yaml with a few keys changed. A run that is finished is read, not repeated.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from examples.countdown_cpu.demo import make_inputs
from examples.elsewhere import ROOT, Sections, moved
from examples.over_seeds import rounded
from megatron_reheat.analysis.rounds import OVERALL
from megatron_reheat.commands.convert import find_in_run, to_hf
from megatron_reheat.config import Config, ModelConfig
from megatron_reheat.data.tokenizer import end_token_id
from megatron_reheat.microscope.displacement import displacement
from megatron_reheat.microscope.measure import measure
from megatron_reheat.microscope.probe import read_probe, rollout_files
from megatron_reheat.recipe import merged
from megatron_reheat.run_folder import RunFolder, read_segments
from megatron_reheat.stages.inputs import read_model
from megatron_reheat.stages.series import RunSeries

RECIPE = ROOT / "yaml" / "countdown_cpu.yaml"
START, TRUNK = "start", "trunk"
TEMPERATURES = (1.2, 1.5, 2.0)  # of the teacher, the paper's first
COOLING_TEMPERATURE = 0.8  # the paper's
NUCLEI = (0.7, 1.0)  # top-p of evaluations: the paper's, and all that the policy says
# one core a process; a verifier shares it with trainer and engine
ALWAYS: Sections = {
    "parallel": {"data": 1},
    "reward": {"timeout_s": 30},
    "checkpoint": {"every": 100, "keep": 1},
    "logging": {"console": False, "tensorboard": False, "rollouts_per_step": 0},
}
QUICK: Sections = {
    "sft": {"steps": 150, "batch_size": 128, "warmup_steps": 10},
    "rl": {"prompts_per_step": 16, "group_size": 4},
    "reheat": {"prompts_per_step": 128, "lr": 1e-4},
    # entropies of a policy that has learnt little; all happens at once
    "controller": {"collapse_below": 5.0, "reheat_to": 6.0, "runaway_entropy": 9.0, "smoothing_steps": 2},
    "eval": {"num_samples": 2},
}
# nats that nothing here reaches: a stage that goes on until the run ends
NO_END: Sections = {"reheat_to": 50.0, "runaway_entropy": 100.0, "runaway_jump": 100.0, "max_reheat_steps": 10_000}

Record = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """`steps` are those of a trajectory."""

    runs: Path
    results: Path
    quick: bool
    steps: int

    def place(self, seed: int) -> Path:
        return self.runs / f"seed-{seed}"

    def config(self, seed: int, name: str, sections: Sections) -> Config:
        run = {"run": {"seed": seed, "name": name}}
        quick = (QUICK,) if self.quick else ()
        return moved(RECIPE, self.place(seed), ALWAYS, *quick, run, sections)


@dataclass(frozen=True)
class Score:
    """Held-out problems, at temperature 1."""

    avg: float
    pass_: float
    entropy: float

    @classmethod
    def of(cls, records: Sequence[Record]) -> Score:
        """The last evaluation among `records`."""
        last = next(r for r in reversed(records) if "eval/avg_at_k" in r)
        return cls(last["eval/avg_at_k"], last["eval/pass_at_k"], last["eval/entropy"])


@dataclass(frozen=True)
class Measurements:
    """What came of one seed. Entropies are nats of a step's rollouts, before its update; so are gradient norms that step's.

    `target_step` is the number of updates after which the entropy was above the target, None where it never was; what is
    `reheated` is the policy after these, or after all. `microscope` compares the collapsed policy with it, on its own rollouts.
    `cooled_left` is how far the cooled policy is from the collapsed one, as a share of how far the reheated one is.
    """

    seed: int
    k: int
    steps: int
    warm: Score
    collapsed: Score
    collapse_step: int
    entropies: dict[str, list[float]]
    target_step: int | None
    before: dict[str, Score]
    reheated: dict[str, Score]
    forward_norms: list[float]
    reverse_norms: list[float]
    uncollapsed: list[float]
    guarded: list[float]
    guard_event: str
    guard_rolled_back: bool
    microscope: dict[str, float]
    cka: dict[str, float | None]
    cooling: list[float]
    cooled_steps: int | None
    cooled_cosine: float
    cooled_left: float

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"seed-{self.seed}.json"
        path.write_text(json.dumps(rounded(asdict(self)), indent=1) + "\n")
        return path

    @classmethod
    def read(cls, path: Path) -> Measurements:
        values = json.loads(path.read_text())
        for key in ("warm", "collapsed"):
            values[key] = Score(**values[key])
        for key in ("before", "reheated"):
            values[key] = {name: Score(**score) for name, score in values[key].items()}
        return cls(**values)


@dataclass(frozen=True)
class Seed:
    """A task of `examples.shares`."""

    settings: Settings
    seed: int

    @property
    def is_done(self) -> bool:
        path = self.settings.results / f"seed-{self.seed}.json"
        return path.exists() and Measurements.read(path).steps == self.settings.steps

    def do(self, series: RunSeries) -> str:
        make_inputs(self.settings.place(self.seed), self.seed)
        path = SeedRuns(self.settings, self.seed, series).measurements().write(self.settings.results)
        return f"{path} is written"

    def failed(self, error: Exception) -> None:
        """The same command tries it again."""


class SeedRuns:
    """The runs of one seed, on one series' engine."""

    def __init__(self, settings: Settings, seed: int, series: RunSeries) -> None:
        self.settings, self.seed, self.series = settings, seed, series
        self.folder = settings.place(seed)
        plain = settings.config(seed, TRUNK, {})
        self.controller, self.k = plain.controller, plain.eval.num_samples

    def measurements(self) -> Measurements:
        trunk, start = self.collapse(), self.run(START, run={"steps": 0})
        forward = self.reheat(TEMPERATURES[0], "forward", self.settings.steps)
        entropies = {str(TEMPERATURES[0]): values_of(forward, "entropy/mean")}
        target_step = first_beyond(entropies[str(TEMPERATURES[0])], self.controller.reheat_to)
        length = self.settings.steps if target_step is None else max(1, target_step)
        for temperature in TEMPERATURES[1:]:
            others = self.reheat(temperature, "forward", length + 1)
            entropies[str(temperature)] = values_of(others, "entropy/mean")
        reverse = self.reheat(TEMPERATURES[0], "reverse", length)

        self.run("reheated", self.forked(length, {}), logging={"rollouts_per_step": 64})
        collapsed, reheated = self.exported(TRUNK), self.exported("reheated")
        rises = [b - a for a, b in zip(entropies["1.2"], entropies["1.2"][1 : length + 1], strict=False)]
        uncollapsed, guarded, guard = self.uncollapsed(2 * max(rises))
        return Measurements(
            seed=self.seed,
            k=self.k,
            steps=self.settings.steps,
            warm=Score.of(start),
            collapsed=Score.of(trunk),
            collapse_step=trunk[-1]["step"],
            entropies=entropies,
            target_step=target_step,
            before={str(p): self.scored(collapsed, "collapsed", p) for p in NUCLEI},
            reheated={str(p): self.scored(reheated, "reheated", p) for p in NUCLEI},
            forward_norms=values_of(forward, "optimizer/grad_norm")[:length],
            reverse_norms=values_of(reverse, "optimizer/grad_norm"),
            uncollapsed=uncollapsed,
            guarded=guarded,
            guard_event=str(guard.get("event") or ""),
            guard_rolled_back=bool(guard.get("reheat/rolled_back")),
            **self.compared(collapsed, reheated),
            **self.cooled(collapsed, reheated, entropies["1.2"][0]),
        )

    def collapse(self) -> list[Record]:
        """RL until the entropy collapses, which the other runs go on from.

        Raises:
            RuntimeError: it did not.
        """
        self.run(START, run={"steps": 0})
        trunk = self.run(TRUNK, run={"fork_from": self.place(START), **({"steps": 4} if self.settings.quick else {})})
        self.rl_steps = sum(r["stage"] == "rlvr" for r in trunk)
        if trunk[-1].get("event") is None:
            raise RuntimeError(f"seed {self.seed} did not collapse within run.steps; raise it in {RECIPE}")
        return trunk

    # -- runs ------------------------------------------------------------------------------------------------------

    def place(self, name: str) -> str:
        return str(self.folder / name)

    def run(self, name: str, sections: Sections | None = None, **more: Mapping[str, Any]) -> list[Record]:
        """The steps of the run's own."""
        config = self.settings.config(self.seed, name, merged(sections or {}, more))
        path = config.run.path
        saved = RunFolder(path).saved_step
        if saved is None or not (saved == config.total_steps or _stopped(own_steps(path)[-1], saved)):
            self.series.train(config)
        return own_steps(path)

    def forked(self, steps: int, controller: Mapping[str, Any], reheat: Mapping[str, Any] | None = None) -> Sections:
        """`steps` of reheating from the collapsed policy."""
        run = {"fork_from": self.place(TRUNK), "steps": self.rl_steps + steps}
        return {"run": run, "controller": {"action": "reheat", **controller}, "reheat": dict(reheat or {})}

    def reheat(self, temperature: float, direction: str, steps: int) -> list[Record]:
        """A trajectory that nothing ends."""
        teacher = {"teacher_temperature": temperature, "direction": direction}
        return self.run(f"{direction}-{temperature:g}", self.forked(steps, NO_END, teacher))

    def uncollapsed(self, jump: float) -> tuple[list[float], list[float], Record]:
        """Reheating where nothing has collapsed, from the warm start: without a guard, then with one that takes a rise of more
        than `jump` nats a step for a run-away."""
        at_once = {"action": "reheat", "collapse_below": 40.0, "smoothing_steps": 1, "cooldown_steps": 10_000}
        run = {"fork_from": self.place(START), "steps": 1 + self.settings.steps}
        free = values_of(self.run("uncollapsed", run=run, controller={**NO_END, **at_once}), "entropy/mean")
        jumps = [i for i, (a, b) in enumerate(itertools.pairwise(free), 1) if b - a > jump]
        if not jumps:
            return free, [], {}
        run = {**run, "steps": 1 + jumps[0] + 2}  # and one of RL behind it
        records = self.run("guarded", run=run, controller={**NO_END, **at_once, "runaway_jump": jump})
        reheating = [r for r in records if r["stage"] == "reheat"]
        return free, values_of(reheating, "entropy/mean"), reheating[-1]

    # -- policies --------------------------------------------------------------------------------------------------

    def exported(self, name: str) -> Path:
        """The run's last policy as a Hugging Face folder."""
        out = self.folder / f"{name}-hf"
        if not out.exists():
            to_hf(self.folder / name, out, verify=False)
        return out

    def scored(self, policy: Path, name: str, top_p: float) -> Score:
        evaluation = self.run(
            f"{name}-top-p-{top_p:g}",
            model={"hf_path": str(policy)},
            sft={"steps": 0},
            eval={"top_p": top_p},
            run={"steps": 0},
        )
        return Score.of(evaluation)

    def compared(self, collapsed: Path, reheated: Path) -> dict[str, Any]:
        found = find_in_run(self.place("reheated"), "latest")
        assert found is not None
        model = read_model(ModelConfig(hf_path=str(reheated)), chat=False)
        end = end_token_id(model.tokenizer, model.stop_token_ids)
        probe = read_probe(rollout_files(*found), model.tokenizer, end, model.hf.max_position_embeddings, 1024)
        measured = measure(collapsed, reheated, probe, 2048, logging.getLogger(__name__).debug)
        means = asdict(measured.tokens.all)
        return {"microscope": {k: float(v) for k, v in means.items()}, "cka": measured.cka or {}}

    def cooled(self, collapsed: Path, reheated: Path, entropy: float) -> dict[str, Any]:
        """From the reheated policy back to the collapsed one's `entropy`, by the sharpened teacher and the reverse KL."""
        sections: Sections = {
            "model": {"hf_path": str(reheated)},
            "sft": {"steps": 0},
            # the controller sees an RL step first, which is to change nothing
            "optimizer": {"lr": 1e-12},
            "reheat": {"teacher_temperature": COOLING_TEMPERATURE, "direction": "reverse"},
            "controller": {**NO_END, "action": "cool", "cool_above": 1e-5, "cool_to": 1e-6, "smoothing_steps": 1},
        }

        def run(name: str, steps: int) -> list[Record]:
            return self.run(name, sections, run={"steps": 1 + steps})

        entropies = values_of(run("cooling", self.settings.steps), "entropy/mean")
        steps = next((i for i, value in enumerate(entropies) if value < entropy), None)
        updates = self.settings.steps if steps is None else steps
        run("cooled", max(updates, 1))
        cooled = self.exported("cooled")
        back = {d.block: d for d in displacement(reheated, cooled, collapsed)}[OVERALL]
        left = {d.block: d for d in displacement(collapsed, cooled)}[OVERALL]
        away = {d.block: d for d in displacement(collapsed, reheated)}[OVERALL]
        return {
            "cooling": entropies,
            "cooled_steps": steps,
            "cooled_cosine": -float(back.cosine or 0.0),  # with the way that reheating went
            "cooled_left": left.moved / away.moved,
        }


def own_steps(run: Path) -> list[Record]:
    """Without those of the run that it was forked from."""
    return [r for r in read_segments(run)[-1].records if "stage" in r]


def _stopped(last: Record, saved: int) -> bool:
    """Whether the controller ended the run at its last checkpoint."""
    return last["step"] == saved and "stopping" in str(last.get("event") or "")


def values_of(records: Sequence[Record], metric: str) -> list[float]:
    """Of the reheating steps."""
    return [r[metric] for r in records if r["stage"] == "reheat" and r.get(metric) is not None]


def first_beyond(entropies: Sequence[float], target: float) -> int | None:
    """After how many updates the entropy was above the target; None if after none."""
    return next((i for i, value in enumerate(entropies) if value > target), None)
