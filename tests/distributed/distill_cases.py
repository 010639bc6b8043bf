"""What runs on the ranks of test_distillation.py."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import islice
from unittest.mock import patch

import torch
from cases import bench
from head_cases import ROWS, B, T, _apart
from megatron.core import parallel_state as ps
from megatron.core import tensor_parallel
from plain_gpt2 import decayed, learning_rate, plain_gpt2
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from megatron_spdf.model import distillation
from megatron_spdf.model.distillation import _DistillationLoss
from megatron_spdf.planning.memory import teacher_bytes
from megatron_spdf.training.teacher import Teacher

H, TAUGHT = 16, 24  # widths of student and teacher


@contextmanager
def chunks_of(tokens: int):
    with patch.object(distillation, "tokens_beside_teacher",
                      lambda rows, all_tokens: min(tokens, all_tokens)):
        yield


def against_float64(recipe: dict) -> dict[tuple, list[float]]:
    """(vocabulary, weight, temperature, chunk) -> relative errors of loss, cross entropy, T^2 KL
    and the gradients of input and weight."""
    with bench(recipe):
        return {case: _errors(*case)
                for case in ((v, w, t, c) for v in (ROWS, 300, 190)  # padding of a rank, all of it
                             for w, t in ((0.3, 1.0), (0.7, 2.5), (1.0, 2.0)) for c in (4, 21))}


def _errors(vocabulary: int, share: float, temperature: float, chunk: int) -> list[float]:
    rank, world = ps.get_tensor_model_parallel_rank(), ps.get_tensor_model_parallel_world_size()
    draw = torch.Generator().manual_seed(0)
    x, known = (torch.randn(T, B, width, generator=draw) / 2 for width in (H, TAUGHT))
    whole, teacher = (torch.randn(ROWS, width, generator=draw) for width in (H, TAUGHT))
    labels = torch.randint(vocabulary, (B, T), generator=draw)
    counts = torch.rand(B, T, generator=draw) * (torch.rand(B, T, generator=draw) > 0.3)
    x.requires_grad_(), teacher.requires_grad_(), known.requires_grad_()
    weight = whole.chunk(world)[rank].clone().requires_grad_()
    with chunks_of(chunk):
        found = _DistillationLoss.apply(
            tensor_parallel.copy_to_tensor_model_parallel_region(x), weight, known,
            teacher.chunk(world)[rank], labels, counts, vocabulary, 0.1, share, temperature, True)
    (found[0] / 3).backward()
    assert teacher.grad is None and known.grad is None

    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, whole))
    expected = _plain(x64 @ weight64.t(), known.double() @ teacher.double().t(), labels, counts,
                      vocabulary, share, temperature)
    (expected[0] / 3).backward()
    return [*map(_apart, found, expected), _apart(x.grad, x64.grad),
            _apart(weight.grad, weight64.grad.chunk(world)[rank])]


def _plain(logits: Tensor, taught: Tensor, labels: Tensor, counts: Tensor, vocabulary: int,
           share: float, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, cross entropy smoothed by 0.1, T^2 KL, of logits (T, B, rows), in plain PyTorch."""
    logits, taught = (z[..., :vocabulary].transpose(0, 1) for z in (logits, taught.detach()))
    entropy = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none",
                            label_smoothing=0.1).view(B, T)
    ours, theirs = (log_softmax(z / temperature, -1) for z in (logits, taught))
    apart = temperature**2 * (theirs.exp() * (theirs - ours)).sum(-1)
    parts = (entropy * counts).sum(), (apart * counts).sum()
    return (1 - share) * parts[0] + share * parts[1], *parts


def distilled(recipe: dict, steps: int) -> dict:
    """Losses, gradient norms and parts of the loss of some steps beside a teacher, the validation
    loss, and what the engine has of the teacher."""
    with bench(recipe) as b:
        before = set(dict(b.engine.models[-1].named_parameters()))
        Teacher(b.recipe, b.corpus.tokenizer).teach(b.engine)
        curve, parts = [], []
        for number, batch in enumerate(islice(b.data.training_batches(0), steps), 1):
            result = b.engine.step(batch, number, number * b.recipe.tokens_per_step, False)
            curve.append((result.loss, result.grad_norm))
            parts.append(dict(result.parts))
        objective = b.engine.models[-1].objective
        teacher = objective.teacher
        saved = b.engine.state_to_save()["model"]
        return {"curve": curve, "parts": parts,
                "valid": [b.engine.evaluate(m, False)[0] for m in b.data.validation_batches()],
                "added": set(dict(b.engine.models[-1].named_parameters())) ^ before,
                "saved": [key for chunk in saved.values() for key in chunk if "teacher" in key],
                "gradients": [n for n, p in teacher.named_parameters()
                              if p.requires_grad or p.grad is not None],
                "held": objective.held, "planned": teacher_bytes(b.recipe)}


def plainly(recipe: dict, steps: int, directory: str) -> dict:
    """The same of transformers' GPT-2, masks multiplied, beside transformers' teacher in a
    directory, under plain PyTorch."""
    from transformers import AutoModelForCausalLM

    with bench(recipe) as b:
        student = plain_gpt2(b.engine.models[0], b.recipe)
        teacher = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
        masks = {n: p != 0 for n, p in student.named_parameters() if p.ndim == 2 and ".h." in n}
        o, d = b.recipe.optimizer, b.recipe.distill
        optimizer, curve, parts = decayed(student, o), [], []
        for number, batch in enumerate(islice(b.data.training_batches(0), steps), 1):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(b.recipe, number * b.recipe.tokens_per_step)
            optimizer.zero_grad()
            losses = torch.stack([_micro(student, teacher.eval(), m, d.temperature)
                                  for m in batch]).mean(0)
            loss = (1 - d.weight) * losses[0] + d.weight * losses[1]
            loss.backward()
            for name, parameter in student.named_parameters():
                parameter.grad *= masks.get(name, 1.0)
            norm = torch.nn.utils.clip_grad_norm_(student.parameters(), o.clip_grad)
            optimizer.step()
            curve.append((float(loss), float(norm)))
            parts.append(dict(zip(("cross_entropy", "distillation"), losses.tolist(),
                                  strict=True)))
        return {"curve": curve, "parts": parts}


def _micro(student, teacher, micro: dict, temperature: float) -> Tensor:
    logits = student(micro["tokens"]).logits
    with torch.no_grad():
        taught = teacher(micro["tokens"]).logits
    ours, theirs = (log_softmax(z / temperature, -1) for z in (logits, taught))
    apart = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    return torch.stack([cross_entropy(logits.flatten(0, 1), micro["labels"].flatten()),
                        temperature**2 * apart])
