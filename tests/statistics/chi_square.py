"""The chi-square test, as the statistical tests use it."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

ALPHA = 1e-3  # chance that one test of a correct sampler fails; seeds are fixed, so it fails always or never


def z_score(counts: np.ndarray, probabilities: np.ndarray | None = None) -> float:
    """How far counts are from what is expected, as a standard normal (Wilson and Hilferty 1931).

    Args:
        counts: Observations per cell, of any shape.
        probabilities: The cells' expected shares, of the same shape; None is equal shares.
    """
    counts = np.asarray(counts, dtype=float).ravel()
    shares = np.full(counts.size, 1 / counts.size) if probabilities is None else np.ravel(probabilities)
    assert not counts[shares == 0].any(), "a cell that cannot occur did"
    counts, expected = counts[shares > 0], counts.sum() * shares[shares > 0]
    assert expected.min() >= 5, f"too few observations: a cell expects {expected.min():.1f}"
    freedom = counts.size - 1
    chi_square = ((counts - expected) ** 2 / expected).sum()
    spread = 2 / (9 * freedom)
    return float(((chi_square / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5)


def fits(counts: np.ndarray, probabilities: np.ndarray | None = None) -> bool:
    """Whether a chi-square test of size ALPHA accepts the counts."""
    return z_score(counts, probabilities) < NormalDist().inv_cdf(1 - ALPHA)


def follows(counts: np.ndarray, probabilities: np.ndarray) -> bool:
    """`fits` for any distribution: cells too rare for it are counted as one, impossible ones must be empty.

    Args:
        counts: Observations per cell, of any shape.
        probabilities: The cells' expected shares, of the same shape.
    """
    counts, shares = np.ravel(counts), np.ravel(probabilities)
    if counts[shares == 0].any():
        return False
    order = np.argsort(shares)[(shares == 0).sum() :]
    counts, shares = counts[order], shares[order]
    expected = shares * counts.sum()
    num_rare = max(np.searchsorted(expected, 5), np.searchsorted(expected.cumsum(), 5) + 1)
    cells = [0, *range(num_rare, counts.size)]
    return fits(np.add.reduceat(counts, cells), np.add.reduceat(shares, cells))
