"""Measures the tempered KL, forward and backward, against plain PyTorch and the peers that are installed, side by side.

    python -m scripts.bench_kl [--vocab 32768 151936] [--tokens 256 1024] [--hidden 256] [--repeats 3]
    python -m scripts.bench_kl --tensor-parallel 2      # the vocabulary split over two gloo ranks, one thread each
    python -m scripts.bench_kl --loss reverse js        # to a detached teacher: KL(policy || teacher), Jensen-Shannon

Two questions, each in a table of its own: from logits that exist, and from hidden states and the LM head's weight. Every
row computes the same loss, whose value is printed. Memory is counted, not guessed: by the allocator on CUDA, and from every
tensor's storage as it is made and freed on the CPU. Peers: `pip install trl liger-kernel`; for the divergences to a teacher
what TRL computes (the mixture as the logsumexp of a stack) and Liger (chunks of tokens, each with its gradient in the forward
pass) is written out here on plain PyTorch, with the same chunks as ours.

peak: bytes beyond the inputs at the worst moment, gradients of the inputs included, per logit (tokens x vocabulary).
retained: bytes that live between forward and backward beyond the inputs, per logit.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_reheat.losses import fused_tempered_kl, tempered_kl
from megatron_reheat.parallel.head_loss import head_loss
from megatron_reheat.parallel.vocab import DEFAULT_CHUNK_TOKENS, VocabHead, VocabLogits, Vocabulary
from scripts.storage_counter import StorageCounter

TEMPERATURE = 1.2
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The C library gives large tensors back to the system when they die, and the system hands out the next ones page by page,
# zeroed: seconds that belong to no method. Kept instead, as CUDA's allocator keeps them, unless --default-heap is given.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 36),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 36),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
Loss = Callable[..., Tensor]  # the inputs -> mean KL(teacher || policy)


@dataclass(frozen=True)
class Measurement:
    seconds: float
    peak_bytes: int
    retained_bytes: int
    value: float


def measure(
    forms: dict[str, Loss], make_inputs: Callable[[], tuple[Tensor, ...]], repeats: int, clock: Callable[[], float]
) -> dict[str, Measurement | Exception]:
    """Median time of forward plus backward, the forms in turns, and the memory of one such pass of each."""
    taken: dict[str, list[float]] = {name: [] for name in forms}
    failed: dict[str, Exception] = {}
    for attempt in range(repeats + 2):
        for name, loss in forms.items():
            if name in failed:
                continue
            inputs = make_inputs()
            _wait()
            started = clock()
            try:
                loss(*inputs).backward()
            except Exception as error:  # a peer that does not run here is a result, too
                failed[name] = error
            _wait()
            if attempt > 1:  # the first calls compile, tune and grow the heap
                taken[name].append(clock() - started)
    return {
        name: failed[name]
        if name in failed
        else Measurement(statistics.median(taken[name]), *_count_memory(loss, make_inputs()))
        for name, loss in forms.items()
    }


def _count_memory(loss: Loss, inputs: tuple[Tensor, ...]) -> tuple[int, int, float]:
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        value = loss(*inputs)
        retained = torch.cuda.memory_allocated() - before
        value.backward()
        return torch.cuda.max_memory_allocated() - before, retained, value.item()
    counter = StorageCounter()
    counter.ignore(*inputs)
    # compiled code hides its tensors; ours then counts as the plain code it is made of, which makes more of them
    with torch.compiler.set_stance("force_eager"), counter:
        value = loss(*inputs)
        retained = counter.live
        value.backward()
    return counter.peak, retained, value.item()


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


# -- what is compared ----------------------------------------------------------------------------------------------------


def eager_kl(logits: Tensor) -> Tensor:
    """As one would write it."""
    log_q = logits.float().log_softmax(-1)
    log_p = (logits.detach().float() / TEMPERATURE).log_softmax(-1)
    return torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()


def logits_forms(group: Any, vocab_size: int) -> Iterator[tuple[str, Loss]]:
    shared: dict[str, Any] = {"temperature": TEMPERATURE, "group": group, "vocab_size": vocab_size}
    yield "ours", lambda z: tempered_kl(z, **shared).kl.mean()
    yield "ours, gradient over the logits", lambda z: tempered_kl(z, overwrite_logits=True, **shared).kl.mean()
    if group is not None:
        return  # none of the others is exact and sharded with a right gradient
    yield "PyTorch eager", eager_kl
    yield "PyTorch torch.compile", torch.compile(eager_kl, dynamic=False)
    if importlib.util.find_spec("trl"):
        from trl.experimental.gkd import GKDTrainer

        yield (
            "TRL generalized_jsd_loss",
            lambda z: GKDTrainer.generalized_jsd_loss(z[None], z.detach()[None] / TEMPERATURE, beta=0) / len(z),
        )


def head_forms(group: Any, vocab_size: int) -> Iterator[tuple[str, Loss]]:
    shared: dict[str, Any] = {"temperature": TEMPERATURE, "group": group, "vocab_size": vocab_size}

    def whole_loss(h: Tensor, w: Tensor) -> Tensor:
        def mean_kl(vocabs: Sequence[VocabLogits], rows: slice) -> Tensor:
            return vocabs[0].tempered_kl(temperature=TEMPERATURE, direction="forward").kl.sum() / len(h)

        return head_loss([h], w, mean_kl, vocab_size, group)

    yield "ours, fused with the loss", whole_loss  # what the engine trains with
    yield "ours, fused, any loss after", lambda h, w: fused_tempered_kl(h, w, **shared).kl.mean()
    yield "ours, logits", lambda h, w: tempered_kl(h @ w.t(), overwrite_logits=True, **shared).kl.mean()
    yield "three bare matmuls", _bare_matmuls
    if group is not None:
        return
    yield "PyTorch eager", lambda h, w: eager_kl(h @ w.t())
    yield "PyTorch torch.compile", torch.compile(lambda h, w: eager_kl(h @ w.t()), dynamic=False)
    if importlib.util.find_spec("trl"):
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        def trl(h: Tensor, w: Tensor) -> Tensor:
            teacher = (h.detach(), w.detach(), None)
            settings = (0.0, 1.0, 1.0, None, 1 / TEMPERATURE, None)
            return ChunkedDivergenceFunction.apply(h, w, None, *teacher, *settings)[0].mean()

        yield "TRL chunked divergence", trl
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        liger = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=True)

        def fused_linear_jsd(h: Tensor, w: Tensor) -> Tensor:
            labels = torch.zeros(len(h), dtype=torch.long, device=h.device)
            return liger(h, w, h.detach(), w.detach() / TEMPERATURE, labels)

        yield "Liger fused linear JSD", fused_linear_jsd


def dense_divergence(z: Tensor, u: Tensor, measure: str) -> Tensor:
    """As one would write it."""
    log_p, log_q = z.float().log_softmax(-1), u.detach().float().log_softmax(-1)
    if measure == "reverse":
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    log_mean = torch.logaddexp(log_p, log_q) - math.log(2)
    return sum((w.exp() * (w - log_mean)).sum(-1) for w in (log_p, log_q)).mean() / 2


def stacked_divergence(z: Tensor, u: Tensor, measure: str) -> Tensor:
    """The generalized JSD with the mixture as the logsumexp of a stack, in terms of `kl_div`."""
    log_p, log_q = z.float().log_softmax(-1), u.detach().float().log_softmax(-1)

    def kl(target: Tensor, other: Tensor) -> Tensor:
        return torch.nn.functional.kl_div(other, target, reduction="none", log_target=True)

    if measure == "reverse":
        return kl(log_p, log_q).sum(-1).mean()
    log_mean = torch.stack([log_p - math.log(2), log_q - math.log(2)]).logsumexp(0)
    return (0.5 * kl(log_q, log_mean) + 0.5 * kl(log_p, log_mean)).sum(-1).mean()


class ChunkedDivergence(torch.autograd.Function):
    """From hidden states, chunk by chunk, each with its gradient by autograd; the weight's is summed up over the chunks."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, others: Tensor, measure: str) -> Tensor:
        total, grad_hidden, grad_weight = hidden.new_zeros(()), torch.empty_like(hidden), torch.zeros_like(weight)
        for first in range(0, len(hidden), DEFAULT_CHUNK_TOKENS):
            rows = slice(first, first + DEFAULT_CHUNK_TOKENS)
            h, w = hidden[rows].detach().requires_grad_(), weight.detach().requires_grad_()
            with torch.enable_grad():
                value = dense_divergence(h @ w.t(), others[rows] @ w.detach().t(), measure) * len(h) / len(hidden)
            grad_hidden[rows], chunk_weight = torch.autograd.grad(value, (h, w))
            grad_weight += chunk_weight
            total += value.detach()
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> Any:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * factor, grad_weight * factor, None, None


def divergence(own: Vocabulary, other: Vocabulary, measure: str) -> Tensor:
    return own.js_to(other) if measure == "js" else own.kl_to(other)


def pair_logits_forms(measure: str, group: Any, vocab_size: int) -> Iterator[tuple[str, Loss]]:
    def ours(z: Tensor, u: Tensor, overwrite: bool = False) -> Tensor:
        own = VocabLogits(z, vocab_size, group, overwrite=overwrite)
        return divergence(own, VocabLogits(u, vocab_size, group), measure).mean()

    yield "ours", ours
    yield "ours, gradient over the logits", lambda z, u: ours(z, u, overwrite=True)
    if group is not None:
        return
    yield "PyTorch eager", lambda z, u: dense_divergence(z, u, measure)
    yield "PyTorch torch.compile", torch.compile(lambda z, u: dense_divergence(z, u, measure), dynamic=False)
    yield "TRL's form", lambda z, u: stacked_divergence(z, u, measure)


def pair_head_forms(measure: str, group: Any, vocab_size: int) -> Iterator[tuple[str, Loss]]:
    def with_the_loss(h: Tensor, w: Tensor, o: Tensor) -> Tensor:
        def mean(vocabs: Sequence[VocabLogits], rows: slice) -> Tensor:
            return divergence(*vocabs, measure).sum() / len(h)

        return head_loss([h, o.detach()], w, mean, vocab_size, group)

    def any_loss_after(h: Tensor, w: Tensor, o: Tensor) -> Tensor:
        return divergence(VocabHead(h, w, vocab_size, group), VocabHead(o, w, vocab_size, group), measure).mean()

    yield "ours, fused with the loss", with_the_loss  # what the engine trains with
    yield "ours, fused, any loss after", any_loss_after
    if group is not None:
        return
    yield "PyTorch eager", lambda h, w, o: dense_divergence(h @ w.t(), o.detach() @ w.detach().t(), measure)
    yield "TRL's form", lambda h, w, o: stacked_divergence(h @ w.t(), o.detach() @ w.detach().t(), measure)
    yield "Liger's form", lambda h, w, o: ChunkedDivergence.apply(h, w, o.detach(), measure)


def _bare_matmuls(hidden: Tensor, weight: Tensor) -> Tensor:
    """The head's forward and its two gradients as matrix products alone: what no exact method can undercut."""
    h, w = hidden.detach(), weight.detach()
    logits = h @ w.t()
    products = logits @ w, logits.t() @ h
    return hidden.sum() * 0.0 + 0.0 * sum(p[0, 0] for p in products)


# -- tables --------------------------------------------------------------------------------------------------------------


def compare(
    title: str,
    forms: Iterator[tuple[str, Loss]],
    make_inputs: Callable[[], Any],
    num_logits: int,
    repeats: int,
    clock: Callable[[], float],
) -> Table:
    table = Table("", "ms", "x ours", "peak B/logit", "retained B/logit", "peak MB", "loss", title=title)
    first: Measurement | None = None
    for name, m in measure(dict(forms), make_inputs, repeats, clock).items():
        if isinstance(m, Exception):
            table.add_row(name, "does not run", "", "", "", "", f"{type(m).__name__}: {m}"[:60])
            continue
        first = first or m
        if DEVICE.type == "cpu" and "torch.compile" in name:
            memory = ("not counted",) * 3
        else:
            per_logit = (f"{count / num_logits:.2f}" for count in (m.peak_bytes, m.retained_bytes))
            memory = (*per_logit, f"{m.peak_bytes / 2**20:.0f}")
        table.add_row(
            name,
            f"{m.seconds * 1e3:.0f}",
            f"{m.seconds / first.seconds:.2f}",
            *memory,
            f"{m.value:.6f}",
        )
    return table


def run(rank: int, arguments: argparse.Namespace) -> None:
    size = arguments.tensor_parallel
    group = None
    if size > 1:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", rank=rank, world_size=size)
        group = dist.group.WORLD
    clock = time.process_time if arguments.cpu_seconds else time.perf_counter
    console = Console(width=130, quiet=rank != 0)
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    console.print(f"{device}, {dtype}, TP={size}, torch {torch.__version__}")
    for vocab in arguments.vocab:
        columns = vocab // size
        for tokens in arguments.tokens:
            generator = torch.Generator().manual_seed(0)
            hidden = torch.randn(tokens, arguments.hidden, generator=generator)
            weight = torch.randn(vocab, arguments.hidden, generator=generator)[rank * columns : (rank + 1) * columns]
            weight = weight * 4 / arguments.hidden**0.5
            teacher = hidden + 0.3 * torch.randn(tokens, arguments.hidden, generator=generator)
            num_logits = tokens * columns

            def on_device(*tensors: Tensor) -> tuple[Tensor, ...]:
                return tuple(t.to(DEVICE, dtype, copy=True).requires_grad_() for t in tensors)

            for loss in arguments.loss:
                states = (hidden,) if loss == "tempered" else (hidden, teacher)
                from_logits, from_hidden = (
                    (logits_forms(group, vocab), head_forms(group, vocab))
                    if loss == "tempered"
                    else (pair_logits_forms(loss, group, vocab), pair_head_forms(loss, group, vocab))
                )

                def make_head(states: tuple[Tensor, ...] = states, weight: Tensor = weight) -> tuple[Tensor, ...]:
                    return on_device(states[0], weight, *states[1:])

                def make_logits(states: tuple[Tensor, ...] = states, weight: Tensor = weight) -> tuple[Tensor, ...]:
                    return on_device(*(h @ weight.t() for h in states))

                shape = f"{tokens} tokens, V={vocab}"
                title = f"{loss}, from hidden states: {shape}, H={arguments.hidden}"
                if num_logits > arguments.max_logits:
                    from_hidden = itertools.islice(from_hidden, 2)
                    title += " (too many logits for the others here)"
                    console.print(compare(title, from_hidden, make_head, num_logits, 1, clock))
                    continue
                console.print(
                    compare(
                        f"{loss}, from logits: {shape}", from_logits, make_logits, num_logits, arguments.repeats, clock
                    )
                )
                console.print(compare(title, from_hidden, make_head, num_logits, arguments.repeats, clock))
    if group is not None:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[32768, 151936])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--loss", nargs="+", default=["tempered"], choices=["tempered", "reverse", "js"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tensor-parallel", type=int, default=1, choices=[1, 2, 4])
    parser.add_argument(
        "--max-logits", type=float, default=2e8, help="above this many logits only the fused form is measured"
    )
    parser.add_argument(
        "--default-heap", action="store_true", help="the C library's own settings: page faults are part of the times"
    )
    parser.add_argument(
        "--cpu-seconds",
        action="store_true",
        help="the process's own, where others share the CPUs; with OMP_NUM_THREADS=1",
    )
    arguments = parser.parse_args()
    if not arguments.default_heap and not KEEP_MEMORY.items() <= os.environ.items():
        os.execve(
            sys.executable, [sys.executable, "-m", "scripts.bench_kl", *sys.argv[1:]], {**os.environ, **KEEP_MEMORY}
        )
    if arguments.tensor_parallel == 1:
        run(0, arguments)
        return
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29511")
    mp.spawn(run, (arguments,), nprocs=arguments.tensor_parallel)


if __name__ == "__main__":
    main()
