"""How many tokens go through the LM head together, so that logits of a micro-batch never exist as
a whole."""

from __future__ import annotations

# at once: 2,668 tokens of GPT-2's vocabulary in fp32, enough to fill a GPU
LOGITS_BYTES = 512 * 2**20


def tokens_at_once(rows: int, tokens: int, width: int = 4) -> int:
    """Tokens of a micro-batch that go through the LM head together: all of them, or as many as have
    `LOGITS_BYTES` of logits, in chunks of one size but for the last.

    Args:
        rows: of the LM head, on this tensor-parallel rank.
        tokens: of the micro-batch, T B.
        width: bytes of a logit.
    """
    chunks = -(-tokens // max(1, LOGITS_BYTES // (width * rows)))
    return -(-tokens // chunks)


def tokens_beside_teacher(rows: int, tokens: int) -> int:
    """`tokens_at_once` where a teacher's logits lie beside the student's and their difference, in
    fp32.

    Args:
        rows, tokens: see there.
    """
    return tokens_at_once(3 * rows, tokens)
