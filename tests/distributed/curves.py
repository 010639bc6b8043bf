"""Losses and gradient norms of runs that must be the same."""

import pytest


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
