"""Masks: the stored stream, exact counts, every entry equally likely."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from megatron_spdf.sparsity.patterns import unstructured
from megatron_spdf.sparsity.patterns.unstructured import draw_mask

QKV = "decoder.layers.0.self_attention.linear_qkv.weight"
FC2 = "decoder.layers.11.mlp.linear_fc2.weight"

# A changed hash means that checkpoints made before the change can no longer be resumed.
GOLDEN = {
    (0, QKV, 0, 64, 16): "a24d845b6688d989c4270660f07e51bf46ab99c3e92c5da142e84160181faac0",
    (0, QKV, 1, 64, 16): "a2fea136765134dc1dfaf2842d929ec5e3182580c077b1736875d34775a3d1b3",
    (1, QKV, 0, 64, 16): "f4fd0a1b8c8f85a6c51e413b51480b68081c3654c143eab921281054722bce33",
    (0, FC2, 0, 63, 7): "35e0e921dfe243c2fb5b2a8806be57027fcaf0348644f75cc24a3b3dfa20f38f",
    (7, FC2, 5, 1001, 250): "ee3279ce0e8db96b600d7828e370ad79f7e980d4fea6d259d9944621e1810064",
    (2147483648, QKV, 3, 1, 1): "76be8b528d0075f7aae98d6fa57a6d3c83ae480a8469e668d7b0af968995ac71",
    (1234, FC2, 11, 147456,
     36864): "5373a817137127cbad3bce96bf16514e8498f25cdade382cd751501f4dd5214d",
    (1234, QKV, 0, 147457,
     73728): "48ba3313504603a959f7e1bd0114e9e9082216671807c1af49d6ab21a2cd02f1",
}


@pytest.mark.parametrize("arguments", GOLDEN, ids=str)
def test_mask_is_the_stored_one(arguments):
    assert (
        hashlib.sha256(np.packbits(draw_mask(*arguments)).tobytes()).hexdigest()
        == GOLDEN[arguments]
    )


def test_positions_of_a_small_mask_are_the_stored_ones():
    assert np.flatnonzero(draw_mask(0, QKV, 0, 40, 10)).tolist() == [4, 6, 9, 20, 21, 27, 31, 32,
                                                                     35, 37]


@pytest.mark.parametrize("numel, active",
                         [(1, 1), (2, 1), (7, 7), (63, 1), (64, 16), (65, 64), (1001, 250)])
def test_exactly_k_entries_are_set(numel, active):
    mask = draw_mask(3, QKV, 1, numel, active)
    assert mask.shape == (numel,) and mask.dtype == bool
    assert np.count_nonzero(mask) == active


@pytest.mark.parametrize("active", [0, -1, 9])
def test_impossible_count_is_refused(active):
    with pytest.raises(AssertionError):
        draw_mask(0, QKV, 0, 8, active)


def test_mask_does_not_depend_on_what_was_drawn_before():
    keys = [(seed, name, slice_id) for seed in (0, 1) for name in (QKV, FC2) for slice_id in (0, 1)]
    forward = [draw_mask(*key, 128, 32) for key in keys]
    np.random.default_rng(0).random(5)
    backward = [draw_mask(*key, 128, 32) for key in reversed(keys)][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(forward, backward, strict=True))


def test_drawing_leaves_the_global_random_state_alone():
    before = np.random.get_state()[1].copy()
    draw_mask(0, QKV, 0, 128, 32)
    assert np.array_equal(before, np.random.get_state()[1])


def test_masks_of_other_seeds_names_and_slices_differ():
    drawn = {draw_mask(seed, name, slice_id, 256, 64).tobytes()
             for seed in (0, 1, 2) for name in (QKV, FC2, "w1", "w") for slice_id in (0, 1, 10)}
    assert len(drawn) == 3 * 4 * 3


def test_words_of_a_key_do_not_run_together():
    keys = [unstructured.stream_key(1, "w", 12), unstructured.stream_key(1, "w1", 2),
            unstructured.stream_key(11, "w", 2)]
    assert len({key.tobytes() for key in keys}) == 3


N, K, DRAWS = 64, 16, 4000


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    return np.array([draw_mask(0, QKV, slice_id, N, K) for slice_id in range(DRAWS)])


def test_every_position_is_equally_likely(drawn):
    expected = DRAWS * K / N
    chi_square = ((drawn.sum(axis=0) - expected) ** 2
                  / (expected * (1 - K / N))).sum() * (N - 1) / N
    assert N - 1 - 5 * (2 * N) ** 0.5 < chi_square < N - 1 + 5 * (2 * N) ** 0.5


@pytest.mark.parametrize("parity", [0, 1])
@pytest.mark.parametrize("distance", [1, 2, 32])
def test_positions_are_uncorrelated(drawn, distance, parity):
    left, right = drawn[:, parity:N - distance:2], drawn[:, parity + distance::2]
    together = np.count_nonzero(left & right)
    expected = left.size * K * (K - 1) / (N * (N - 1))
    assert abs(together - expected) < 5 * expected**0.5


def test_slices_are_uncorrelated(drawn):
    together = np.count_nonzero(drawn[:-1] & drawn[1:])
    expected = (DRAWS - 1) * K * K / N
    assert abs(together - expected) < 5 * expected**0.5


@pytest.mark.parametrize("words, active, positions", [
    ([5, 5, 5, 5, 5, 5], 2, [0, 1]),
    ([5, 1, 5, 9, 5, 5], 3, [0, 1, 2]),
    ([9, 5, 9, 5, 1, 5], 2, [1, 4]),
    ([0, 0, 0, 2**32 - 1, 0, 0], 6, [0, 1, 2, 3, 4, 5]),
])
def test_ties_are_broken_by_position(monkeypatch, words, active, positions):
    raw = np.array(words, dtype="<u4").view("<u8").astype(np.uint64)
    monkeypatch.setattr(unstructured, "Philox",
                        lambda key: type("Raw", (),
                                         {"random_raw": lambda self, count: raw[:count]})())
    assert np.flatnonzero(draw_mask(0, QKV, 0, len(words), active)).tolist() == positions
