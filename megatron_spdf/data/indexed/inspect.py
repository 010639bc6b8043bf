"""Describes a data set, decodes its documents, and verifies every byte against its manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_spdf.data.indexed.index_file import read_index, tokens_of_documents
from megatron_spdf.data.indexed.manifest import CORPUS, Manifest, check_prefix, file_of, read_corpus
from megatron_spdf.data.indexed.tokens import (
    PIECE_TOKENS,
    DataFault,
    IndexedTokens,
    pieces,
)
from megatron_spdf.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megatron_spdf.files import save_figure
from megatron_spdf.tables import Column, Table
from megatron_spdf.text import label

_BAR = 40  # characters of the longest bar


def data_sets(prefix: str | Path) -> list[str]:
    """Lists the prefixes of the data sets at `prefix`: itself, or those of a directory of data
    sets, by its list or by their names."""
    directory = Path(prefix)
    if (directory / CORPUS).is_file():
        return [str(directory / name) for name in read_corpus(prefix).data_sets]
    if file_of(prefix, "idx").is_file():
        return [str(prefix)]
    return sorted(str(path.with_suffix("")) for path in directory.glob("*.idx")) or [str(prefix)]


def describe_all(prefixes: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """`describe` of each that is whole, and what is wrong with the others.

    Raises:
        ValueError: none is whole.
    """
    described, faults = [], []
    for prefix in prefixes:
        try:
            described.append(describe(prefix))
        except ValueError as error:
            faults.append(str(error))
    if not described:
        raise ValueError("\n".join(faults))
    return described, faults


def describe(prefix: str | Path) -> dict[str, Any]:
    """Collects manifest, sizes and document lengths of one data set, as plain values.

    Raises:
        ValueError: files are missing, or have other sizes than the manifest says.
    """
    manifest = check_prefix(prefix)
    lengths = tokens_of_documents(file_of(prefix, "idx"))
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
    next; empty documents are a class of their own.

    Args:
        lengths: (documents,), tokens of each document.
    """
    classes = np.frexp(lengths.astype(np.float64))[1]  # of length n: floor(log2 n) + 1, of 0: 0
    documents = np.bincount(classes)
    tokens = np.bincount(classes, weights=lengths)
    first = int(np.flatnonzero(documents)[0])
    return [{"from": 2**i // 2, "below": 2**i, "documents": int(documents[i]),
             "tokens": int(tokens[i])}
            for i in range(first, len(documents))]


def sample(prefix: str | Path, number: int, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """Decodes one document.

    Args:
        number: of the document, counted from 0.
        tokenizer: default: the copy beside the data set.

    Returns:
        Its token ids, its text, and the input file that it came from.

    Raises:
        ValueError: there is no such document, or no tokenizer to decode it with.
    """
    manifest, index = check_prefix(prefix), read_index(file_of(prefix, "idx"))
    if not 0 <= number < manifest.documents:
        raise ValueError(f"{prefix} holds documents 0 to {manifest.documents - 1:,}; there is no "
                         f"document {number:,}")
    tokenizer = tokenizer or _tokenizer_of(prefix)
    if tokenizer is None:
        raise ValueError(f"{prefix}.tokenizer is missing, and nothing else says how to decode the "
                         "tokens; name a tokenizer with --tokenizer")
    tokens = IndexedTokens(prefix, tokenizer.vocab_size)
    first, end = index.document_ends[number : number + 2].tolist()
    ids = [i for sequence in range(first, end) for i in tokens.get(sequence).tolist()]
    ends = np.cumsum([source.documents for source in manifest.sources])
    place = int(np.searchsorted(ends, number, side="right"))
    return {"document": number, "tokens": len(ids),
            "source": manifest.sources[place].path if len(ends) else None, "ids": ids,
            "text": tokenizer.decode(ids)}


def verify(prefix: str | Path, tokenizer: Tokenizer | None = None) -> list[str]:
    """Reads every byte of a data set and compares it with its manifest.

    Args:
        tokenizer: that the ids must belong to; default: the one of the manifest.

    Returns:
        Faults, as sentences; none if the data set is sound.
    """
    try:
        manifest = check_prefix(prefix, tokenizer and tokenizer.sha256)
    except (ValueError, OSError) as error:
        return [str(error)]
    recorded = tokenizer or manifest.tokenizer
    try:
        for _ in pieces(IndexedTokens(prefix, recorded and recorded.vocab_size)):
            pass
    except DataFault as fault:
        return [str(fault)]
    return [
        *_index_faults(prefix, manifest),
        *_end_faults(prefix, manifest),
        *_source_faults(prefix, manifest),
        *_tokenizer_faults(prefix, manifest),
    ]


def highest_id(prefix: str | Path) -> int:
    """The highest token id of a data set."""
    return max(int(piece.max()) for piece in pieces(IndexedTokens(prefix)))


def verify_corpus(prefix: str | Path, tokenizer: Tokenizer | None = None) -> list[str]:
    """Verifies a directory of data sets: each of them, and that their counts add up.

    Returns:
        Faults, as sentences.
    """
    corpus, faults = read_corpus(prefix), []
    for name, counts in corpus.data_sets.items():
        path = str(Path(prefix) / name)
        found = verify(path, tokenizer)
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
    if manifest.idx_sha256 and hashlib.sha256(path.read_bytes()).hexdigest() != manifest.idx_sha256:
        yield f"{path} has another content than was written"


def _end_faults(prefix: str | Path, manifest: Manifest) -> Iterator[str]:
    """Finds end-of-document tokens anywhere but at the ends of documents."""
    if not (manifest.tokenizer and manifest.append_eod):
        return
    eod, tokens = manifest.tokenizer.eod, IndexedTokens(prefix)
    seen, lengths = 0, tokens_of_documents(file_of(prefix, "idx"))
    missing = [first for first in np.flatnonzero(lengths == 0)[:1].tolist()]
    ends, first = np.cumsum(lengths) - 1, 0
    for piece in pieces(tokens):
        seen += int((piece == eod).sum())
        here = ends[np.searchsorted(ends, first) : np.searchsorted(ends, first + len(piece))]
        wrong = here[piece[here - first] != eod]
        missing += np.searchsorted(ends, wrong[:1]).tolist()
        first += len(piece)
    if missing or seen != len(ends):
        which = (f"document {missing[0]:,} does not end with one" if missing
                 else "there are others")
        yield (f"{file_of(prefix, 'bin')}: end-of-document tokens are not the ends of the "
               f"documents; {which}")


def _source_faults(prefix: str | Path, manifest: Manifest) -> Iterator[str]:
    """Finds inputs whose tokens are not the ones that were written."""
    tokens, start = IndexedTokens(prefix), 0
    for source in manifest.sources:
        if source.tokens is None:
            return  # nor is it known where the next ones begin
        end = start + source.tokens
        if source.bin_sha256 and _sha256_of(tokens, start, end) != source.bin_sha256:
            yield (f"{file_of(prefix, 'bin')}, tokens {start:,} to {end:,}: another content than "
                   f"was made of {source.path}")
        start = end


def _sha256_of(tokens: IndexedTokens, start: int, end: int) -> str:
    digest = hashlib.sha256()
    for first in range(start, end, PIECE_TOKENS):
        digest.update(tokens.read(first, min(PIECE_TOKENS, end - first)))
    return digest.hexdigest()


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
    axes.set_xscale("log" if edges[0] else "symlog", base=2)  # empty documents lie at 0
    axes.set(xlabel="tokens in a document", ylabel="share", title=label(facts["prefix"]))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    save_figure(figure, path)
    pyplot.close(figure)
