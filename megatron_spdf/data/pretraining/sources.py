"""Sources of training samples: the data sets that a recipe names, and their weights."""

from __future__ import annotations

import glob
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from megatron_spdf.data.indexed.manifest import Manifest, check_prefix, file_of
from megatron_spdf.data.pretraining.pile import PILE_EPOCHS
from megatron_spdf.files import sampled_sha256
from megatron_spdf.paths import named_by
from megatron_spdf.recipe.recipe import Data


@dataclass(frozen=True)
class Source:
    """Data set of a run.

    Attributes:
        prefix: path of its files without .bin and .idx.
        content: fingerprint of its tokens, wherever they lie.
        tokens: number of its tokens.
        weight: share of the training samples that come from it.
    """

    prefix: str
    content: str
    tokens: int
    weight: float = 0.0


@dataclass(frozen=True)
class Entry:
    """Data set as the recipe names it, with either `weight` or `epochs`.

    Attributes:
        prefix: path of its files without .bin and .idx.
        pattern: entry of the recipe that matched it.
        weight: share of the pattern; None if `epochs` is given.
        epochs: number of times it is read, or "pile" for the Pile's own number.
    """

    prefix: str
    pattern: str
    weight: float | None
    epochs: float | Literal["pile"] | None


def expand(data: Data) -> list[Entry]:
    """Lists the training data sets of a recipe: `data.train`, or `data.blend` with patterns
    matched.

    Raises:
        ValueError: nothing is named, or a pattern matches nothing.
    """
    if not data.blend and not data.train:
        raise ValueError("data.train is empty; name at least one prefix made by "
                         "tools/preprocess_data.py")
    entries = [Entry(prefix, prefix, None, 1.0) for prefix in data.train]
    for named in data.blend:
        matches = [path.removesuffix(".idx") for path in named_by(f"{named.path}.idx")]
        if not matches and not glob.has_magic(named.path):
            matches = [named.path]  # the check says which of its files is missing
        if not matches:
            raise ValueError(f"data.blend: {named.path!r} matches no data set; a pattern matches "
                             "prefixes, the names of .bin and .idx files without these endings")
        entries += [Entry(path, named.path, named.weight, named.epochs) for path in matches]
    return entries


def training_sources(entries: list[Entry], tokenizer_sha256: str) -> list[Source]:
    """Checks the training data sets and computes their weights, which sum to 1.

    Data sets that match one pattern share its weight in proportion to their tokens. Epochs multiply
    tokens: a data set of two epochs is read twice as often as one of one.

    Args:
        entries: result of `expand`.
        tokenizer_sha256: `Tokenizer.sha256` of the tokenizer in use.

    Raises:
        ValueError: a data set is not whole, of another tokenizer, named twice, or asked for as a
            set of the Pile and none.
    """
    manifests = [check_prefix(entry.prefix, tokenizer_sha256) for entry in entries]
    matched: Counter[str] = Counter()
    for entry, manifest in zip(entries, manifests, strict=True):
        matched[entry.pattern] += manifest.tokens
    weights = [m.tokens * (e.weight / matched[e.pattern] if e.weight is not None else _epochs(e, m))
               for e, m in zip(entries, manifests, strict=True)]
    sources = [make_source(entry.prefix, manifest, weight / sum(weights))
               for entry, manifest, weight in zip(entries, manifests, weights, strict=True)]
    require_distinct(sources)
    return sources


def make_source(prefix: str, manifest: Manifest, weight: float = 0.0) -> Source:
    """Makes the source of a checked data set."""
    content = manifest.content_sha256 or sampled_sha256(file_of(prefix, suffix)
                                                        for suffix in ("idx", "bin"))
    return Source(prefix, content, manifest.tokens, weight)


def _epochs(entry: Entry, manifest: Manifest) -> float:
    if entry.epochs != "pile":
        return entry.epochs
    if manifest.set_name not in PILE_EPOCHS:
        raise ValueError(f"data.blend: {entry.prefix} holds the set {manifest.set_name!r}, which "
                         "is none of the Pile's, so that epochs=pile says nothing of it; give a "
                         f"number. Its sets are {', '.join(PILE_EPOCHS)}")
    return PILE_EPOCHS[manifest.set_name]


def require_distinct(sources: list[Source]) -> None:
    """Raises a ValueError where two data sets hold the same tokens."""
    content, times = Counter(source.content for source in sources).most_common(1)[0]
    if times > 1:
        same = ", ".join(source.prefix for source in sources if source.content == content)
        raise ValueError(f"the data sets {same} hold the same tokens, and would be read in the "
                         "same order; name one of them, with the sum of their weights or epochs")
