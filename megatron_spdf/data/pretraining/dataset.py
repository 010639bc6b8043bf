"""Training and validation batches of this rank, read by position.

Sample i of the run is the same at every layout and after every resume: it depends on the seed, the
blend and i alone. Step n takes samples [n G, (n + 1) G), and its micro-batches are dealt to the
data-parallel ranks in turn.

Shapes: G sequences of a global batch, B sequences of a micro-batch, T tokens of a sequence.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from megatron_spdf.data.indexed.tokens import DataFault, IndexedTokens
from megatron_spdf.data.pretraining.blend import BlendHistory, BlendOrder
from megatron_spdf.data.pretraining.corpus import Corpus
from megatron_spdf.data.pretraining.samples import (
    ShuffledEpochs,
    Windows,
    boundaries_of,
    samples_in,
    samples_per_index,
)
from megatron_spdf.data.pretraining.shared_memory import prefetched, shared_memory_fault
from megatron_spdf.model.batch import MicroBatch
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.resilience.signals import block_in_worker


class TrainingSamples(Dataset):
    """Samples of a run by their number.

    Args:
        recipe: gives the order's seed and the length of a sequence.
        corpus: checked data sets.
        history: blends of the run.
        first: number of the first sample that will be read; indices before it are not
            built.
        cache: directory for the indices.
    """

    def __init__(self, recipe: Recipe, corpus: Corpus, history: BlendHistory, first: int,
                 cache: Path):
        total = recipe.steps * recipe.train.global_batch
        self.order = BlendOrder.cached(history, total, cache)
        before, after = history.taken(first), history.taken(total)
        self._sizes = {s.content: samples_per_index(s, recipe) for s in corpus.train}
        self._shuffled = {
            (s.content, number): ShuffledEpochs(s, number, recipe, corpus.tokenizer, cache)
            for s in corpus.train
            for number in range(before[s.content] // self._sizes[s.content],
                                -(-after[s.content] // self._sizes[s.content]))}

    @property
    def read_from(self) -> list[IndexedTokens]:
        """The data sets."""
        return [shuffled.dataset for shuffled in self._shuffled.values()]

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        content = self.order.contents[self.order.places[number]]
        which, within = divmod(int(self.order.numbers[number]), self._sizes[content])
        return self._shuffled[content, which][within]


class TokenData:
    """Batches of the run on this rank. A micro-batch is tokens, labels, loss mask and positions,
    (B, T) each.

    Args:
        recipe: names the data and the batch sizes.
        corpus: checked data sets.
        cache: directory for the indices, shared by all ranks of a node or of the cluster.
        reads: this rank needs tokens; ranks between the first and the last pipeline stage may not.

    Attributes:
        valid_batches: batches of an evaluation; 0 without validation data.
        mean_length: mean length of a sequence, in tokens.
    """

    def __init__(self, recipe: Recipe, corpus: Corpus, cache: Path, reads: bool):
        self.recipe, self.corpus, self.cache, self.reads = recipe, corpus, cache, reads
        self.history = BlendHistory(Path(recipe.output), corpus.train)
        self.boundaries = boundaries_of(recipe, corpus.tokenizer)
        self.mean_length = recipe.train.sequence_length
        batch = recipe.train.global_batch
        windows = sum(samples_in(s.tokens, recipe.train.sequence_length) for s in corpus.valid)
        self.valid_batches = min(windows // batch, recipe.evaluate.batches)
        self._samples: TrainingSamples | None = None
        self._counted: tuple[int, dict[str, int]] = 0, {}
        self.valid = Windows(corpus.valid, self.valid_batches * batch, recipe,
                             corpus.tokenizer) if windows else None

    def training_batches(self, first_step: int) -> Iterator[list[MicroBatch]]:
        """Yields this rank's micro-batches of every step from `first_step` to the end of the run.

        All ranks call it together: missing indices are built first, and the run's blend is noted.

        Args:
            first_step: number of the first step, counted from 0.

        Raises:
            ValueError: the blend is not the run's, and `data.on_blend_change` is not "continue".
        """
        first = first_step * self.recipe.train.global_batch
        if self.recipe.data.on_blend_change == "refuse":
            self.history.require_unchanged()
        self.history.extend(first)
        with _rank_0_first() as alone:
            if alone:
                try:
                    self.history.save()
                except OSError as error:  # a full disk ends no run
                    print(f"the blend's history cannot be written: {error}", file=sys.stderr,
                          flush=True)
            if self.reads:
                self._samples = TrainingSamples(self.recipe, self.corpus, self.history, first,
                                                self.cache)
                self._counted = first, self.history.taken(first)
        return self._batches(self._samples, first_step, self.recipe.steps)

    def validation_batches(self) -> Iterator[list[MicroBatch]]:
        """Yields the fixed validation batches, the same non-overlapping windows every time."""
        return self._batches(self.valid, 0, self.valid_batches)

    def consumed(self, steps: int) -> int:
        """Number of tokens that the model has read after `steps` steps."""
        return steps * self.recipe.tokens_per_step

    def consumed_by_source(self, steps: int) -> dict[str, int]:
        """Number of those tokens by source, prefix -> tokens. Empty on ranks that read none."""
        if self._samples is None:
            return {}
        order, (before, taken) = self._samples.order, self._counted
        now = steps * self.recipe.train.global_batch
        new = np.bincount(order.places[before:now], minlength=len(order.contents))
        taken = taken | {c: taken[c] + int(n)
                         for c, n in zip(order.contents, new, strict=True) if n}
        self._counted = now, taken
        paths = self.history.segments[-1].paths
        return {paths[content]: count * self.recipe.train.sequence_length
                for content, count in taken.items()}

    @cached_property
    def valid_tokens_per_byte(self) -> float:
        """Labels of the validation windows over the UTF-8 bytes of their text."""
        return len(self.valid) * self.recipe.train.sequence_length / self.valid.text_bytes

    def _batches(self, dataset: TrainingSamples | Windows | None, first: int,
                 last: int) -> Iterator[list[MicroBatch]]:
        """Yields the micro-batches of steps.

        Raises:
            DataFault: a data set cannot be read further, or holds what is no token.
        """
        per_step = self.recipe.micro_batches
        if not self.reads:
            yield from ([{}] * per_step for _ in range(first, last))
            return
        workers = self.recipe.data.workers
        loader = DataLoader(
            _FaultsInPlace(dataset),
            batch_sampler=(self._indices(step, m) for step in range(first, last)
                           for m in range(per_step)),
            num_workers=workers,
            collate_fn=_collate,
            worker_init_fn=block_in_worker,
            prefetch_factor=prefetched(self.recipe) if workers else None,
            pin_memory=torch.cuda.is_available(),
        )
        with _named(dataset):
            loader = iter(loader)
        for _ in range(first, last):
            yield [_next(loader, dataset) for _ in range(per_step)]

    def _indices(self, step: int, micro: int) -> list[int]:
        """Numbers of the samples of a micro-batch on this rank, (B,)."""
        size, dp = self.recipe.train.micro_batch, self.recipe.parallel.data
        place = micro * dp + ps.get_data_parallel_rank()
        start = step * self.recipe.train.global_batch + place * size
        return list(range(start, start + size))


class _FaultsInPlace(Dataset):
    """Samples, or a fault in the place of one: raised in a loader process, it would arrive as a
    trace."""

    def __init__(self, samples: Dataset):
        self._samples = samples

    def __getitem__(self, number: int) -> dict[str, Tensor] | DataFault:
        try:
            return self._samples[number]
        except DataFault as fault:
            return fault


def _collate(samples: list[dict[str, Tensor] | DataFault]) -> MicroBatch | DataFault:
    faults = (sample for sample in samples if isinstance(sample, DataFault))
    return next(faults, None) or default_collate(samples)


def _next(loader: Iterator[MicroBatch | DataFault],
          samples: TrainingSamples | Windows) -> MicroBatch:
    """The next micro-batch; raises the fault that came in its place."""
    with _named(samples):
        batch = next(loader)
    if isinstance(batch, DataFault):
        raise batch
    return batch


@contextmanager
def _named(samples: TrainingSamples | Windows) -> Iterator[None]:
    """Names what a loader process died of, where that is known: an index that was cut off as it
    read, or a lack of shared memory."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        for tokens in samples.read_from:
            tokens.require_whole_index()
        if fault := shared_memory_fault(error):
            raise DataFault(fault) from None
        raise


@contextmanager
def _rank_0_first() -> Iterator[bool]:
    """Yields on rank 0 before it yields on the others, so that rank 0 alone builds indices that are
    missing on disks they share."""
    together = dist.is_initialized()
    alone = not together or dist.get_rank() == 0
    if not alone:
        dist.barrier()
    try:
        yield alone
    finally:
        if together and alone:
            dist.barrier()
