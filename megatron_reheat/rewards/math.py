"""Final answers in LaTeX, compared as mathematics: math-verify's parser reads them, `matching` says what is equal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_reheat.rewards.boxes import final_answer, last_boxed, reference_answer
from megatron_reheat.rewards.matching import is_right

__all__ = ["last_boxed", "verify_math"]


def verify_math(response: str, verifier: Mapping[str, Any]) -> float:
    r"""1.0 if the response's final answer equals `verifier["answer"]`, else 0.0.

    The answer is the last whole `\boxed{...}`; without a box, what follows `Answer:` in the last line that begins so.
    The reference may be plain, in `$...$`, boxed, or end in `#### answer`. May run forever on hostile input: call it
    through `VerifierPool`.
    """
    answer = final_answer(response)
    if answer is None:
        return 0.0
    try:
        return float(is_right(answer, reference_answer(str(verifier["answer"]))))
    except RecursionError:  # brackets in brackets in brackets
        return 0.0
