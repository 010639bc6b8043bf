"""The gradient of the LM head's weight, summed over chunks of tokens, against float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_spdf.model import head

TOKENS, H, ROWS = 256, 16, 64


@pytest.fixture
def error_of(monkeypatch):
    """Relative error of the weight's gradient, with so many tokens in a chunk."""
    one_rank = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    monkeypatch.setattr(head.ps, "get_tensor_model_parallel_group", lambda: one_rank)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, 1, H, generator=draw).bfloat16().requires_grad_()
    weight = torch.randn(ROWS, H, generator=draw).bfloat16().requires_grad_()
    labels = torch.randint(ROWS, (1, TOKENS), generator=draw)
    exact = weight.detach().double().requires_grad_()
    logits = x.detach().double().flatten(0, 1) @ exact.t()
    torch.nn.functional.cross_entropy(logits, labels[0], reduction="sum").backward()

    def error(chunk: int) -> float:
        monkeypatch.setattr(head, "tokens_at_once", lambda *_: chunk)
        weight.grad = None
        head.head_loss(x, weight, labels, torch.ones(1, TOKENS), ROWS).backward()
        return float((weight.grad.double() - exact.grad).norm() / exact.grad.norm())
    return error


@pytest.mark.parametrize("chunk", [2, 4])
def test_many_chunks_lose_nothing_in_bf16(error_of, chunk):
    assert error_of(chunk) < 1.25 * error_of(TOKENS)


@pytest.mark.parametrize(("rank", "places"), [
    (0, [0, 3, 0, 0]), (1, [0, 0, 0, 3]), (2, [0, 0, 0, 0])])
def test_the_first_and_the_last_row_of_a_rank_are_its_own(monkeypatch, rank, places):
    group = SimpleNamespace(rank=lambda: rank, size=lambda: 3)
    monkeypatch.setattr(head.ps, "get_tensor_model_parallel_group", lambda: group)
    place, here = head.Softmax(4, 9, 0.0)._places(torch.tensor([0, 3, 4, 7]))  # 4 rows a rank
    assert place.flatten().tolist() == places
    assert here.tolist() == [rank == 0, rank == 0, rank == 1, rank == 1]
