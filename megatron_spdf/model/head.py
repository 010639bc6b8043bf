"""The LM head and its loss a few tokens at a time, so that the logits of a micro-batch never exist
as a whole.

The gradients of the head's input and weight are made in the forward pass, while a chunk's logits
are there, up to the factor that backward brings (Hsu et al. 2024, Liger Kernel's fused linear cross
entropy): nothing is computed twice.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from torch import Tensor

from megatron_spdf.architecture.lm_head import tokens_at_once
from megatron_spdf.kernels.softmax import softmax_kernels


def head_loss(
    x: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor, vocab_size: int,
    smoothing: float = 0.0
) -> Tensor:
    """Sum over tokens of token weight x cross entropy, smoothed if asked, z the logits:

        (1 - e) x cross entropy with the label + e x mean cross entropy over the vocabulary
        = log sum_v exp z_v - z_y + e (z_y - mean_v z_v)

    Args:
        x: (T, B, H), the same on every tensor-parallel rank; its gradient is this rank's part of a
            sum over ranks.
        weight: (rows, H), this rank's rows of the tied embedding.
        labels: (B, T).
        token_weights: (B, T), of which 0 leaves a token out.
        vocab_size: without the rows that pad the embedding, which take no part in any softmax.
            Megatron-Core lets them compete, so that its loss depends on the padding and differs
            from the exported model's.
        smoothing: e, the share of the target that is spread evenly over the vocabulary (Szegedy et
            al. 2016, section 7).

    Returns:
        () float32.
    """
    return _HeadLoss.apply(x, weight, labels, token_weights, vocab_size, smoothing,
                           torch.is_grad_enabled())


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor, vocab_size: int,
        smoothing: float, trains: bool
    ) -> Tensor:
        tokens = x.flatten(0, 1)  # (N, H), N = T B
        labels, shares = (t.t().flatten() for t in (labels, token_weights.float()))
        softmax = Softmax.over(weight, vocab_size, smoothing)
        size = tokens_at_once(len(weight), len(tokens), softmax.width)
        ctx.shape, ctx.gradients = x.shape, Gradients(tokens, weight, size) if trains else None
        loss = tokens.new_zeros((), dtype=torch.float32)
        for start in range(0, len(tokens), size):
            part = slice(start, start + size)
            loss += _chunk(tokens[part], weight, labels[part], shares[part], softmax,
                           ctx.gradients, start)
        return loss

    @staticmethod
    def backward(ctx, factor: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), ctx.gradients = ctx.gradients.times(factor), None
        return x.view(ctx.shape), weight, None, None, None, None, None


def _chunk(tokens: Tensor, weight: Tensor, labels: Tensor, shares: Tensor, softmax: Softmax,
           gradients: Gradients | None, start: int) -> Tensor:
    """The loss of n tokens, (); their gradients go to `gradients`."""
    scores = softmax.logits(tokens, weight)
    losses, sums = softmax.cross_entropy_(scores, labels)
    if gradients is not None:
        softmax.gradient_(scores, labels, shares, sums)
        scores = scores.to(weight.dtype)
        gradients.add(start, tokens, scores)
    return shares @ losses


class Softmax:
    """Over the vocabulary, of which this rank has some columns, in fp32, one operation after the
    other.

    Attributes:
        real: columns that are tokens and not padding.
        width: bytes of a logit.
    """

    width = 4

    @staticmethod
    def over(weight: Tensor, vocab_size: int, smoothing: float) -> Softmax:
        """Makes one for logits by an LM head (rows, H), in kernels of one pass where there are
        any."""
        kernels = softmax_kernels(weight.device.type, weight.dtype)
        if kernels is None:
            return Softmax(len(weight), vocab_size, smoothing)
        return FusedSoftmax(kernels, weight, vocab_size, smoothing)

    def __init__(self, rows: int, vocab_size: int, smoothing: float):
        self.group, self.vocab_size, self.smoothing = (
            ps.get_tensor_model_parallel_group(),
            vocab_size,
            smoothing,
        )
        self.first = self.group.rank() * rows
        self.end = self.first + rows
        self.real = min(max(vocab_size - self.first, 0), rows)

    def logits(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """Logits of tokens (n, H), in fp32 (n, rows)."""
        scores = (tokens @ weight.t()).float()  # of fp32 logits no copy
        # rows that only pad the vocabulary: exp makes them zero in every sum and gradient
        scores[:, self.real :] = -torch.inf
        return scores

    def cross_entropy_(self, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (n,) of logits (n, rows), which become exp(logit - the largest of the vocabulary);
        and the sums of that over the vocabulary (n,)."""
        top = scores.amax(-1)
        self.reduce(top, dist.ReduceOp.MAX)
        # Else exp overflows. Of the whole vocabulary, so that sums add up over ranks.
        scores -= top.unsqueeze(-1)
        place, here = self._places(labels)
        parts = [scores.gather(1, place).squeeze(1).where(here, 0.0)]
        if self.smoothing:
            parts.append(scores[:, : self.real].sum(-1) / self.vocab_size)
        scores.exp_()
        # one reduction for all that the loss needs of other ranks
        total, label, *mean = self.reduce(torch.stack([scores.sum(-1), *parts]), dist.ReduceOp.SUM)
        losses = total.log() - label
        return losses + self.smoothing * (label - mean[0]) if mean else losses, total

    def gradient_(self, scores: Tensor, labels: Tensor, shares: Tensor, total: Tensor) -> None:
        """Turns what `cross_entropy_` leaves into the gradients of share x loss by the logits."""
        # share x softmax; what follows takes the target's distribution off it
        scores *= (shares / total).unsqueeze(-1)
        place, here = self._places(labels)
        scores.scatter_add_(1, place,
                            ((self.smoothing - 1.0) * shares).where(here, 0.0).unsqueeze(1))
        if self.smoothing:
            scores[:, : self.real] -= (self.smoothing / self.vocab_size * shares).unsqueeze(-1)

    def _places(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of labels (n, 1), the first where a label is another rank's; and which are this
        rank's (n,)."""
        here = (labels >= self.first) & (labels < self.end)
        return (labels - self.first).where(here, 0).unsqueeze(1), here

    def reduce(self, values: Tensor, operation: dist.ReduceOp) -> Tensor:
        """Over the ranks that share the vocabulary, in place."""
        if self.group.size() > 1:
            dist.all_reduce(values, operation, group=self.group)
        return values


class FusedSoftmax(Softmax):
    """Softmax in kernels of one pass. Logits keep the precision of the product that makes them, and
    their gradients take their place.

    Args:
        kernels: of `kernels/softmax.py`.
        weight: (rows, H) of the LM head.
    """

    def __init__(self, kernels: ModuleType, weight: Tensor, vocab_size: int, smoothing: float):
        super().__init__(len(weight), vocab_size, smoothing)
        self.kernels, self.width = kernels, weight.element_size()

    def logits(self, tokens: Tensor, weight: Tensor) -> Tensor:
        return tokens @ weight.t()

    def cross_entropy_(self, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (n,) of logits (n, rows), which stay; and the largest logit of the vocabulary and
        the sum over it of exp(logit - the largest), (2, n)."""
        found = self.kernels.sums(scores, labels - self.first, self.real, self.smoothing > 0.0)
        top = self.reduce(found[0].clone(), dist.ReduceOp.MAX)
        found[1] *= (found[0] - top).exp_()  # until here of this rank's largest
        total, label, *whole = self.reduce(found[1:], dist.ReduceOp.SUM)
        losses = total.log() - (label - top)
        if whole:
            losses += self.smoothing * (label - whole[0] / self.vocab_size)
        return losses, torch.stack([top, total])

    def gradient_(self, scores: Tensor, labels: Tensor, shares: Tensor, sums: Tensor) -> None:
        self.kernels.gradient_(scores, labels - self.first, *sums, shares, self.real,
                               self.vocab_size, self.smoothing)


class Gradients:
    """The gradients of the head's input (N, H) and weight (rows, H), chunk by chunk; that of the
    weight is summed in float32 where there are several chunks."""

    def __init__(self, tokens: Tensor, weight: Tensor, size: int):
        self.weight, self.of_input = weight, torch.empty_like(tokens)
        self.of_weight = torch.zeros_like(weight,
                                          dtype=torch.float32) if size < len(tokens) else None

    def add(self, start: int, tokens: Tensor, of_logits: Tensor) -> None:
        """Adds those of a chunk of tokens (n, H), from the gradient of its logits (n, rows)."""
        # written where it belongs: the (N, H) gradient exists once
        torch.mm(of_logits, self.weight, out=self.of_input[start : start + len(tokens)])
        if self.of_weight is None:
            self.of_weight = of_logits.t() @ tokens
        elif of_logits.is_cuda:  # within the product, whose sums are not rounded first
            torch.addmm(self.of_weight, of_logits.t(), tokens, out_dtype=torch.float32,
                        out=self.of_weight)
        else:
            self.of_weight += of_logits.t() @ tokens

    def times(self, factor: Tensor) -> tuple[Tensor, Tensor]:
        """Scales in place where the precision stays: a gradient is used once."""
        self.of_input *= factor
        whole = self.of_weight
        of_weight = torch.empty_like(self.weight) if whole.dtype != self.weight.dtype else whole
        return self.of_input, torch.mul(whole, factor, out=of_weight)
