"""Each measurement of `reheat compare` against its definition, written out densely in float64."""

from __future__ import annotations

import json
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from examples.countdown_cpu.make_model import make_tokenizer
from megatron_reheat.errors import ConfigError
from megatron_reheat.microscope import displacement as displacements
from megatron_reheat.microscope import measure as measuring
from megatron_reheat.microscope.cka import linear_cka
from megatron_reheat.microscope.displacement import displacement
from megatron_reheat.microscope.figures import HISTOGRAM_BINS, Means, positions_of, summarize
from megatron_reheat.microscope.measure import Measured, measure
from megatron_reheat.microscope.probe import Probe, ProbeSequence, read_probe, rollout_files
from megatron_reheat.microscope.tokens import TokenFigures, compare_tokens
from tests.character_tokenizer import character_tokenizer
from tests.tiny_models import VOCAB_SIZE, save_tiny_model

LENGTHS = ((3, 5), (1, 9), (6, 2), (4, 17), (2, 1))  # of prompts and responses
TEMPERATURE = 1.7


def dense(logits_a: Tensor, logits_b: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """[T, V] float64 both -> the figures by their definitions."""
    log_a, log_b = logits_a.log_softmax(-1), logits_b.log_softmax(-1)
    rows = range(len(targets))
    figures: dict[str, Any] = {
        "kl_ab": (log_a.exp() * (log_a - log_b)).sum(-1),
        "kl_ba": (log_b.exp() * (log_b - log_a)).sum(-1),
        "overlap": [len(top(logits_a[i]) & top(logits_b[i])) / len(top(logits_a[i])) for i in rows],
    }
    for name, logs in (("a", log_a), ("b", log_b)):
        figures[f"entropy_{name}"] = -(logs.exp() * logs).sum(-1)
        figures[f"logprob_{name}"] = logs[rows, targets]
        order = logs.argsort(descending=True)
        figures[f"rank_{name}"] = [1 + order[i].tolist().index(int(targets[i])) for i in rows]
    return {name: torch.as_tensor(values, dtype=torch.float64) for name, values in figures.items()}


def top(logits: Tensor) -> set[int]:
    return set(logits.argsort(descending=True)[:10].tolist())


def assert_equal(figures: TokenFigures, expected: dict[str, Tensor], **tolerance: float) -> None:
    for name, values in figures._asdict().items():
        torch.testing.assert_close(values.double(), expected[name], **(tolerance or {"rtol": 1e-4, "atol": 1e-6}))


@pytest.mark.parametrize("vocab_size", [7, 200])
def test_figures_of_tokens_are_those_of_the_definitions(vocab_size: int) -> None:
    torch.manual_seed(vocab_size)
    count = 23
    hidden_a, hidden_b = torch.randn(count, 16), torch.randn(count, 24)
    head_a, head_b = torch.randn(vocab_size, 16), torch.randn(vocab_size, 24)
    targets = torch.randint(vocab_size, (count,))
    expected = dense(hidden_a.double() @ head_a.double().t(), hidden_b.double() @ head_b.double().t(), targets)
    for chunk_tokens in (4, 256):
        assert_equal(compare_tokens(hidden_a, head_a, hidden_b, head_b, targets, chunk_tokens), expected)


def test_no_more_logits_than_a_chunk_of_tokens_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_reheat.microscope import tokens

    rows = []
    make = tokens.head_logits
    monkeypatch.setattr(tokens, "head_logits", lambda *given: rows.append(len(given[0])) or make(*given))
    compare_tokens(
        torch.randn(10, 4), torch.randn(5, 4), torch.randn(10, 4), torch.randn(5, 4), torch.zeros(10).long(), 4
    )
    assert rows == [4, 4, 4, 4, 2, 2]


def gram_cka(x: Tensor, y: Tensor) -> float:
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) of the centred Gram matrices (arXiv 1905.00414)."""
    n = len(x)
    centre = torch.eye(n, dtype=torch.float64) - 1 / n
    k, other = (centre @ z.double() @ z.double().t() @ centre for z in (x, y))
    return float((k * other).sum() / ((k * k).sum() * (other * other).sum()).sqrt())


def test_linear_cka_is_that_of_gram_matrices() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 12) + 30  # far from its mean
    y = torch.randn(50, 20) + x @ torch.randn(12, 20)
    expected = gram_cka(x, y)
    assert 0.2 < expected < 0.98
    for chunk_tokens in (7, 512):
        assert linear_cka(x, y, chunk_tokens) == pytest.approx(expected, rel=1e-10)
    rotation = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64)).Q
    assert linear_cka(x, 3.5 * y.double() @ rotation - 4) == pytest.approx(expected, rel=1e-10)
    assert linear_cka(x, x) == pytest.approx(1, abs=1e-12)
    assert linear_cka(y, y.double() @ rotation) == pytest.approx(1, abs=1e-10)
    assert linear_cka(x, torch.ones(50, 3)) is None


@pytest.mark.parametrize(("family", "head"), [("qwen3_tied", []), ("llama", ["head"])])
def test_displacement_and_cosine_by_block(
    family: str, head: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(displacements, "CHUNK", 1000)
    folders = [save_tiny_model(family, tmp_path / str(seed), seed=seed) for seed in range(3)]
    found = displacement(*folders)
    layers = [f"layer {i}" for i in range(1, 5)]
    assert [each.block for each in found] == ["embedding", *layers, "final norm", *head, "all"]
    tensors = [load_file(folder / "model.safetensors") for folder in folders]
    parts = {
        "embedding": "model.embed_tokens",
        **{layer: f"model.layers.{i}." for i, layer in enumerate(layers)},
        "final norm": "model.norm",
        "head": "lm_head",
        "all": "",
    }
    for each in found:
        prefix = parts[each.block]
        names = [name for name in tensors[0] if name.startswith(prefix)]
        a, b, c = (torch.cat([held[name].flatten().double() for name in names]) for held in tensors)
        assert each.norm == pytest.approx(float(a.norm()))
        assert each.moved == pytest.approx(float((b - a).norm()))
        assert each.relative == pytest.approx(float((b - a).norm() / a.norm()))
        assert each.cosine == pytest.approx(float(torch.cosine_similarity(b - a, c - a, dim=0)))
    back = displacement(folders[0], folders[1], folders[1])
    assert [each.cosine for each in back] == [pytest.approx(1)] * len(back)
    still = displacement(folders[0], folders[0])
    assert all((each.moved, each.relative, each.cosine) == (0, 0, None) for each in still)


def test_summary_of_tokens() -> None:
    torch.manual_seed(3)
    positions = positions_of([1, 6, 4])
    assert positions.tolist() == [1, 1, 2, 3, 4, 5, 6, 1, 2, 3, 4]
    tokens = TokenFigures(*torch.rand(7, 11), torch.arange(1, 12), torch.ones(11, dtype=torch.int64))
    summary = summarize(tokens, positions)
    assert summary.all == Means.of(tokens)
    assert summary.all.num_tokens == 11 and summary.all.first_b == 1
    assert summary.all.first_a == pytest.approx(1 / 11)
    forking = tokens.entropy_a.argsort(descending=True)[:3]  # a fifth of 11, rounded up
    assert summary.forking.num_tokens == 3 and summary.rest is not None and summary.rest.num_tokens == 8
    assert summary.forking.kl_ab == pytest.approx(float(tokens.kl_ab[forking].mean()))
    assert [(each.first, each.last, each.means.num_tokens) for each in summary.positions] == [
        (1, 1, 3),
        (2, 3, 4),
        (4, 6, 4),
    ]
    inside = positions.ge(4)
    assert summary.positions[2].means.overlap == pytest.approx(float(tokens.overlap[inside].mean()))
    ordered = tokens.kl_ba.double().sort().values.tolist()
    assert summary.kl_ba.median == ordered[5] and summary.kl_ba.q90 == ordered[9]
    assert summary.kl_ba.q99 == summary.kl_ba.maximum == ordered[10]
    assert len(summary.entropy.edges) == HISTOGRAM_BINS + 1
    assert sum(summary.entropy.a) == sum(summary.entropy.b) == 11
    certain = tokens._replace(entropy_a=torch.zeros(11), entropy_b=torch.zeros(11))
    assert summarize(certain, positions).entropy.a[0] == 11
    assert summarize(tokens.at(torch.tensor([0])), positions[:1]).rest is None


# -- of whole models -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    folders = {name: save_tiny_model("qwen3_untied", root / name, seed=i) for i, name in enumerate("ab")}
    folders["flattened"] = save_tiny_model("qwen3_untied", root / "flattened", seed=0)
    path = folders["flattened"] / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] /= TEMPERATURE
    save_file(tensors, path, {"format": "pt"})
    return folders


@pytest.fixture(scope="module")
def probe() -> Probe:
    draw = torch.Generator().manual_seed(5)
    sequences = [
        ProbeSequence(*(tuple(torch.randint(VOCAB_SIZE, (n,), generator=draw).tolist()) for n in lengths))
        for lengths in LENGTHS
    ]
    return Probe(tuple(sequences), (), ())


def run(a: Path, b: Path, probe: Probe, cka_tokens: int = 2048) -> Measured:
    said: list[str] = []
    return measure(a, b, probe, cka_tokens, said.append)


@torch.no_grad()
def dense_states(folder: Path, probe: Probe) -> tuple[Tensor, list[Tensor]]:
    """[T, V] logits and [T, H] behind every layer at the positions that predict a response token, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    before_norm: list[Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, inputs: before_norm.append(inputs[0]))
    logits, layers = [], []
    for sequence in probe.sequences:
        rows = slice(len(sequence.prompt) - 1, len(sequence) - 1)
        answer = model(torch.tensor([[*sequence.prompt, *sequence.response]]), output_hidden_states=True)
        logits.append(answer.logits[0, rows])
        *states, normed = answer.hidden_states
        layers.append([each[0, rows] for each in (*states, before_norm.pop(), normed)])
    return torch.cat(logits), [torch.cat(each) for each in zip(*layers, strict=True)]


@pytest.mark.parametrize("batch_tokens", [1, 30, 4096])
def test_models_are_measured_as_dense_float64_models(
    folders: dict[str, Path], probe: Probe, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "BATCH_TOKENS", batch_tokens)
    measured = run(folders["a"], folders["b"], probe)
    (logits_a, layers_a), (logits_b, layers_b) = (dense_states(folders[name], probe) for name in "ab")
    targets = torch.tensor([token for sequence in probe.sequences for token in sequence.response])
    expected = dense(logits_a, logits_b, targets)
    for name in TokenFigures._fields:
        assert getattr(measured.tokens.all, name) == pytest.approx(float(expected[name].mean()), rel=1e-3), name
    last = measured.tokens.positions[-1]
    at_last = positions_of([n for _, n in LENGTHS]) >= 16
    assert (last.first, last.last, last.means.num_tokens) == (16, 17, 2)
    assert last.means.kl_ab == pytest.approx(float(expected["kl_ab"][at_last].mean()), rel=1e-3)
    assert measured.cka is not None and measured.num_cka_tokens == probe.num_tokens
    assert list(measured.cka) == ["embedding", *(f"layer {i}" for i in range(1, 5)), "final norm"]
    for value, x, y in zip(measured.cka.values(), layers_a, layers_b, strict=True):
        assert value == pytest.approx(gram_cka(x, y), rel=1e-4)


def test_cka_of_some_tokens_spread_over_the_probe(folders: dict[str, Path], probe: Probe) -> None:
    measured = run(folders["a"], folders["b"], probe, cka_tokens=11)
    chosen = torch.arange(11) * probe.num_tokens // 11
    x, y = (dense_states(folders[name], probe)[1][2][chosen] for name in "ab")
    assert measured.num_cka_tokens == 11 and measured.cka is not None
    assert measured.cka["layer 2"] == pytest.approx(gram_cka(x, y), rel=1e-4)
    assert run(folders["a"], folders["b"], probe, cka_tokens=0)[1:] == (None, 0)


def test_one_model_is_in_memory_at_a_time_and_of_a_the_rows_that_count(
    folders: dict[str, Path], probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
    numbers, kept = [], []

    class Watched(measuring.StateReader):
        def __init__(self, folder: Path) -> None:
            super().__init__(folder)
            alive.add(self._model)
            numbers.append(len(alive))

    def watched(hidden_a: Tensor, *others: Tensor) -> TokenFigures:
        kept.append((tuple(hidden_a.shape), hidden_a.untyped_storage().nbytes()))
        return compare_tokens(hidden_a, *others)

    monkeypatch.setattr(measuring, "StateReader", Watched)
    monkeypatch.setattr(measuring, "compare_tokens", watched)
    run(folders["a"], folders["b"], probe)
    assert numbers == [1, 1]
    assert kept == [((response, 48), response * 48 * 4) for _, response in LENGTHS]


def test_a_policy_does_not_differ_from_itself(folders: dict[str, Path], probe: Probe) -> None:
    measured = run(folders["a"], folders["a"], probe)
    means = measured.tokens.all
    assert max(measured.tokens.kl_ab.maximum, measured.tokens.kl_ba.maximum) < 1e-9
    assert means.overlap == 1
    assert (means.entropy_a, means.rank_a, means.logprob_a) == (means.entropy_b, means.rank_b, means.logprob_b)
    assert measured.cka is not None and all(value == pytest.approx(1, abs=1e-12) for value in measured.cka.values())


def test_a_flattened_policy_differs_by_the_closed_form(folders: dict[str, Path], probe: Probe) -> None:
    """The final norm over T divides the logits by T: KL(q || p_T) and KL(p_T || q) of the same logits."""
    measured = run(folders["a"], folders["flattened"], probe)
    logits, _ = dense_states(folders["a"], probe)
    log_q, log_p = logits.log_softmax(-1), (logits / TEMPERATURE).log_softmax(-1)
    means = measured.tokens.all
    assert means.kl_ab == pytest.approx(float((log_q.exp() * (log_q - log_p)).sum(-1).mean()), rel=1e-4)
    assert means.kl_ba == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-4)
    assert means.entropy_b == pytest.approx(float(-(log_p.exp() * log_p).sum(-1).mean()), rel=1e-4)
    assert means.rank_a == means.rank_b and means.overlap == 1
    # a common factor does not change CKA, so the last reading is 1, too
    assert measured.cka is not None and all(value == pytest.approx(1, abs=1e-9) for value in measured.cka.values())
    moved = {each.block: each.relative for each in displacement(folders["a"], folders["flattened"])}
    assert moved.pop("final norm") == pytest.approx(1 - 1 / TEMPERATURE, rel=1e-6)
    assert moved.pop("all") > 0 and set(moved.values()) == {0}


# -- of the text ---------------------------------------------------------------------------------------------------------


def write(path: Path, *records: Any) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_texts_become_the_tokens_that_were_sampled(tmp_path: Path) -> None:
    tokenizer = character_tokenizer(None, adds="<bos> $A")
    ids = tokenizer.convert_tokens_to_ids
    file = write(
        tmp_path / "probe.jsonl",
        {"prompt": "ab", "response": "cd", "finish_reason": "stop", "num_tokens": 3},
        {"prompt": "<bos>a", "response": "cd", "finish_reason": "length", "num_tokens": 2},
        {"prompt": "a", "response": "", "finish_reason": "length"},
        {"prompt": "a" * 90, "response": "b"},
        {"prompt": "a", "response": "b", "num_tokens": 7},
        {"prompt": "a", "response": "never read"},
    )
    probe = read_probe([file], tokenizer, end=1, context=40, limit=3)
    assert [(s.prompt, s.response) for s in probe.sequences] == [
        ((2, *ids(["a", "b"])), (*ids(["c", "d"]), 1)),
        ((2, *ids(["a"])), tuple(ids(["c", "d"]))),
        ((2, *ids(["a"])), (*ids(["b"]), 1)),
    ]
    assert probe.num_tokens == 7 and probe.sources == (file,)
    assert probe.notes == (
        "1 sequences longer than the context of 40 tokens are left out",
        "1 of 3 responses are read back as another number of tokens than was sampled",
    )


def test_a_turn_of_a_chat_ends_as_its_template_ends_it(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}<unk>{% endfor %}"
    tokenizer = character_tokenizer(template, adds="<bos> $A")
    file = write(tmp_path / "probe.jsonl", {"prompt": "a<unk>", "response": "b"}, {"prompt": "a", "response": "b"})
    chat, raw = read_probe([file], tokenizer, end=1, context=40, limit=9).sequences
    assert chat.prompt[0] != 2 and chat.response[-1] == 0
    assert raw.prompt[0] == 2 and raw.response[-1] == 1


def test_tokens_that_a_tokenizer_joined_by_spaces_are_taken_apart(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    response = tokenizer("6+2", add_special_tokens=False)["input_ids"]
    record = {"prompt": "8|6,2=", "response": tokenizer.decode(response), "finish_reason": "stop", "num_tokens": 4}
    assert record["response"] == "6 + 2"
    end = tokenizer.eos_token_id
    probe = read_probe([write(tmp_path / "p.jsonl", record)], tokenizer, end, context=40, limit=9)
    assert probe.sequences[0].response == (*response, end) and not probe.notes


def test_tokens_that_a_run_kept_are_read_as_they_were_sampled(tmp_path: Path) -> None:
    tokenizer = character_tokenizer(None, adds="<bos> $A")
    a, b, c = tokenizer.convert_tokens_to_ids(["a", "b", "c"])
    kept = {
        "prompt": "a",
        "response": "bc",
        "finish_reason": "stop",
        "num_tokens": 4,
        "prompt_ids": [a],
    }  # and no <bos>
    file = write(
        tmp_path / "probe.jsonl",
        {**kept, "response_ids": [b, 1, c, 0]},
        {**kept, "response_ids": [c, b, 1, 1]},  # another tokenizer's
        {**kept, "response_ids": [b, c, 10_000, 1]},
        {**kept, "response_ids": []},
    )
    first, *others = read_probe([file], tokenizer, end=1, context=40, limit=9).sequences
    assert (first.prompt, first.response) == ((a,), (b, 1, c, 0))
    assert [(s.prompt, s.response) for s in others] == [((2, a), (b, c, 1))] * 3


def test_rollouts_are_the_newest_up_to_the_checkpoint(tmp_path: Path) -> None:
    files = [write(tmp_path / "rollouts" / f"step-{step:06d}.jsonl", {}) for step in (3, 20, 100)]
    write(tmp_path / "rollouts" / "step-mine.jsonl", {})
    assert rollout_files(tmp_path, tmp_path / "checkpoints" / "step-20") == [files[1], files[0]]
    assert rollout_files(tmp_path, tmp_path / "checkpoints" / "step-2") == files[::-1]
    assert rollout_files(tmp_path / "nowhere", tmp_path / "step-2") == []


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a"}, r"--data: record 0 of .* \(line 1\) has no 'response'; name a file"),
        ({"prompt": [{"role": "user"}], "response": "b"}, "has a list as 'prompt'"),
        ({"prompt": "a", "response": "", "finish_reason": "length"}, "no response with a token in"),
        ({"prompt": "a" * 99, "response": ""}, "1 are longer than the context of 40 tokens"),
    ],
)
def test_text_that_cannot_be_used_is_refused(record: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        read_probe([write(tmp_path / "p.jsonl", record)], character_tokenizer(None), end=1, context=40, limit=9)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    for name, message in (
        ("no.jsonl", "--data: cannot read .*No such file"),
        ("a.txt", "--data: .* is none of .jsonl"),
    ):
        (tmp_path / "a.txt").write_text("text")
        with pytest.raises(ConfigError, match=message):
            read_probe([tmp_path / name], character_tokenizer(None), end=1, context=40, limit=9)


def test_half_a_character_does_not_stop_it(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a", "response": "b\\ud800"}\n')
    (sequence,) = read_probe([file], character_tokenizer(None), end=1, context=40, limit=9).sequences
    assert len(sequence.response) == 3 and math.isfinite(sum(sequence.response))
