"""Broken recipes and model folders through the command line: each must end in one sentence that names what is wrong.

    python -m scripts.faults.broken_inputs              # all of them, as a table of kinds; status 1 if one is not right
    python -m scripts.faults.broken_inputs --show KIND  # the sentences of the kinds with KIND in their name

Every case runs `reheat` in a fork of one process that has imported everything, up to the point where a process group would be
made and an engine and the model loaded: what gets there was accepted, which is a failure. Seconds are the processor's, without
the imports; what waits for something else is ended by the clock.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from scripts.faults.broken_configs import broken_configs
from scripts.faults.broken_models import broken_models
from scripts.faults.case import Bench, Case, make_good_model
from scripts.faults.forked import ACCEPTED, NOBODY, Accepted, Ended, reheat

SLOWEST_S = 2.0  # of the processor, beyond what the good recipe takes: on a busy machine the clock says nothing
LONGEST = 700  # characters of a sentence, without the paths of this machine
# how a sentence says what to do; numbers out of range say which ones are in it
FIX = re.compile(
    r"; |should (be|have)|must (be|have|hold|not|fit|lie)|did you mean|known keys|use |set |needs |supported"
    r"|available: |keep one|required|from [\d.]+ to |\(e\.g\. |and nothing else|no such config file|loop: "
    r"|need ports within|is outside 0 to|holds no records|does not render"
)


@dataclass(frozen=True)
class Outcome:
    case: Case
    ended: Ended
    executed: bool

    @property
    def sentence(self) -> str:
        return self.ended.sentence

    def problems(self, own_s: float) -> list[str]:
        if self.ended.status is None:
            return ["hangs"]
        if self.ended.status in (0, ACCEPTED):
            return ["accepted"]
        found = []
        if not self.ended.is_one_sentence:
            found.append("not one sentence")
        elif len(re.sub(r"/\S+", "", self.sentence)) > LONGEST:
            found.append("too long")
        elif not all(c.isprintable() for c in self.sentence):
            found.append("control characters")
        if not any(word in self.sentence for word in self.case.words):
            found.append("names neither key nor file")
        if not FIX.search(self.sentence):
            found.append("no fix")
        if self.ended.seconds > own_s + SLOWEST_S:
            found.append("slow")
        if self.executed:
            found.append("CODE EXECUTED")
        return found


def run_case(case: Case, good_model: Path, folder: Path) -> Outcome:
    bench = Bench(folder, good_model, copies_model=case.copies_model)
    argv = [str(argument) for argument in case.make(bench)]
    if case.without_rights:
        for path in (folder, folder / "model"):
            if path.is_dir() and path.stat().st_mode & 0o700:
                path.chmod(0o777)
    ended = reheat(argv, folder, _accepting, NOBODY if case.without_rights else None)
    return Outcome(case, ended, bench.canary.exists())


@contextlib.contextmanager
def _accepting() -> Iterator[None]:
    """Where an engine or a process group would be started, a command has accepted its input."""
    from megatron_reheat.commands import serve
    from megatron_reheat.parallel import topology
    from megatron_reheat.rollout import embedded

    accept = mock.Mock(side_effect=Accepted)
    with (
        mock.patch.object(topology, "initialize", accept),
        mock.patch.object(embedded.EmbeddedEngine, "__init__", accept),
        mock.patch.object(serve, "ServerProcess", accept),
    ):
        yield


def prepare(root: Path) -> tuple[Path, float]:
    """The good model, and the seconds that the good recipe takes; all imports are done by then.

    Raises:
        RuntimeError: the good recipe is refused.
    """
    model = make_good_model(root / "model")
    root.chmod(0o755)
    import datasets  # noqa: F401
    import reasoning_gym  # noqa: F401
    from pyarrow import parquet  # noqa: F401

    from megatron_reheat.cluster import preflight, slurm  # noqa: F401
    from megatron_reheat.commands import convert, serve  # noqa: F401
    from megatron_reheat.evaluation import evaluate  # noqa: F401
    from megatron_reheat.recipe import load_config
    from megatron_reheat.rollout import load_check, vllm_version  # noqa: F401
    from megatron_reheat.stages import run

    bench = Bench(root / "warm", model, copies_model=False)
    run.read_inputs(load_config(bench.recipe()))
    good = Case("good", "good", (), lambda bench: ["train", bench.recipe()])
    outcome = run_case(good, model, root / "good")
    if outcome.ended.status != ACCEPTED:
        raise RuntimeError(f"the good recipe is refused: {outcome.ended.errors}")
    return model, outcome.ended.seconds


def run_all(cases: Iterable[Case], root: Path) -> tuple[list[Outcome], float]:
    model, own_s = prepare(root)
    return [run_case(case, model, root / str(number)) for number, case in enumerate(cases)], own_s


def print_table(outcomes: Sequence[Outcome], own_s: float) -> None:
    print(f"{'kind':<30} {'cases':>6} {'sentence':>9} {'named':>6} {'fix':>5} {'slowest s':>10} {'code ran':>9}")
    kinds = dict.fromkeys(outcome.case.kind for outcome in outcomes)
    for kind in (*kinds, None):
        own = [outcome for outcome in outcomes if kind in (outcome.case.kind, None)]
        problems = [outcome.problems(own_s) for outcome in own]

        def without(*names: str, problems: list[list[str]] = problems) -> int:
            return sum(not {*names, "hangs", "accepted"} & set(p) for p in problems)

        sentences = without("not one sentence", "too long", "control characters")
        named, fixed = without("names neither key nor file"), without("no fix")
        slowest, ran = max(outcome.ended.seconds for outcome in own), sum(outcome.executed for outcome in own)
        print(f"{kind or 'all':<30} {len(own):>6} {sentences:>9} {named:>6} {fixed:>5} {slowest:>10.2f} {ran:>9}")
    print(f"(the good recipe takes {own_s:.2f} s)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", metavar="KIND", help="print every sentence of these kinds")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every N-th case")
    parser.add_argument("--only", choices=("configs", "models"))
    arguments = parser.parse_args()
    cases = [
        *(broken_configs() if arguments.only != "models" else ()),
        *(broken_models() if arguments.only != "configs" else ()),
    ]
    if arguments.show is not None:
        cases = [case for case in cases if arguments.show in case.kind]
    with tempfile.TemporaryDirectory() as root:
        outcomes, own_s = run_all(cases[:: arguments.every], Path(root))
    wrong = [(outcome, found) for outcome in outcomes if (found := outcome.problems(own_s))]
    for outcome in outcomes if arguments.show is not None else ():
        print(f"[{outcome.case.kind}: {outcome.case.name}] {outcome.sentence[:1000]}")
    for outcome, found in wrong:
        errors, seconds = outcome.ended.errors.strip(), outcome.ended.seconds
        shown = errors if len(errors) < 500 else f"{errors[:150]} ... {errors[-250:]}"
        print(f"WRONG [{outcome.case.kind}: {outcome.case.name}] {', '.join(found)} ({seconds:.1f} s): {shown}")
    print_table(outcomes, own_s)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
