"""Makes the demo's problems: countdown with small numbers, as JSONL in the form of reasoning-gym's own entries.

    python examples/countdown_cpu/make_task.py OUT_FOLDER [--numbers 3] [--train 30000] [--eval 256] [--seed 0]

Writes train.jsonl and eval.jsonl. A problem is a set of numbers and a target; the held-out sets share no (numbers, target)
pair with the training sets, in whatever order the numbers are given. Each answer is a random one of the right expressions,
so that a policy that imitates them has something to explore.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

OPERATORS = ("+", "-", "*")
PRECEDENCE = {"+": 1, "-": 1, "*": 2}
MAX_TARGET = 99


def random_expression(numbers: list[int], rng: random.Random) -> tuple[str, int, int]:
    """(text, value, precedence of its last operation) of a random tree over `numbers` in the given order."""
    if len(numbers) == 1:
        return str(numbers[0]), numbers[0], 3
    cut = rng.randrange(1, len(numbers))
    left, left_value, left_precedence = random_expression(numbers[:cut], rng)
    right, right_value, right_precedence = random_expression(numbers[cut:], rng)
    operator = rng.choice(OPERATORS)
    precedence = PRECEDENCE[operator]
    if left_precedence < precedence:
        left = f"({left})"
    if right_precedence < precedence or (operator == "-" and right_precedence == precedence):
        right = f"({right})"
    value = {"+": left_value + right_value, "-": left_value - right_value, "*": left_value * right_value}[operator]
    return f"{left}{operator}{right}", value, precedence


def make_problem(num_numbers: int, rng: random.Random) -> dict[str, Any]:
    """One reasoning-gym countdown entry."""
    while True:
        numbers = [rng.randint(1, 9) for _ in range(num_numbers)]
        expression, target, _ = random_expression(numbers, rng)
        if 1 <= target <= MAX_TARGET:
            break
    given = rng.sample(numbers, len(numbers))
    return {
        "question": f"Using all of {given}, make {target}.",
        "answer": expression,
        "metadata": {"source_dataset": "countdown", "numbers": given, "target": target, "expression": expression},
    }


def problem_key(entry: dict[str, Any]) -> tuple[tuple[int, ...], int]:
    return tuple(sorted(entry["metadata"]["numbers"])), entry["metadata"]["target"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--numbers", type=int, default=3)
    parser.add_argument("--train", type=int, default=30000)
    parser.add_argument("--eval", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)

    held_out: dict[Any, dict[str, Any]] = {}
    while len(held_out) < arguments.eval:
        entry = make_problem(arguments.numbers, rng)
        held_out.setdefault(problem_key(entry), entry)
    train: list[dict[str, Any]] = []
    while len(train) < arguments.train:
        entry = make_problem(arguments.numbers, rng)
        if problem_key(entry) not in held_out:
            train.append(entry)

    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, entries in {"train": train, "eval": list(held_out.values())}.items():
        lines = (json.dumps(entry) + "\n" for entry in entries)
        (arguments.out / f"{name}.jsonl").write_text("".join(lines))
        print(f"{len(entries)} problems in {arguments.out / f'{name}.jsonl'}")


if __name__ == "__main__":
    main()
