"""A reward worker that hands every answer to reasoning-gym's own scorers: the day on which a grammar has a hole."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from megatron_reheat.rewards import guards, worker

    guards.OWN_SCORERS.clear()
    guards.GUARDS.clear()
    sum_ = {"task": "chain_sum", "entry": {"answer": "22", "metadata": {}}}  # countdown could not be graded any more
    worker.TRIALS["reasoning_gym"] = [("22", sum_, True), ("21", sum_, False)]
    worker.main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
