"""`reheat eval` with real vLLM on a tiny model that knows some answers by heart, so that every score is known beforehand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from megatron_reheat.data.prompts import PromptDataset
from megatron_reheat.evaluation.suites import load_suites
from tests.e2e import runs

GYM = "reasoning_gym:chain_sum:{max_terms: 2, max_digits: 2, size: 3}"
MAX_TOKENS = 16
# four problems in MATH-500's schema, and what the model answers: right in other forms, wrong, and not done in time
MATH = [
    ({"problem": "What is $1/4 + 1/4$?", "answer": "\\frac{1}{2}"}, "It is \\boxed{0.5}."),
    ({"problem": "What is $3 \\cdot 4$?", "answer": "12"}, "Three fours: \\boxed{12}"),
    ({"problem": "What is $9 - 2$?", "answer": "7"}, "\\boxed{6}"),
    ({"problem": "What is $2^5$?", "answer": "32"}, "2 " * MAX_TOKENS),
]
MATH_CORRECT = [True, True, False, False]
GYM_CORRECT = [True, False, True]
END = 2  # named by generation_config.json alone
SPLIT = Regex(r"\w+|\W")


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """One token for each word and for each other character of `texts`; answers end with <end>, which is not the eos token."""
    splitter = pre_tokenizers.Split(SPLIT, behavior="isolated")
    pieces = sorted({piece for text in texts for piece, _ in splitter.pre_tokenize_str(text)})
    tokenizer = Tokenizer(
        models.WordLevel({p: i for i, p in enumerate(["<pad>", "<eos>", "<end>", *pieces])}, unk_token="<pad>")
    )
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", extra_special_tokens=["<end>"]
    )


def learn_by_heart(tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=32, max_position_embeddings=512, tie_word_embeddings=True,
            bos_token_id=None, pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    prompts, answers = ([tokenizer(text)["input_ids"] for text in texts] for texts in zip(*pairs, strict=True))
    width = max(len(p) + len(a) + 1 for p, a in zip(prompts, answers, strict=True))
    inputs, labels = torch.zeros(len(pairs), width, dtype=torch.long), torch.full((len(pairs), width), -100)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        sequence = torch.tensor([*prompt, *answer, END])
        inputs[i, : len(sequence)] = sequence
        labels[i, len(prompt) : len(sequence)] = sequence[len(prompt) :]
    model.generation_config.eos_token_id = END
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(400):
        logits = model(input_ids=inputs).logits[:, :-1]
        losses = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
        if losses.max() < 0.1:  # top-p 0.7 then leaves one token each time
            return model
        optimizer.zero_grad()
        (losses.sum() / (labels >= 0).sum()).backward()
        optimizer.step()
    raise AssertionError(f"the model has not learnt its answers: worst token at {float(losses.max()):.3g} nats")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of one evaluation of both suites, with one engine."""
    root = tmp_path_factory.mktemp("eval")
    data = root / "data" / "math500" / "test.jsonl"
    data.parent.mkdir(parents=True)
    data.write_text("".join(json.dumps(record) + "\n" for record, _ in MATH))
    math, gym = _prompts(root, make_tokenizer(["x"]))
    solutions = [p.verifier["entry"]["answer"] for p in gym]
    answered = [f"<answer>{s if right else '1'}</answer>" for s, right in zip(solutions, GYM_CORRECT, strict=True)]
    pairs = [
        *zip([p.text for p in math], [answer for _, answer in MATH], strict=True),
        *zip([p.text for p in gym], answered, strict=True),
    ]
    tokenizer = make_tokenizer([text for pair in pairs for text in pair])
    learn_by_heart(tokenizer, pairs).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    result = runs.reheat(
        "eval", str(root / "model"), "--suite", "math500", GYM, "--data-root", str(root / "data"), "--template", "raw",
        "--n", "4", "--limit", "4", "--max-tokens", str(MAX_TOKENS), "--out", str(root / "out"),
        "--engine", "kv_cache_mb=32", "threads=1",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    return root / "out", result.stdout


def _prompts(root: Path, tokenizer: Any) -> list[PromptDataset]:
    suites = load_suites(["math500", GYM], tokenizer, template="raw", limit=4, data_root=root / "data")
    return [suite.prompts for suite in suites]


def test_scores_are_those_of_the_answers_it_knows(evaluated: tuple[Path, str]) -> None:
    math, gym = json.loads((evaluated[0] / "results.json").read_text())["suites"]
    assert (math["suite"], math["problems"], math["samples"]) == ("math500", 4, 4)
    assert (gym["suite"], gym["problems"]) == (GYM, len(GYM_CORRECT))
    for result, correct in ((math, MATH_CORRECT), (gym, GYM_CORRECT)):
        assert list(result["pass_at"]) == ["1", "2", "4"]
        for estimate in (result["avg"], *result["pass_at"].values()):  # all samples of a problem agree
            assert estimate["mean"] == pytest.approx(sum(correct) / len(correct))
            assert 0 <= estimate["low"] < estimate["mean"] < estimate["high"] <= 1
        assert result["timeouts"] == 0 and result["seconds"] > 0 and result["tokens_per_s"] > 0
    assert math["truncated_fraction"] == 0.25 and gym["truncated_fraction"] == 0
    assert gym["mean_tokens"] < math["mean_tokens"] < MAX_TOKENS


def test_every_answer_can_be_inspected(evaluated: tuple[Path, str]) -> None:
    rows = [json.loads(line) for line in (evaluated[0] / "samples-math500.jsonl").read_text().splitlines()]
    assert [(row["problem"], row["sample"]) for row in rows] == [(p, s) for p in range(4) for s in range(4)]
    for row in rows:
        record, response = MATH[row["problem"]]
        assert row["prompt"].startswith(record["problem"]) and row["answer"] == record["answer"]
        assert response.startswith(row["response"]) and row["correct"] == MATH_CORRECT[row["problem"]]
        assert (row["finish_reason"] == "length") == (row["problem"] == 3) == (row["response"] != response)
    (path,) = evaluated[0].glob("samples-reasoning_gym_chain_sum*.jsonl")
    correct = [json.loads(line)["correct"] for line in path.read_text().splitlines()]
    assert correct == [right for right in GYM_CORRECT for _ in range(4)]


def test_the_table_and_the_logs(evaluated: tuple[Path, str]) -> None:
    folder, output = evaluated
    assert "avg@4 = pass@1" in output and "pass@4" in output and "0.500" in output and "25.0%" in output
    assert "Traceback" not in output and str(folder / "results.json") in output
    assert sorted(path.name for path in (folder / "logs").iterdir()) == ["vllm-0.log"]
