"""NIST (Doddington 2002) as the official E2E scripts compute it, which no library tried does.

The E2E metrics hold two implementations that differ where inputs have different numbers of
references: a Perl script, mteval-v13a, and its Python port. Tokens are lower-cased, after
mteval-v13a.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from megatron_spdf.evaluation.metrics.metric import METRICS, Figure, Figures, Metric, by_part

MAX_N = 5
_PORT = "own, length penalty of the official metrics' Python port (measure_scores.py -p)"
_MTEVAL = "own, length penalty of the official metrics' mteval-v13a (Perl)"
# An output of 2/3 of the references' length gets half the score.
_BETA = -math.log(0.5) / math.log(1.5) ** 2


@by_part
def nist(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Figures:
    """NIST of raw texts with one reference or more each.

    Returns:
        NIST of the Python port, whose expected length is the sum over inputs of the mean length of
        their references; and NIST_mteval, whose expected length is the number of all reference
        tokens, times inputs, over references.
    """
    tokenize = Tokenizer13a()
    outputs = [tokenize(text.lower()).split() for text in predictions]
    targets = [[tokenize(text.lower()).split() for text in texts] for texts in references]
    pool = [text for texts in targets for text in texts]
    counts = Counter(gram for text in pool for n in range(1, MAX_N + 1) for gram in _grams(text, n))
    counts[()] = sum(map(len, pool))
    found = [math.fsum(_gained(output, texts, n, counts)
                       for output, texts in zip(outputs, targets, strict=True))
             for n in range(1, MAX_N + 1)]
    length = sum(map(len, outputs))
    mean_lengths = math.fsum(sum(map(len, texts)) / len(texts) for texts in targets)
    pooled_length = counts[()] / len(pool) * len(targets)
    port = _precision(found, [_places_port(outputs, n) for n in range(MAX_N)])
    perl = _precision(found, [_places_perl(outputs, n) for n in range(MAX_N)])
    return {"NIST": Figure(_brevity(length / mean_lengths) * port, _PORT),
            "NIST_mteval": Figure(_brevity(length / pooled_length) * perl, _MTEVAL)}


METRICS.register("nist", Metric(("NIST", "NIST_mteval"), nist))


def _grams(tokens: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def _gained(output: list[str], references: list[list[str]], n: int, counts: Counter) -> float:
    """Information, in bits, of the n-grams that the output shares with its references."""
    allowed: Counter = Counter()
    for reference in references:
        allowed |= Counter(_grams(reference, n))
    shared = Counter(_grams(output, n)) & allowed
    return math.fsum(times * math.log2(counts[gram[:-1]] / counts[gram])
                     for gram, times in shared.items())


def _precision(found: list[float], places: list[int]) -> float:
    return sum(information / count
               for information, count in zip(found, places, strict=True) if count > 0)


def _places_port(outputs: list[list[str]], n: int) -> int:
    """Number of n-grams in the outputs. In the port an output shorter than n counts negatively."""
    return sum(len(output) - n for output in outputs)


def _places_perl(outputs: list[list[str]], n: int) -> int:
    """Number of n-grams in the outputs. In the Perl script an output shorter than n counts zero."""
    return sum(max(len(output) - n, 0) for output in outputs)


def _brevity(ratio: float) -> float:
    """Brevity penalty, equation 4 of Doddington (2002)."""
    return 1.0 if ratio >= 1 else math.exp(-_BETA * math.log(ratio) ** 2) if ratio > 0 else 0.0
