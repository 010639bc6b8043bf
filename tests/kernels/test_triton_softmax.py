"""Triton's softmax over the vocabulary against float64: sums, gradients, and the LM head's loss
over several ranks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from small_masks import DEVICE, NO_TRITON
from torch import Tensor

pytest.importorskip("triton", reason=NO_TRITON)
from megatron_spdf.kernels import softmax, triton_softmax  # noqa: E402
from megatron_spdf.kernels.program_shapes import SoftmaxShape  # noqa: E402
from megatron_spdf.model import head  # noqa: E402

pytestmark = pytest.mark.slow  # in Triton's interpreter

TOKENS, H, ROWS, RANKS = 6, 16, 48, 3
SMALL = SoftmaxShape(32, 1)  # a row has two blocks
PRECISION = {torch.float32: 1e-6, torch.bfloat16: 8e-3}


def test_trial_accepts_the_kernels_and_nothing_that_computes_otherwise(monkeypatch):
    softmax._self_test(triton_softmax, torch.device(DEVICE))
    right = triton_softmax.sums
    monkeypatch.setattr(triton_softmax, "sums", lambda *arguments: 1.01 * right(*arguments))
    with pytest.raises(RuntimeError, match="something else than PyTorch"):
        softmax._self_test(triton_softmax, torch.device(DEVICE))


class Ranks:
    """The fused softmax of each of several ranks, which exchange what they have in `reduce`."""

    def __init__(self, monkeypatch, weight: Tensor, vocab_size: int, smoothing: float):
        self.weights, self.softmaxes, self.seen = weight.chunk(RANKS), [], []
        for rank, part in enumerate(self.weights):
            group = SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: RANKS)
            monkeypatch.setattr(head.ps, "get_tensor_model_parallel_group", lambda g=group: g)
            self.softmaxes.append(head.FusedSoftmax(triton_softmax, part, vocab_size, smoothing))
            self.softmaxes[-1].reduce = self._exchange

    def _exchange(self, values: Tensor, operation) -> Tensor:
        """What all ranks' values come to: known once every rank has been here."""
        self.seen.append(values.clone())
        whole = torch.stack(self.known.pop(0) if self.known else [values])
        return values.copy_(whole.amax(0) if operation == head.dist.ReduceOp.MAX else whole.sum(0))

    def run(self, tokens: Tensor, labels: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """Losses, the same on every rank, and the gradient of the logits (n, all rows)."""
        exchanged: list[list[Tensor]] = []
        for _ in range(3):  # nothing is known at first, then the largest, then the sums
            results, rounds = [], []
            for softmax_, weight in zip(self.softmaxes, self.weights, strict=True):
                self.seen, self.known = [], list(exchanged)
                logits = softmax_.logits(tokens, weight)
                losses, sums = softmax_.cross_entropy_(logits, labels)
                softmax_.gradient_(logits, labels, shares, sums)
                results.append((losses, logits))
                rounds.append(self.seen)
            exchanged = [list(values) for values in zip(*rounds, strict=True)]
        losses, gradients = zip(*results, strict=True)
        assert all(torch.equal(each, losses[0]) for each in losses)
        return losses[0], torch.cat(gradients, 1)


# all rows are tokens; the last rank has padding; it has nothing else
@pytest.mark.parametrize("vocab_size", [ROWS * RANKS, ROWS * RANKS - 7, ROWS * 2 - 5])
@pytest.mark.parametrize(("smoothing", "dtype"), [(0.0, torch.bfloat16), (0.1, torch.float32)])
def test_losses_and_gradients_are_those_of_float64(monkeypatch, vocab_size, smoothing, dtype):
    for kernel in (triton_softmax.sums, triton_softmax.gradient_):
        monkeypatch.setattr(kernel, "__defaults__", (SMALL,))
    draw = torch.Generator().manual_seed(0)
    tokens, weight = (torch.randn(n, H, generator=draw).to(DEVICE, dtype)
                      for n in (TOKENS, ROWS * RANKS))
    labels = torch.tensor([0, ROWS - 1, ROWS, vocab_size - 1, 5, 2 * ROWS - 6], device=DEVICE)
    shares = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.0, 0.25], device=DEVICE)
    losses, gradient = Ranks(monkeypatch, weight, vocab_size, smoothing).run(tokens, labels, shares)

    parts = [tokens @ part.T for part in weight.chunk(RANKS)]  # rounded as by the ranks
    logits = torch.cat(parts, 1).double()[:, :vocab_size].requires_grad_()
    wanted = torch.nn.functional.cross_entropy(logits, labels, reduction="none",
                                               label_smoothing=smoothing)
    (wanted * shares).sum().backward()
    torch.testing.assert_close(losses.double(), wanted.detach(), rtol=1e-5, atol=1e-5)
    found, precision = gradient.double(), PRECISION[dtype]
    torch.testing.assert_close(found[:, :vocab_size], logits.grad, rtol=precision, atol=precision)
    assert not found[:, vocab_size:].any() and not found[4].any()
