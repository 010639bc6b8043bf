"""Blend of a run: assigns its samples to sources, and how a run may change it.

The blend alone decides the source of sample k, by Megatron's rule: the source that is furthest
behind its weight. Sample k is the next sample of that source, which has an order of its own
(`samples.ShuffledEpochs`). A blend that changes after c samples counts anew from there, while each
source goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_spdf.data.pretraining.index_cache import built_once
from megatron_spdf.data.pretraining.sources import Source
from megatron_spdf.files import new_file, write_json
from megatron_spdf.records.json_reader import read_json
from megatron_spdf.records.values import typed

HISTORY = "blend.json"
_REMEDY = ("restore it from a copy, or remove it where the run has read its recipe's blend from "
           "the first step on")


@dataclass(frozen=True)
class Segment:
    """Stretch of a run with one blend. All dictionaries are keyed by a source's content
    fingerprint.

    Attributes:
        first: number, in the run, of its first sample.
        weights: share of the samples of each source of the blend; they sum to 1.
        taken: samples of each source before this segment, for all sources so far.
        paths: prefix of each source, for all sources so far.
    """

    first: int
    weights: dict[str, float]
    taken: dict[str, int]
    paths: dict[str, str]


class BlendHistory:
    """Blends of a run, kept in its directory.

    Args:
        directory: of the run.
        sources: of the recipe's blend.
    """

    def __init__(self, directory: Path, sources: list[Source]):
        self._path, self._sources = directory / HISTORY, sources
        kept = (read_json(self._path, list[dict[str, Any]], remedy=_REMEDY)
                if self._path.exists() else [])
        self.segments = [typed(segment, Segment, f"{self._path}: segment {number}")
                         for number, segment in enumerate(kept, start=1)]

    @property
    def changed(self) -> str:
        """Difference between the recipe's blend and the run's last one, as a sentence, or ""
        without any."""
        if not self.segments:
            return ""
        before, now = self.segments[-1], {s.content: s.weight for s in self._sources}
        paths = before.paths | {s.content: s.prefix for s in self._sources}
        # by content: a data set that moved is the same source
        shares = {c: (before.weights.get(c, 0.0), now.get(c, 0.0)) for c in before.weights | now}
        return "; ".join(f"{paths[c]} ({c[:12]}) had {was:.6g} of the samples and has {share:.6g}"
                         for c, (was, share) in shares.items() if abs(was - share) > 1e-9)

    def require_unchanged(self) -> None:
        """Raises a ValueError if the recipe's blend is not the run's."""
        if self.changed:
            raise ValueError(
                f"the blend is not the one that {self._path.parent} was trained with: "
                f"{self.changed}. Set it back, or set data.on_blend_change=continue to change it "
                "from here on, each source going on where it was")

    def extend(self, first: int) -> None:
        """Starts a segment with the recipe's blend, if that changed.

        Args:
            first: number of the segment's first sample.
        """
        weights = {s.content: s.weight for s in self._sources}
        paths = {s.content: s.prefix for s in self._sources}
        if not self.segments:
            self.segments = [Segment(0, weights, dict.fromkeys(weights, 0), paths)]
        elif self.changed:
            # Segments after `first` were begun by a run that went back to an older checkpoint.
            taken, known = self.taken(first), self.segments[-1].paths
            self.segments = [s for s in self.segments if s.first < first]
            self.segments.append(Segment(first, weights, dict.fromkeys(weights, 0) | taken,
                                         known | paths))

    def save(self) -> None:
        """Writes the history, and makes the directory if it is missing."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._path, [vars(s) for s in self.segments])

    def taken(self, samples: int) -> dict[str, int]:
        """Counts the samples of each source among the first `samples` of the run, by content
        fingerprint."""
        segment = next(s for s in reversed(self.segments) if s.first <= samples)
        drawn, _ = blending_order(segment, samples - segment.first)
        counts = np.bincount(drawn, minlength=len(segment.weights))
        return segment.taken | {c: segment.taken[c] + int(n)
                                for c, n in zip(segment.weights, counts, strict=True)}

    def order(self, samples: int) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Assigns a source, and a place in that source's order, to each of the first `samples`
        samples.

        Returns:
            Content fingerprints of the sources; (samples,) int16, index of each sample's source
                among
            them; (samples,) int64, each sample's number in the source's own order.
        """
        contents = list(self.segments[-1].paths)
        # Sources are numbered over all segments, and each goes on counting where it was.
        places, numbers = [], []
        ends = [s.first for s in self.segments[1:]] + [samples]
        for segment, end in zip(self.segments, ends, strict=True):
            source, number = blending_order(segment, end - segment.first)
            places.append(np.array([contents.index(c) for c in segment.weights], np.int16)[source])
            numbers.append(np.array([segment.taken[c] for c in segment.weights])[source] + number)
        return contents, np.concatenate(places), np.concatenate(numbers)


def blending_order(segment: Segment, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Assigns sources to the first `size` samples of a segment.

    Returns:
        (size,) int16, index of each sample's source in `segment.weights`; (size,) int64, samples
        that the source gave before in this segment.
    """
    from megatron.core.datasets import helpers

    source, number = np.zeros(size, np.int16), np.zeros(size, np.int64)
    helpers.build_blending_indices(source, number, list(segment.weights.values()),
                                   len(segment.weights), size, False)
    return source, number


@dataclass(frozen=True)
class BlendOrder:
    """Result of `BlendHistory.order`, memory-mapped from the cache."""

    contents: list[str]
    places: np.ndarray
    numbers: np.ndarray

    @classmethod
    def cached(cls, history: BlendHistory, samples: int, cache: Path) -> BlendOrder:
        """Computes the order of the first `samples` samples of a run, once for all processes."""
        what = json.dumps([[vars(s) for s in history.segments], samples])
        key = f"blend-{hashlib.sha256(what.encode()).hexdigest()[:32]}"

        def build(directory: Path) -> None:
            contents, places, numbers = history.order(samples)
            write_json(directory / "contents.json", contents)
            for name, values in (("places", places), ("numbers", numbers)):
                with new_file(directory / f"{name}.npy") as file:
                    np.save(file, values)

        place = built_once(cache, key, build)
        return cls(read_json(place / "contents.json", list[str]),
                   np.load(place / "places.npy", mmap_mode="r"),
                   np.load(place / "numbers.npy", mmap_mode="r"))
