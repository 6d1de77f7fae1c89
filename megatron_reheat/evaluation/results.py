"""What an evaluation reports: avg@n and pass@k with their intervals, as a table, results.json and one line a sample."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from megatron_reheat.analysis.passk import BoolArray, RealArray, bootstrap_interval, pass_at_k_by_prompt
from megatron_reheat.run_folder import write_atomically
from megatron_reheat.types import Completion, Prompt, Reward

BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class EvalOptions:
    """The command's arguments; sampling defaults are the paper's (arXiv 2606.00755).

    `folder` is the Hugging Face folder of `model`, where that is a run's checkpoint. `engine` holds `key=value` settings of
    the recipe's rollout section. `out` None: `runs/eval/<model>/<time>`.
    """

    model: str
    suites: tuple[str, ...]
    n: int = 8
    temperature: float = 1.0
    top_p: float = 0.7
    max_tokens: int = 8192
    seed: int = 0
    limit: int | None = None
    data_root: Path | None = None
    template: str = "chat"
    chat_template_kwargs: str = ""
    replicas: int = 1
    engine: tuple[str, ...] = ()
    out: Path | None = None
    folder: str | None = None


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its 95% bootstrap interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: RealArray) -> Estimate:
        """From one value a problem, [P]; the same values give the same interval."""
        return cls(float(values.mean()), *bootstrap_interval(values, BOOTSTRAP_SEED))

    def __str__(self) -> str:
        return f"{self.mean:.3f}\n[{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class SuiteResult:
    """`avg` is the mean accuracy of single samples, `pass_at` the unbiased pass@k by k; `mean_tokens` of a response.

    `seconds` and `tokens_per_s` are those of sampling; grading took `grade_s`. `timeouts` counts grades that were given up.
    """

    suite: str
    source: str
    problems: int
    samples: int
    avg: Estimate
    pass_at: dict[int, Estimate]
    mean_tokens: float
    truncated_fraction: float
    timeouts: int
    seconds: float
    grade_s: float
    tokens_per_s: float


def estimates(correct: BoolArray) -> dict[int, Estimate]:
    """pass@k by k, from graded samples [P, n]; pass@1 is the mean accuracy of single samples."""
    return {k: Estimate.of(pass_at_k_by_prompt(correct, k)) for k in ks(correct.shape[1])}


def ks(n: int) -> list[int]:
    """The powers of two up to `n`, for which pass@k is reported."""
    return [1 << i for i in range(n.bit_length())]


def results_table(results: Sequence[SuiteResult], options: EvalOptions) -> Table:
    """One row a suite. avg@n is the unbiased pass@1, so pass@1 has no column of its own."""
    table = Table(
        title=f"{options.model}: {options.n} samples a problem at temperature {options.temperature:g}, top-p "
        f"{options.top_p:g}, at most {options.max_tokens} tokens (95% bootstrap intervals over problems)"
    )
    larger = [k for k in ks(options.n) if k > 1]
    columns = ["problems", f"avg@{options.n} = pass@1", *(f"pass@{k}" for k in larger)]
    table.add_column("suite", no_wrap=True)
    for column in (*columns, "tokens", "truncated", "seconds", "tokens/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for r in results:
        scores = [str(r.avg), *(str(r.pass_at[k]) for k in larger)]
        sampling = [
            f"{r.mean_tokens:.0f}",
            f"{100 * r.truncated_fraction:.1f}%",
            f"{r.seconds:.1f}",
            f"{r.tokens_per_s:,.0f}",
        ]
        table.add_row(r.suite, str(r.problems), *scores, *sampling)
    return table


def stopped_after(results: Sequence[SuiteResult], options: EvalOptions, reason: str) -> str:
    """What an evaluation says that was stopped with these suites finished."""
    if not results:
        return f"stopped by {reason} before a suite was finished; nothing is saved"
    return f"stopped by {reason} after {len(results)} of {len(options.suites)} suites, which are in results.json"


def print_table(table: Table) -> None:
    """On a narrow terminal, or into a file, lines are longer than it rather than cut."""
    console = Console(markup=False)
    console.width = max(
        console.width, Measurement.get(console, console.options.update(max_width=10_000), table).maximum
    )
    console.print(table)


def write_samples(
    path: Path,
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Completion]],
    texts: Sequence[Sequence[str]],
    rewards: Sequence[Sequence[Reward]],
) -> None:
    """One line a sample: prompt, reference, response and verdict."""
    # A lone surrogate becomes \udXXX, which is the JSON escape for it.
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for prompt, group in zip(prompts, zip(completions, texts, rewards, strict=True), strict=True):
            verifier = prompt.verifier
            answer = verifier["answer"] if "answer" in verifier else verifier["entry"].get("answer")
            for sample, (completion, text, reward) in enumerate(zip(*group, strict=True)):
                row = {
                    "problem": prompt.index,
                    "sample": sample,
                    "prompt": prompt.text,
                    "answer": answer,
                    "response": text,
                    "correct": reward.correct,
                    "timed_out": reward.timed_out,
                    "finish_reason": completion.finish_reason,
                    "num_tokens": len(completion.token_ids),
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_results(out: Path, options: EvalOptions, results: Sequence[SuiteResult]) -> None:
    """`results.json`: the options, and one object a suite; rewritten after each, so that none is lost to a later failure."""
    tree = {"options": asdict(options), "suites": [asdict(result) for result in results]}
    write_atomically(out / "results.json", (json.dumps(tree, indent=1, default=str) + "\n").encode())
