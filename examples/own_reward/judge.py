"""A reward model as a reward: a chat model behind any OpenAI-compatible server says how good a response is.

    vllm serve Qwen/Qwen3-4B-Instruct-2507 --port 8400            # on another node
    export JUDGE_URL=http://judge-node:8400/v1 JUDGE_API_KEY=...  # the latter if it asks for one
    reheat train recipe.yaml reward.kind=function reward.function=examples/own_reward/judge.py:judge \
        reward.sandbox=false reward.workers=32 reward.timeout_s=60

`reward.sandbox=false` lets it use the network and this shell's variables. Each worker waits for one answer at a time.
"""

from __future__ import annotations

import os
import re
from functools import cache
from typing import Any

from openai import OpenAI

QUESTION = """\
Here is a problem, its reference answer and a response. How good is the response, from 0 (useless) to 10 (right and clear)?
Answer with the number alone.

Problem: {question}
Reference answer: {answer}
Response: {response}"""
RIGHT_FROM = 0.8


@cache
def client() -> tuple[OpenAI, str]:
    """The server and the name of the model that it serves; made in the grader, not where it is forked from."""
    server = OpenAI(base_url=os.environ["JUDGE_URL"], api_key=os.environ.get("JUDGE_API_KEY", "none"), max_retries=2)
    return server, server.models.list().data[0].id


def judge(response: str, record: dict[str, Any]) -> tuple[float, bool]:
    server, model = client()
    asked = QUESTION.format(question=record["question"], answer=record["answer"], response=response)
    said = server.chat.completions.create(
        model=model, messages=[{"role": "user", "content": asked}], temperature=0.0, max_tokens=8
    )
    found = re.search(r"\d+(?:\.\d+)?", said.choices[0].message.content or "")
    if found is None:
        raise ValueError(f"the judge said {said.choices[0].message.content!r}")
    score = min(float(found.group()) / 10, 1.0)
    return score, score >= RIGHT_FROM
