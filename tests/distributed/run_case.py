"""One rank of `launch`."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import torch


def main() -> None:
    from tests.distributed import cases

    torch.set_num_threads(1)
    case, folder = sys.argv[1], Path(sys.argv[2])
    arguments = torch.load(folder / "arguments.pt", weights_only=False)
    result = getattr(cases, case)(**arguments)
    torch.save(result, folder / f"result-{os.environ['RANK']}.pt")


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        # at once: an orderly exit would wait for ranks that are still inside a collective
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
