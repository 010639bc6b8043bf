"""Bytes of a micro-batch's tensors on a rank."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """A micro-batch of T B tokens on a tensor-parallel rank.

    Attributes:
        width: bytes a value.
        length: T, of a sequence.
        tokens: T B.
        tensor: the tensor-parallel degree, t.
        share: of what lies between layers, 1/t under sequence parallelism, else 1.
        whole: bytes of a tensor (T, B, h).
    """

    width: int
    length: int
    tokens: int
    tensor: int
    share: float
    whole: int

    @property
    def hidden(self) -> int:
        """Bytes of a tensor (T, B, h) as it is kept between layers."""
        return int(self.whole * self.share)

    def sharded(self, features: int) -> int:
        """Bytes of a tensor (T, B, features), whose features tensor parallelism shards."""
        return self.width * self.tokens * features // self.tensor
