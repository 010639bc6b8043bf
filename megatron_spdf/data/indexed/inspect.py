"""Describes a data set, decodes its documents, and verifies every byte against its manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_spdf.data.indexed.index_file import read_index, read_lengths
from megatron_spdf.data.indexed.manifest import CORPUS, Manifest, check_prefix, file_of, read_corpus
from megatron_spdf.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megatron_spdf.tables import Column, Table

_TOKENS = 1 << 24  # that are in memory at a time
_BAR = 40  # characters of the longest bar


def data_sets(prefix: str | Path) -> list[str]:
    """Lists the prefixes of the data sets at `prefix`: itself, or those of a directory of data
    sets."""
    if (Path(prefix) / CORPUS).is_file():
        return [str(Path(prefix) / name) for name in read_corpus(prefix).data_sets]
    return [str(prefix)]


def describe(prefix: str | Path) -> dict[str, Any]:
    """Collects manifest, sizes and document lengths of one data set, as plain values.

    Raises:
        ValueError: files are missing, or have other sizes than the manifest says.
    """
    manifest = check_prefix(prefix)
    lengths = read_lengths(file_of(prefix, "idx"))
    low, middle, high, highest = np.percentile(lengths, (10, 50, 90, 99))
    return {
        "prefix": str(prefix),
        "manifest": manifest.model_dump(mode="json"),
        "content_sha256": manifest.content_sha256,
        "text_bytes_per_token": (manifest.text_bytes / manifest.tokens if manifest.text_bytes
                                 else None),
        "tokens_per_document": {"mean": float(lengths.mean()), "min": int(lengths.min()),
                                "10%": float(low), "50%": float(middle), "90%": float(high),
                                "99%": float(highest), "max": int(lengths.max())},
        "histogram": histogram(lengths),
    }


def histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """Counts documents and their tokens by length, in classes from a power of two to below the
    next.

    Args:
        lengths: (documents,), tokens of each document, at least 1.
    """
    classes = np.frexp(lengths.astype(np.float64))[1] - 1  # of length n: floor(log2 n)
    documents = np.bincount(classes)
    tokens = np.bincount(classes, weights=lengths)
    first = int(np.flatnonzero(documents)[0])
    return [{"from": 2**i, "below": 2 ** (i + 1), "documents": int(documents[i]),
             "tokens": int(tokens[i])}
            for i in range(first, len(documents))]


def sample(prefix: str | Path, number: int) -> dict[str, Any]:
    """Decodes one document.

    Args:
        number: of the document, counted from 0.

    Returns:
        Its token ids, its text, and the input file that it came from.

    Raises:
        ValueError: there is no such document, or no tokenizer to decode it with.
    """
    manifest, index = check_prefix(prefix), read_index(file_of(prefix, "idx"))
    if not 0 <= number < len(index.lengths):
        raise ValueError(f"{prefix} holds documents 0 to {len(index.lengths) - 1:,}; there is no "
                         f"document {number:,}")
    tokenizer = _tokenizer_of(prefix)
    if tokenizer is None:
        raise ValueError(f"{prefix}.tokenizer is missing, and nothing else says how to decode the "
                         "tokens")
    first = int(index.offsets[number]) // np.dtype(manifest.dtype).itemsize
    ids = _tokens(prefix, manifest)[first : first + int(index.lengths[number])].tolist()
    ends = np.cumsum([source.documents for source in manifest.sources])
    place = int(np.searchsorted(ends, number, side="right"))
    return {"document": number, "tokens": len(ids),
            "source": manifest.sources[place].path if len(ends) else None, "ids": ids,
            "text": tokenizer.decode(ids)}


def verify(prefix: str | Path) -> list[str]:
    """Reads every byte of a data set and compares it with its manifest.

    Returns:
        Faults, as sentences; none if the data set is sound.
    """
    try:
        manifest = check_prefix(prefix)
    except (ValueError, OSError) as error:
        return [str(error)]
    return [
        *_index_faults(prefix, manifest),
        *_token_faults(prefix, manifest),
        *_source_faults(prefix, manifest),
        *_tokenizer_faults(prefix, manifest),
    ]


def verify_corpus(prefix: str | Path) -> list[str]:
    """Verifies a directory of data sets: each of them, and that their counts add up.

    Returns:
        Faults, as sentences.
    """
    corpus, faults = read_corpus(prefix), []
    for name, counts in corpus.data_sets.items():
        path = str(Path(prefix) / name)
        found = verify(path)
        faults += found
        if not found and check_prefix(path).documents != counts.documents:
            faults.append(f"{path} holds {check_prefix(path).documents:,} documents, and {CORPUS} "
                          f"says {counts.documents:,}")
    total = sum(counts.documents for counts in corpus.data_sets.values())
    if total != corpus.documents:
        faults.append(f"{prefix}: the data sets hold {total:,} documents together, and {CORPUS} "
                      f"says {corpus.documents:,}")
    return faults


def _index_faults(prefix: str | Path, manifest: Manifest) -> Iterator[str]:
    path = file_of(prefix, "idx")
    index, size = read_index(path), np.dtype(manifest.dtype).itemsize
    if manifest.idx_sha256 and hashlib.sha256(path.read_bytes()).hexdigest() != manifest.idx_sha256:
        yield f"{path} has another content than was written"
    ends = np.cumsum(index.lengths, dtype=np.int64)
    if len(ends) and ((index.lengths < 0).any()
                      or (index.offsets != (ends - index.lengths) * size).any()
                      or ends[-1] * size != manifest.bin_bytes):
        yield (f"{path}: its offsets do not follow from its lengths, or do not end where the "
               "tokens do")
    starts = index.document_ends
    if starts[0] != 0 or starts[-1] != len(ends) or (np.diff(starts) <= 0).any():
        yield f"{path}: its documents do not cover its sequences in order"
    if manifest.tokens != (int(ends[-1]) if len(ends) else 0):
        yield f"{path} counts {int(ends[-1]):,} tokens, and the manifest says {manifest.tokens:,}"


def _token_faults(prefix: str | Path, manifest: Manifest) -> Iterator[str]:
    """Finds ids beyond the vocabulary, and end-of-document tokens anywhere but at the ends."""
    if manifest.tokenizer is None:
        return
    tokens = _tokens(prefix, manifest)
    known, eod = manifest.tokenizer.vocab_size, manifest.tokenizer.eod
    ends_seen = 0
    for start in range(0, len(tokens), _TOKENS):
        piece = tokens[start : start + _TOKENS]
        if (beyond := np.flatnonzero(piece >= known)).size:
            yield (f"{file_of(prefix, 'bin')}, token {start + int(beyond[0]):,}: id "
                   f"{int(piece[beyond[0]])}, and the tokenizer has {known:,}")
            return
        ends_seen += int((piece == eod).sum())
    if manifest.append_eod:
        ends = np.cumsum(read_lengths(file_of(prefix, "idx")), dtype=np.int64) - 1
        wrong = np.flatnonzero(tokens[np.minimum(ends, len(tokens) - 1)] != eod)
        if wrong.size or ends_seen != len(ends):
            which = (f"document {int(wrong[0]):,} does not end with one" if wrong.size
                     else "there are others")
            yield (f"{file_of(prefix, 'bin')}: end-of-document tokens are not the ends of the "
                   f"documents; {which}")


def _source_faults(prefix: str | Path, manifest: Manifest) -> Iterator[str]:
    """Finds inputs whose tokens are not the ones that were written."""
    tokens, start = _tokens(prefix, manifest), 0
    for source in manifest.sources:
        if source.bin_sha256 is None or source.tokens is None:
            continue
        digest = hashlib.sha256()
        end = start + source.tokens
        for first in range(start, end, _TOKENS):
            digest.update(np.ascontiguousarray(tokens[first : min(first + _TOKENS, end)]))
        if digest.hexdigest() != source.bin_sha256:
            yield (f"{file_of(prefix, 'bin')}, tokens {start:,} to {end:,}: another content than "
                   f"was made of {source.path}")
        start = end


def _tokenizer_faults(prefix: str | Path, manifest: Manifest) -> Iterator[str]:
    if manifest.tokenizer is None:
        return
    try:
        found = load_tokenizer(file_of(prefix, "tokenizer")).sha256
    except (ValueError, OSError) as error:
        yield str(error)
        return
    if found != manifest.tokenizer.sha256:
        yield (f"{file_of(prefix, 'tokenizer')} is {found} (sha256), and the manifest says "
               f"{manifest.tokenizer.sha256}")


def _tokens(prefix: str | Path, manifest: Manifest) -> np.ndarray:
    return np.memmap(file_of(prefix, "bin"), manifest.dtype, "r")


def _tokenizer_of(prefix: str | Path) -> Tokenizer | None:
    path = file_of(prefix, "tokenizer")
    return load_tokenizer(path) if path.exists() else None


def render(facts: dict[str, Any]) -> str:
    """Formats the result of `describe` as text."""
    manifest, lengths = facts["manifest"], facts["tokens_per_document"]
    lines = [f"{facts['prefix']}: {manifest['documents']:,} documents, {manifest['tokens']:,} "
             f"tokens of {manifest['dtype']}, "
             f"{(manifest['bin_bytes'] + manifest['idx_bytes']) / 1e6:,.1f} MB"]
    if part := ", ".join(filter(None, (manifest["split"], manifest["set_name"]))):
        lines.append(f"  part of a corpus: {part}")
    if manifest["text_bytes"]:
        lines.append(f"  text {manifest['text_bytes'] / 1e6:,.1f} MB, "
                     f"{facts['text_bytes_per_token']:.3f} bytes a token")
    if tokenizer := manifest["tokenizer"]:
        end = {True: "after every document", False: "left out",
               None: "unknown"}[manifest["append_eod"]]
        lines.append(f"  tokenizer {tokenizer['kind']} of {tokenizer['vocab_size']:,} ids, sha256 "
                     f"{tokenizer['sha256'][:16]}; end of document {tokenizer['eod']}, {end}")
    else:
        lines.append("  no manifest: made by another tool")
    if manifest["sources"]:
        lines.append(f"  {len(manifest['sources'])} inputs; {manifest['skipped']:,} records "
                     f"skipped, {manifest['empty']:,} empty, {manifest['duplicates']:,} duplicates")
    lines += [f"    {s['path']}: {s['documents']:,} documents, {s['size']:,} bytes, sha256 "
              f"{(s['sha256'] or '?')[:16]}"
              for s in manifest["sources"]]
    lines += [f"    skipped: {s['path']}, line {s['line']}: {s['reason']}"
              for s in manifest["skipped_lines"][:10]]
    lines.append("  tokens a document: "
                 + ", ".join(f"{name} {value:,.0f}" for name, value in lengths.items()))
    return "\n".join([*lines, *_render_histogram(facts["histogram"])])


def _render_histogram(classes: list[dict[str, int]]) -> list[str]:
    most, total = max(c["documents"] for c in classes), sum(c["tokens"] for c in classes)
    columns = [Column("tokens", lambda c: f"{c['from']:,} - {c['below'] - 1:,}", align="right"),
               Column("documents", form=","),
               Column("of all tokens", lambda c: c["tokens"] / total, ".1%"),
               Column("", lambda c: "#" * -(-_BAR * c["documents"] // most))]
    return [Table(columns, classes).text("  ")]


def plot_histogram(facts: dict[str, Any], path: Path) -> None:
    """Draws the shares of documents and of tokens by document length.

    Args:
        facts: result of `describe`.
        path: picture to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    classes = facts["histogram"]
    edges = [c["from"] for c in classes] + [classes[-1]["below"]]
    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=140)
    for key, style in (("documents", "-"), ("tokens", "--")):
        counts = [c[key] for c in classes]
        axes.stairs([count / sum(counts) for count in counts], edges, label=f"share of {key}",
                    linestyle=style)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens in a document", ylabel="share", title=facts["prefix"])
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
