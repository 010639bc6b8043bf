"""Cases of the LM head's loss, made chunk by chunk."""

from __future__ import annotations

from contextlib import contextmanager
from unittest.mock import patch

import torch
from cases import Bench, bench
from live_bytes import LiveBytes
from megatron.core import parallel_state as ps
from megatron.core import tensor_parallel
from torch import Tensor

from megatron_spdf.architecture import lm_head
from megatron_spdf.model import head
from megatron_spdf.model.head import head_loss
from megatron_spdf.model.loss import batch_loss

T, B, H, ROWS = 7, 3, 16, 384  # 21 tokens


@contextmanager
def chunks_of(tokens: int):
    with patch.object(head, "tokens_at_once", lambda rows, whole, width: min(tokens, whole)):
        yield


def against_float64(recipe: dict) -> dict[tuple, tuple[float, float, float]]:
    """(dtype, vocabulary, smoothing, chunk) -> relative errors of the loss and of the gradients of
    input and weight."""
    with bench(recipe):
        return {(str(dtype), vocabulary, smoothing, chunk): _errors(dtype, vocabulary, smoothing,
                                                                    chunk)
                for dtype in (torch.float32, torch.bfloat16)
                # without padding, with some, with nothing else on the second rank
                for vocabulary in (ROWS, 300, 190)
                for smoothing in (0.0, 0.1) for chunk in (1, 4, 7, 21)}


def _errors(dtype: torch.dtype, vocabulary: int, smoothing: float,
            chunk: int) -> tuple[float, float, float]:
    rank, world = ps.get_tensor_model_parallel_rank(), ps.get_tensor_model_parallel_world_size()
    draw = torch.Generator().manual_seed(0)
    x = (torch.randn(T, B, H, generator=draw) / 4).to(dtype)  # logits near 1
    whole = torch.randn(ROWS, H, generator=draw).to(dtype)
    labels = torch.randint(vocabulary, (B, T), generator=draw)
    shares = torch.rand(B, T, generator=draw) * (torch.rand(B, T, generator=draw) > 0.3)
    x, whole, labels, shares = (t.cuda() for t in (x, whole, labels, shares))
    weight = whole.chunk(world)[rank].clone().requires_grad_()
    x.requires_grad_()
    with chunks_of(chunk):
        shared = tensor_parallel.copy_to_tensor_model_parallel_region(x)
        loss = head_loss(shared, weight, labels, shares, vocabulary, smoothing)
    (loss / 3).backward()

    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, whole))
    logits = (x64 @ weight64.t())[..., :vocabulary].transpose(0, 1)  # (B, T, vocabulary)
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none", label_smoothing=smoothing
    ).view(B, T)
    expected = (losses * shares).sum()
    (expected / 3).backward()
    return (_apart(loss, expected), _apart(x.grad, x64.grad),
            _apart(weight.grad, weight64.grad.chunk(world)[rank]))


def _apart(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of what is expected, which has to be nothing where nothing
    is expected."""
    scale = expected.detach().norm()
    return float((found.detach().double() - expected.detach()).norm() / (scale if scale else 1.0))


def as_megatron(recipe: dict, chunk: int) -> tuple[float, float]:
    """Relative differences of the loss and of all gradients from those by Megatron-Core's own
    output layer and cross entropy, on whole logits."""
    with bench(recipe) as b, chunks_of(chunk):
        micro = next(b.data.training_batches(0))[0]
        micro["loss_mask"][:, ::3] = 0.0
        mask = micro["loss_mask"]
        losses = b.engine.models[0](micro["tokens"], micro["position_ids"], None,
                                    labels=micro["labels"])
        theirs, their_gradients = _gradients(b, (losses * mask).sum() / mask.sum())
        ours, our_gradients = _gradients(b, batch_loss(b.engine.models[0], micro))
        return abs(ours / theirs - 1.0), max(map(_apart, our_gradients, their_gradients))


def _gradients(b: Bench, loss: Tensor) -> tuple[float, list[Tensor]]:
    (chunk,) = b.engine.chunks
    chunk.zero_grad_buffer()
    loss.backward()
    return float(loss), [p.main_grad.clone() for p in b.engine.models[0].parameters()]


def peaks(recipe: dict) -> dict[str, int]:
    """Most bytes alive in forward and backward of the head: whole, in one chunk, in chunks, and of
    whole logits."""
    tokens, rows, width = 512, 2048, 16
    found = {"logits": 4 * tokens * rows}
    with bench(recipe):
        x, weight = torch.randn(tokens, 1, width), torch.randn(rows, width)
        labels = torch.randint(rows, (1, tokens))
        shares = torch.ones(1, tokens)

        def megatron(x: Tensor, weight: Tensor) -> Tensor:
            logits = x @ weight.t()
            return (tensor_parallel.vocab_parallel_cross_entropy(logits, labels.t().contiguous())
                    * shares.t()).sum()

        def ours(x: Tensor, weight: Tensor) -> Tensor:
            return head_loss(x, weight, labels, shares, rows)

        for name, loss, limit in (("megatron", megatron, 0),
                                  ("one chunk", ours, lm_head.LOGITS_BYTES),
                                  ("chunks", ours, 4 * rows * 64)):
            x, weight = (t.detach().requires_grad_() for t in (x, weight))
            with patch.object(lm_head, "LOGITS_BYTES",
                              limit), LiveBytes((x, weight, labels, shares)) as live:
                loss(x, weight).backward()
            found[name] = live.peak
    return found
