"""Losses and gradient norms of runs that must be the same."""

import numpy as np
import pytest

TIE = 1e-6  # of magnitudes up to 0.1: what sixty steps leave of rounding in fp32


def close(there: list[tuple[float, float]], reference: list[tuple[float, float]],
          tolerance: float = 1e-5) -> None:
    """Asserts that (loss, gradient norm) of every step agree."""
    assert len(there) == len(reference)
    for (loss, norm), (loss_there, norm_there) in zip(there, reference, strict=True):
        assert loss == pytest.approx(loss_there, rel=tolerance)
        # a root of a sum over all weights
        assert norm == pytest.approx(norm_there, rel=10 * tolerance)


def close_runs(there: dict, reference: dict, tolerance: float = 1e-5) -> None:
    """Asserts that the curves and the validation losses of `cases.train` agree."""
    close(there["curve"], reference["curve"], tolerance)
    assert there["valid"] == pytest.approx(reference["valid"], rel=tolerance)


def close_but_for_ties(found: list[dict], expected: dict) -> None:
    """Asserts that losses of all steps, and weights at the end, agree to rounding.

    The run chose masks whenever the other one did that it followed. What it would have chosen
    otherwise were ties within rounding, and few; see followed.py.

    Args:
        found: of each rank: `losses`, `weights`, and what `Choices.followed` has.
        expected: `losses` and `weights` of the other run, and the `keys` of its choices.
    """
    assert set().union(*(rank["taken"] for rank in found)) == expected["keys"]
    assert len(found[0]["losses"]) == len(expected["losses"])
    assert found[0]["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert max(rank["gap"] for rank in found) < TIE
    active = sum(int((w != 0).sum()) for w in expected["weights"].values())
    assert sum(rank["flips"] for rank in found) <= 1e-3 * active
    for name, w in found[0]["weights"].items():
        assert np.array_equal(w != 0, expected["weights"][name] != 0), name
        np.testing.assert_allclose(w, expected["weights"][name], atol=1e-5, err_msg=name)
