"""Read .zst files to their true end."""

from __future__ import annotations

import io
from typing import BinaryIO

import zstandard

_INPUT_BYTES = 1 << 16
# Shards written with `zstd --long=31` need this window; a frame allocates only what it declares.
_MAX_WINDOW_BYTES = 1 << 31


class ZstdStream(io.RawIOBase):
    """The decompressed bytes of all frames of a .zst file.

    `zstandard`'s own stream reader takes a file cut off inside a frame for a shorter file; this one
    raises.

    Raises:
        EOFError: on a read, where the file ends inside a frame.
        zstandard.ZstdError: on a read, where a frame is damaged.
    """

    def __init__(self, compressed: BinaryIO):
        self._compressed = compressed
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
        self._frame = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._output:
            if not self._decompress():
                return 0
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def _decompress(self) -> bool:
        """Decompress the next piece of input; False at the end of the file."""
        piece = self._input or self._compressed.read(_INPUT_BYTES)
        if not piece:
            if self._frame is not None:
                raise EOFError("the file ends inside a zstd frame")
            return False
        frame = self._frame or self._decompressor.decompressobj()
        self._output = memoryview(frame.decompress(piece))
        self._input = frame.unused_data if frame.eof else b""
        self._frame = None if frame.eof else frame
        return True
