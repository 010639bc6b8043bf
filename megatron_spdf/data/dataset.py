"""Training and validation samples through Megatron-Core's GPTDataset, read by position.

Sample i of the run is the same at every layout: step n takes samples [n G, (n + 1) G), and its micro-batches are
dealt to the data-parallel ranks in turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core import parallel_state as ps
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from torch.utils.data import DataLoader, Dataset

from megatron_spdf.config import Recipe
from megatron_spdf.data.tokenizer import Tokenizer
from megatron_spdf.engine import MicroBatch
from megatron_spdf.parallel.signals import block_in_worker


class TokenData:
    """The run's samples on this rank.

    Args:
        recipe: names the prefixes and the batch sizes.
        sizes: tokens of each training prefix, by which they are mixed.
        tokenizer: of the data.
        cache: directory for Megatron-Core's sample indices.
        reads: whether this rank needs tokens; ranks between the first and last pipeline stage do not.

    Attributes:
        valid_batches: batches of an evaluation; 0: there are no validation data.
        mean_length: of a sequence, in tokens.
    """

    def __init__(self, recipe: Recipe, sizes: list[int], tokenizer: Tokenizer, cache: Path, reads: bool):
        self.recipe, self.reads = recipe, reads
        self.train, self.valid = _build(recipe, sizes, tokenizer, cache, reads)
        self.valid_batches = 0
        self.mean_length = recipe.train.sequence_length
        if recipe.data.valid:
            held = len(self.valid) // recipe.train.global_batch if reads else 0
            self.valid_batches = min(_largest(held), recipe.evaluate.batches)

    def training_batches(self, first_step: int) -> Iterator[list[MicroBatch]]:
        """This rank's micro-batches of every step from `first_step` (counted from 0) to the end of the run."""
        return self._batches(self.train, first_step, self.recipe.steps)

    def validation_batches(self) -> Iterator[list[MicroBatch]]:
        """The fixed validation batches: the same non-overlapping windows every time."""
        return self._batches(self.valid, 0, self.valid_batches)

    def consumed(self, steps: int) -> int:
        """Tokens that the model has read after so many steps."""
        return steps * self.recipe.tokens_per_step

    def _batches(self, dataset: Dataset | None, first: int, last: int) -> Iterator[list[MicroBatch]]:
        per_step = self.recipe.micro_batches
        if not self.reads:
            yield from ([{}] * per_step for _ in range(first, last))
            return
        workers = self.recipe.data.workers
        loader = iter(DataLoader(
            dataset,
            batch_sampler=(self._indices(step, m) for step in range(first, last) for m in range(per_step)),
            num_workers=workers,
            worker_init_fn=block_in_worker,
            prefetch_factor=2 * per_step if workers else None,
            pin_memory=torch.cuda.is_available(),
        ))
        for _ in range(first, last):
            yield [next(loader) for _ in range(per_step)]

    def _indices(self, step: int, micro: int) -> list[int]:
        size, dp = self.recipe.train.micro_batch, self.recipe.parallel.data
        start = step * self.recipe.train.global_batch + (micro * dp + ps.get_data_parallel_rank()) * size
        return list(range(start, start + size))


def _largest(held: int) -> int:
    """The count on every rank, those that read no data included."""
    shared = torch.tensor(held, device=torch.cuda.current_device())
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
    return int(shared)


def _build(recipe: Recipe, sizes: list[int], tokenizer: Tokenizer, cache: Path, reads: bool):
    train, valid = recipe.data.train, recipe.data.valid
    config = GPTDatasetConfig(
        random_seed=recipe.seed,
        sequence_length=recipe.train.sequence_length,
        blend_per_split=[(train, sizes if len(train) > 1 else None), (valid, None) if valid else None, None],
        path_to_cache=str(cache),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    samples = recipe.steps * recipe.train.global_batch
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [samples, None, None], lambda: reads, config)
    built = builder.build()
    return built[0], built[1]
