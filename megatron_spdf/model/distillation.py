"""Knowledge distillation: a loss that asks a model for the distribution of another one.

    (1 - weight) x cross entropy + weight x T^2 x KL(teacher || student)

of each token, both distributions at temperature T; T^2 keeps the size of the gradient (Hinton et
al. 2015, section 2). Logits exist a few tokens at a time, see `head.py`, and the gradients of the
student's are made while they are there.

Shapes: n tokens of a chunk, N = T B of a micro-batch, rows of the vocabulary on this rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_spdf.architecture.base import Model
from megatron_spdf.architecture.lm_head import tokens_beside_teacher
from megatron_spdf.model.decoder import Decoder, build_model
from megatron_spdf.model.head import Gradients, Softmax
from megatron_spdf.model.init import InitialWeights
from megatron_spdf.model.objective import Composite, HeadInputs, cross_entropy
from megatron_spdf.recipe.distillation import as_teacher
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.sparsity.plan import Plan


def build_teacher(recipe: Recipe, model: Model, weights: InitialWeights) -> Decoder:
    """This rank's part of a frozen dense model, at the layout and in the precision of a recipe.

    Args:
        recipe: of the student, whose process groups are set up.
        model: the teacher's.
        weights: the teacher's.
    """
    own = as_teacher(recipe, model)
    (teacher,) = build_model(own, Plan.of(own), weights)
    teacher.objective = lambda inputs: inputs.x
    return teacher.eval().requires_grad_(False)


class Distillation(Composite):
    """Objective of a student.

    The teacher is no module of the student: it has no optimizer, takes part in no reduction and
    lies in no checkpoint.

    Args:
        teacher: see `build_teacher`.
        weight: share of the distillation loss, 0 to 1.
        temperature: T, over 0.
    """

    parts = ("cross_entropy", "distillation")

    def __init__(self, teacher: Decoder, weight: float, temperature: float):
        self.teacher, self.weight, self.temperature = teacher, weight, temperature
        self._seen: list[Tensor] = []

    def __call__(self, inputs: HeadInputs) -> Tensor:
        if not inputs.trains:
            return cross_entropy(inputs)
        with torch.no_grad():
            known = self.teacher(*inputs.read, loss_mask=inputs.token_weights)
        loss, *parts = _DistillationLoss.apply(
            inputs.x, inputs.weight, known, self.teacher.head_weight, inputs.labels,
            inputs.token_weights, inputs.vocab_size, inputs.smoothing, self.weight,
            self.temperature, torch.is_grad_enabled())
        self._seen.append(torch.stack(parts))
        return loss

    def take(self) -> Tensor:
        """Returns the mean losses since the last call, (2,): cross entropy and T^2 KL."""
        means, self._seen = torch.stack(self._seen).mean(0), []
        return means

    @property
    def held(self) -> int:
        """Bytes of the teacher's weights on this rank."""
        return sum(p.nbytes for p in self.teacher.parameters())


class _DistillationLoss(torch.autograd.Function):
    """The loss, (), and its two parts before they are weighed, which have no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, known: Tensor, teacher: Tensor, labels: Tensor,
                token_weights: Tensor, vocab_size: int, smoothing: float, share: float,
                temperature: float, trains: bool) -> tuple[Tensor, Tensor, Tensor]:
        tokens, known = x.flatten(0, 1), known.flatten(0, 1)  # (N, H) of each
        labels, token_weights = (t.t().flatten() for t in (labels, token_weights.float()))
        size = tokens_beside_teacher(len(weight), len(tokens))
        both = _Both(weight, teacher, Softmax(len(weight), vocab_size, smoothing), share,
                     temperature)
        ctx.shape, ctx.gradients = x.shape, Gradients(tokens, weight, size) if trains else None
        losses = tokens.new_zeros(2, dtype=torch.float32)
        for start in range(0, len(tokens), size):
            part = slice(start, start + size)
            losses += both.chunk(tokens[part], known[part], labels[part], token_weights[part],
                                 ctx.gradients, start)
        entropy, divergence = losses
        loss = (1.0 - share) * entropy + share * divergence
        ctx.mark_non_differentiable(entropy, divergence)
        return loss, entropy, divergence

    @staticmethod
    def backward(ctx, factor: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), ctx.gradients = ctx.gradients.times(factor), None
        return x.view(ctx.shape), weight, *[None] * 9


class _Both:
    """The LM heads of student and teacher on this rank.

    Args:
        weight: (rows, H) of the student.
        teacher: of the teacher, whose rows are those of the same tokens.
        softmax: over the student's columns.
        share, temperature: see `Distillation`.
    """

    def __init__(self, weight: Tensor, teacher: Tensor, softmax: Softmax, share: float,
                 temperature: float):
        self.weight, self.softmax = weight, softmax
        self.share, self.temperature = share, temperature
        # a rank without tokens has a column too, of which nothing comes
        self.teacher = teacher[: max(softmax.real, 1)]

    def chunk(self, tokens: Tensor, known: Tensor, labels: Tensor, token_weights: Tensor,
              gradients: Gradients | None, start: int) -> Tensor:
        """Cross entropy and T^2 KL of n tokens, (2,); their gradients go to `gradients`."""
        softmax, squared = self.softmax, self.temperature**2
        scores = softmax.logits(tokens, self.weight)
        taught = (known @ self.teacher.t()).float()
        taught[:, softmax.real :] = -torch.inf
        divergences, apart = self._divergence(scores, taught)
        del taught
        entropies, total = softmax.cross_entropy_(scores, labels)
        if gradients is not None:
            softmax.gradient_(scores, labels, (1.0 - self.share) * token_weights, total)
            # by the logits, T^2 KL has the gradient T (student - teacher)
            scores += apart.mul_((self.share * self.temperature * token_weights).unsqueeze(-1))
            gradients.add(start, tokens, scores.to(self.weight.dtype))
        return torch.stack([token_weights @ entropies, squared * (token_weights @ divergences)])

    def _divergence(self, scores: Tensor, taught: Tensor) -> tuple[Tensor, Tensor]:
        """KL(teacher || student) at the temperature (n,), and student less teacher (n, rows).

        Args:
            scores: (n, rows) logits of the student, which stay.
            taught: (n, columns) logits of the teacher, which become probabilities.
        """
        real, reduce = self.softmax.real, self.softmax.reduce
        top, top_taught = reduce(torch.stack([scores.amax(-1), taught.amax(-1)]),
                                 dist.ReduceOp.MAX).unsqueeze(-1)
        taught.sub_(top_taught).div_(self.temperature)
        student = (scores - top).div_(self.temperature)
        further = student[:, :real].sub_(taught[:, :real])  # of logits, student less teacher
        taught.exp_()
        crossed = torch.einsum("nv,nv->n", taught[:, :real], further)
        # the same memory again: three tensors of logits are there at most
        torch.sub(scores, top, out=student).div_(self.temperature).exp_()
        total, total_taught, crossed = reduce(
            torch.stack([student.sum(-1), taught.sum(-1), crossed]), dist.ReduceOp.SUM)
        divergence = total.log() - total_taught.log() - crossed / total_taught
        student.div_(total.unsqueeze(-1))
        student[:, : taught.size(1)] -= taught.div_(total_taught.unsqueeze(-1))
        return divergence, student


def distill(model: nn.Module, teacher: Decoder, recipe: Recipe) -> None:
    """Gives a decoder, the last of a pipeline, the recipe's distillation as its objective."""
    model.objective = Distillation(teacher, recipe.distill.weight, recipe.distill.temperature)
