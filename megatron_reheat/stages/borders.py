"""The policy on either side of each round, as Hugging Face folders: what `reheat compare RUN` looks at."""

from __future__ import annotations

from pathlib import Path

from megatron_reheat.model.engine import Engine
from megatron_reheat.model.policy_export import export_policy
from megatron_reheat.run_folder import RunFolder, Side
from megatron_reheat.stages.controller import Verdict

SIDE_OF: dict[Verdict, Side] = {
    Verdict.ENTER_REHEAT: "before",
    Verdict.FLATTEN: "before",  # the verdict; the weights change behind it
    Verdict.TARGET_REACHED: "after",
    Verdict.STEP_CAP: "after",
    Verdict.RUNAWAY: "after",
}


class Borders:
    """Writes them where `checkpoint.borders` asks for it; a round that is made anew replaces what it wrote the first time."""

    def __init__(self, engine: Engine, run: RunFolder, hf_folder: Path, stop_token_ids: tuple[int, ...]) -> None:
        self._engine, self._run, self._hf_folder, self._stop_token_ids = engine, run, hf_folder, stop_token_ids

    def keep(self, round_: int, verdict: Verdict) -> None:
        """A collective; nothing for a verdict that neither begins nor ends a round.

        Raises:
            ReheatError: it cannot be written.
        """
        if side := SIDE_OF.get(verdict):
            self.write(round_, side)

    def write(self, round_: int, side: Side) -> None:
        """As `keep`."""
        export_policy(self._engine, self._run.border(round_, side), self._hf_folder, self._stop_token_ids)
