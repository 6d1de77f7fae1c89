"""The seven signatures of reheating in arXiv 2606.00755, and whether the seeds show them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import NamedTuple

from examples.over_seeds import Mean
from examples.signatures.measurements import TEMPERATURES, Measurements

FIRST = str(TEMPERATURES[0])
HARM = 0.02  # of avg@k: what "within noise" may cost at most
SAME_ENTROPY = 0.01  # nats: the paper's "nearly the same trajectory"
NEAR_ONE = 0.95  # of a share that is to be about 1
SMALL_KL = 0.01  # nats; the paper's are about 0.002
RUN_AWAY = 2.0  # times the entropy at the start
UNDONE = 0.8  # of the way; the paper's cosine is -0.88


class Verdict(StrEnum):
    YES = "reproduced"
    PARTLY = "partly"
    NO = "not reproduced"
    OPEN = "too few seeds"


class Signature(NamedTuple):
    """`here` is what was measured, means over seeds with Student's 95% intervals."""

    name: str
    paper: str
    here: str
    verdict: Verdict


def signatures(seeds: Sequence[Measurements]) -> list[Signature]:
    """In the order a to g."""
    return [
        judge(list(seeds)) for judge in (_collapse, _target, _temperatures, _directions, _runaway, _nearness, _cooling)
    ]


def markdown(seeds: Sequence[Measurements]) -> str:
    """The table, in the form of a README."""
    lines = ["| signature | paper | here | verdict |", "|---|---|---|---|"]
    for name, paper, here, verdict in signatures(seeds):
        lines.append(f"| {name} | {paper} | {here} | {verdict} |")
    return "\n".join(lines) + "\n"


def _of(seeds: Sequence[Measurements], value: Callable[[Measurements], float]) -> Mean:
    return Mean.of([value(m) for m in seeds])


def _is_above(mean: Mean, bound: float) -> Verdict:
    """Whether the whole interval is, or the mean at least."""
    if math.isinf(mean.half):
        return Verdict.OPEN
    if mean.low > bound:
        return Verdict.YES
    return Verdict.PARTLY if mean.value > bound else Verdict.NO


def _all(verdicts: Sequence[Verdict]) -> Verdict:
    """Of a signature with several parts."""
    if Verdict.OPEN in verdicts:
        return Verdict.OPEN
    kinds = set(verdicts)
    return kinds.pop() if len(kinds) == 1 else Verdict.PARTLY


def _in_all(count: int, seeds: Sequence[Measurements]) -> Verdict:
    return Verdict.YES if count == len(seeds) else Verdict.PARTLY if count else Verdict.NO


def _mirrored(mean: Mean) -> Mean:
    return Mean(-mean.value, mean.half)


def _collapse(seeds: list[Measurements]) -> Signature:
    avg = _of(seeds, lambda m: m.collapsed.avg - m.warm.avg)
    pass_ = _of(seeds, lambda m: m.collapsed.pass_ - m.warm.pass_)
    entropy = _of(seeds, lambda m: m.collapsed.entropy - m.warm.entropy)
    k = seeds[0].k
    return Signature(
        "a: RL collapses the policy",
        "avg@8 rises, pass@8 and entropy fall",
        f"avg@{k} {_signed(avg)}, pass@{k} {_signed(pass_)}, entropy {_signed(entropy)} nats",
        _all([_is_above(avg, 0.0), _is_above(_mirrored(pass_), 0.0)]),
    )


def _target(seeds: list[Measurements]) -> Signature:
    steps = [m.target_step for m in seeds if m.target_step is not None]
    parts, verdicts = [], []
    for top_p, name in (("0.7", "avg at top-p 0.7"), ("1.0", "at 1.0")):
        change = _of(seeds, lambda m, p=top_p: m.reheated[p].avg - m.before[p].avg)
        parts.append(f"{name} {_signed(change)}")
        # that a few seeds cannot tell a loss from none does not show that there is none
        verdicts.append(_is_above(change, -HARM))
    verdicts.append(_in_all(len(steps), seeds))
    took = f" ({Mean.of(steps).show(0)} steps)" if steps else ""
    return Signature(
        "b: the target is reached, the answers stay right",
        "6 to 15 steps; avg@8 within noise",
        f"reached in {len(steps)} of {len(seeds)} seeds{took}; {', '.join(parts)}",
        _all(verdicts),
    )


def _temperatures(seeds: list[Measurements]) -> Signature:
    def spread(m: Measurements) -> float:
        """Between the teachers, where the first one's policy is at the target."""
        step = m.steps - 1 if m.target_step is None else m.target_step
        ends = [entropies[min(step, len(entropies) - 1)] for entropies in m.entropies.values()]
        return max(ends) - min(ends)

    mean = _of(seeds, spread)
    gain = _of(seeds, lambda m: max(m.entropies[FIRST][: (m.target_step or m.steps) + 1]) - m.entropies[FIRST][0])
    return Signature(
        f"c: teachers of T {', '.join(f'{t:g}' for t in TEMPERATURES)} give nearly the same trajectory",
        f"final entropies within {SAME_ENTROPY} nats",
        f"within {mean.show(3)} nats at the target, of {gain.show(3)} gained",
        _is_above(_mirrored(mean), -SAME_ENTROPY),
    )


def _directions(seeds: list[Measurements]) -> Signature:
    first = _of(seeds, lambda m: m.forward_norms[0] / m.reverse_norms[0])
    whole = _of(seeds, lambda m: sum(m.forward_norms) / sum(m.reverse_norms))
    return Signature(
        "d: the forward KL's gradient is larger than the reverse's",
        "larger norm",
        f"{first.show(2)} times at the same weights and rollouts, {whole.show(2)} times over the stage",
        _is_above(first, 1.0),
    )


def _runaway(seeds: list[Measurements]) -> Signature:
    growth = _of(seeds, lambda m: m.uncollapsed[-1] / m.uncollapsed[0])
    collapsed = _of(seeds, lambda m: m.entropies[FIRST][-1] / m.entropies[FIRST][0])
    stopped = sum(m.guard_rolled_back for m in seeds)
    return Signature(
        "e: on a policy that has not collapsed it runs away, and the guard stops it",
        "0.8 to more than 7 nats in 17 steps",
        f"entropy {growth.show(1)} times in {seeds[0].steps} steps (collapsed: {collapsed.show(1)}); the guard undid it in "
        f"{stopped} of {len(seeds)} seeds",
        _all([_is_above(growth, RUN_AWAY), _in_all(stopped, seeds)]),
    )


def _nearness(seeds: list[Measurements]) -> Signature:
    overlap = _of(seeds, lambda m: m.microscope["overlap"])
    kl = _of(seeds, lambda m: m.microscope["kl_ab"])
    lowest = _of(seeds, lambda m: min(v for v in list(m.cka.values())[:-2] if v is not None))
    return Signature(
        "f: little else changes",
        "top-10 overlap about 1, token KL about 0.002 nats, CKA about 1 but in the last layers",
        f"overlap {overlap.show(3)}, KL {kl.show(4)} nats, lowest CKA before the last layer {lowest.show(3)}",
        _all([_is_above(overlap, NEAR_ONE), _is_above(_mirrored(kl), -SMALL_KL), _is_above(lowest, NEAR_ONE)]),
    )


def _cooling(seeds: list[Measurements]) -> Signature:
    cosine = _of(seeds, lambda m: m.cooled_cosine)
    left = _of(seeds, lambda m: m.cooled_left)
    returned = sum(m.cooled_steps is not None for m in seeds)
    verdict = _is_above(_mirrored(cosine), UNDONE)
    if verdict is Verdict.NO and cosine.high < 0:  # back, but not all the way
        verdict = Verdict.PARTLY
    return Signature(
        "g: cooling (T 0.8, reverse KL) takes most of it back",
        "cosine of the two displacements -0.88",
        f"cosine {cosine.show(2)}; {left.show(2)} of the displacement left; entropy back in {returned} of {len(seeds)} seeds",
        verdict,
    )


def _signed(mean: Mean) -> str:
    return ("+" if mean.value >= 0 else "") + mean.show(3)
