"""What one would use instead, measured in the same run: plain PyTorch, Megatron-Core with masks
multiplied into dense weights, and stanford-stk (Gale et al. 2022, MegaBlocks) for products with
blocks."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks import train
from benchmarks.engines import joined, peak_of, synthetic_batch
from benchmarks.kernel_throughput import median_seconds
from benchmarks.step import WARM_UP, rates
from megatron_spdf.layers.compact import CompactWeight
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.sparsity.plan import SparseWeight

LEVEL = 0.75  # of the multiplied masks


def stk_products(
    weight: SparseWeight, seed: int, device: torch.device, tokens: int, seconds: float
) -> Iterator[tuple[str, float, float]]:
    """(kernel, its seconds, those of the dense product) of y = x W^T and both gradients, of a
    weight of blocks.

    Raises:
        ImportError: it is not installed.
    """
    import stk.ops

    compact = CompactWeight(weight, seed, 0, 1, device)
    dense = compact(torch.randn(compact.values_shape, device=device).bfloat16())
    sparse = stk.ops.to_sparse(dense, weight.pattern.tile)
    x, gradient = (torch.randn(tokens, n, device=device).bfloat16()
                   for n in reversed(compact.shape))
    runs = {
        "stk, forward": (lambda: stk.ops.dds(x, sparse.t()), lambda: x @ dense.T),
        "stk, input gradient": (lambda: stk.ops.dds(gradient, sparse), lambda: gradient @ dense),
        "stk, weight gradient": (lambda: stk.ops.sdd(gradient.t(), x, sparse),
                                 lambda: gradient.T @ x),
    }
    for name, (run, plain) in runs.items():
        yield name, median_seconds(run, seconds), median_seconds(plain, seconds)


def plain_pytorch(recipe: Recipe, steps: int) -> dict:
    """The recipe's model in transformers, dense, with fp32 weights under autocast and the recipe's
    optimizer as PyTorch has it; figures as `train.Run`'s."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    training, seconds = _PlainTraining(recipe, device), []
    for number in range(1, WARM_UP + 1):
        training.step(number)
    for number in range(WARM_UP + 1, WARM_UP + 1 + steps):
        _wait(device)
        started = time.perf_counter()
        training.step(number)
        _wait(device)
        seconds.append(time.perf_counter() - started)
    peak = peak_of(lambda: training.step(number + 1),
                   torch.cuda.memory_allocated() if device.type == "cuda" else 0)
    return {"sparsity": 0.0, **rates(recipe, seconds), "peak_bytes": peak}


class _PlainTraining:
    """A loop as one writes it by hand."""

    def __init__(self, recipe: Recipe, device: torch.device):
        from transformers import AutoConfig, AutoModelForCausalLM

        o = recipe.optimizer
        model = recipe.model.model_copy(update={"dropout": 0.0})
        faster = {"gelu_new": "gelu_pytorch_tanh"}  # the same function
        keywords = {key: faster.get(str(value), value)
                    for key, value in model.huggingface_config().items()}
        config = AutoConfig.for_model(model.huggingface, **keywords, use_cache=False,
                                      attn_implementation="sdpa")
        with torch.device(device):
            self.model = AutoModelForCausalLM.from_config(config)
        self.optimizer = o.build([{"params": list(self.model.parameters()), "lr": o.lr}])
        self.recipe, self.device = recipe, device

    def step(self, number: int) -> None:
        batch = synthetic_batch(self.recipe, number)
        for micro in batch:
            (self._loss(micro["tokens"].to(self.device), micro["labels"].to(self.device))
             / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optimizer.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Loss of (B, T) tokens."""
        with torch.autocast(self.device.type, torch.bfloat16,
                            enabled=self.recipe.train.precision == "bf16"):
            logits = self.model(tokens).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def multiplied_masks(recipe: Recipe, steps: int) -> dict:
    """Megatron-Core's own dense training, and after each step the weights of the blocks multiplied
    by masks: what pruning by hand does. Figures as `train.Run`'s."""
    with joined(recipe) as device:
        run = train.start(recipe, device, quick=True)
        run.engine = _MaskedEngine(run.engine)
        run.held += sum(mask.nbytes for mask in run.engine.masks.values())
        run.peak = peak_of(lambda: run.advance(1), run.held)
        run.seconds.clear()
        for _ in range(train.STRETCHES):
            run.advance(max(1, steps // train.STRETCHES))
        return {**run.figures, "sparsity": LEVEL}


class _MaskedEngine:
    """An engine whose linear weights are masked after every step."""

    def __init__(self, engine):
        self.engine = engine
        blocks = [p for model in engine.models for n,
                  p in model.named_parameters() if ".layers." in n and p.ndim == 2]
        self.masks = {p: torch.rand(p.shape, device=p.device) >= LEVEL for p in blocks}

    def __getattr__(self, name: str):
        return getattr(self.engine, name)

    def step(self, *arguments):
        result = self.engine.step(*arguments)
        with torch.no_grad():
            for parameter, mask in self.masks.items():
                parameter.mul_(mask)
        return result


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


TRAINED = {"plain PyTorch, dense: transformers, autocast": plain_pytorch,
           "Megatron-Core, dense weights x masks of 75%": multiplied_masks}
