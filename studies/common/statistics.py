"""Statistics of paired comparisons over seeds, test images and data sets.

One data set: the mean difference over pairs of seeds, with a t interval, or, where the
contributions of single images are kept, with a bootstrap over seeds and images at once. Several
data sets: random effects with the Hartung-Knapp interval, I2 and leave-one-out. Holm's adjustment
over the primary family; equivalence by two one-sided tests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from scipy import stats
from statsmodels.stats.meta_analysis import combine_effects
from statsmodels.stats.multitest import multipletests

TINY = 1e-24  # in the place of 0, where every pair differs by the same


@dataclass(frozen=True)
class Effect:
    """A mean difference of one data set with its squared standard error and 95% interval."""

    mean: float
    variance: float
    low: float
    high: float
    pairs: int


@dataclass(frozen=True)
class Pooled:
    """A mean over data sets by random effects, with the Hartung-Knapp 95% interval.

    ``error`` and ``freedom`` are those of its t distribution; ``i2`` is the share of the variance
    between data sets that is not sampling error, in [0, 1]. Where few data sets agree by chance,
    the interval of Hartung and Knapp is too short: ``wide_low`` and ``wide_high`` take the larger
    of its error and the usual one (Roever et al., BMC Medical Research Methodology 15, 2015).
    """

    mean: float
    low: float
    high: float
    p: float
    i2: float
    error: float
    freedom: int
    wide_low: float
    wide_high: float

    def to_row(self) -> dict[str, float]:
        """Returns what tables show of it."""
        shown = ("mean", "low", "high", "wide_low", "wide_high", "p", "i2")
        return {name: getattr(self, name) for name in shown}


def over_seeds(differences: Sequence[float]) -> Effect:
    """Returns the mean of paired differences with its t interval, which counts seeds alone.

    Raises:
        ValueError: If there are fewer than two.
    """
    if len(differences) < 2:
        raise ValueError(f"an interval needs two pairs or more, got {len(differences)}")
    mean, error = float(np.mean(differences)), float(stats.sem(differences))
    reach = error * float(stats.t.ppf(0.975, len(differences) - 1))
    return Effect(mean, error**2, mean - reach, mean + reach, len(differences))


def over_seeds_and_images(
    differences: np.ndarray, strata: np.ndarray, *, resamples: int = 4000, seed: int = 0
) -> Effect:
    """Returns the mean over pairs of seeds with an interval that counts seeds and test images.

    Both are drawn again at once, images within their class; the variance of this bootstrap is
    slightly too large, never too small (Owen, Annals of Applied Statistics 1, 2007). A few pairs
    drawn again vary too little: their share is made up for, and the interval is that of a t
    distribution with one degree of freedom less than there are pairs.

    Args:
        differences: (pairs, images), contributions of images to arm minus plain; each row sums to
            the difference of that pair.
        strata: (images,), the class of each image.
        resamples: Number of draws.
        seed: Of the draws.

    Raises:
        ValueError: If there are fewer than two pairs.
    """
    pairs, images = differences.shape
    if pairs < 2:
        raise ValueError(f"an interval needs two pairs or more, got {pairs}")
    generator = np.random.default_rng(seed)
    seeds = generator.multinomial(pairs, [1 / pairs] * pairs, resamples) / pairs
    drawn = np.empty((resamples, images))
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        even = [1 / len(members)] * len(members)
        drawn[:, members] = generator.multinomial(len(members), even, resamples)
    values = ((seeds @ differences) * drawn).sum(1)
    mean = float(differences.sum(1).mean())
    variance = float(values.var(ddof=1)) * pairs / (pairs - 1)
    reach = sqrt(variance) * float(stats.t.ppf(0.975, pairs - 1))
    return Effect(mean, variance, mean - reach, mean + reach, pairs)


# -- several data sets -----------------------------------------------------------------------------


def random_effects(effects: Sequence[Effect]) -> Pooled:
    """Pools data sets by random effects (DerSimonian and Laird) with the Hartung-Knapp interval.

    statsmodels estimates the variance between data sets; where the estimate is negative it is 0.

    Raises:
        ValueError: If there are fewer than two.
    """
    if len(effects) < 2:
        raise ValueError(f"random effects need two data sets or more, got {len(effects)}")
    means = np.array([effect.mean for effect in effects])
    variances = np.array([max(effect.variance, TINY) for effect in effects])
    with np.errstate(divide="ignore", invalid="ignore"):  # it goes on with a negative variance
        found = combine_effects(means, variances, method_re="chi2")
    weights = 1 / (variances + max(0.0, float(found.tau2)))
    mean, usual = float(np.average(means, weights=weights)), 1 / sqrt(weights.sum())
    freedom = len(effects) - 1
    error = max(TINY, usual * sqrt(float(weights @ (means - mean) ** 2) / freedom))
    quantile, i2 = float(stats.t.ppf(0.975, freedom)), max(0.0, float(found.i2))
    reach, wide = quantile * error, quantile * max(error, usual)
    p = 2 * float(stats.t.sf(abs(mean) / error, freedom))
    return Pooled(
        *(mean, mean - reach, mean + reach, p, i2, error, freedom, mean - wide, mean + wide)
    )


def leave_one_out(effects: Mapping[str, Effect]) -> dict[str, Pooled]:
    """Returns data set -> the pooled effect of all others; needs three data sets or more."""
    return {
        name: random_effects([effect for other, effect in effects.items() if other != name])
        for name in effects
    }


def holm(ps: Mapping[str, float]) -> dict[str, float]:
    """Returns Holm's adjusted p-values of a family."""
    adjusted = multipletests(list(ps.values()), method="holm")[1]
    return {name: float(p) for name, p in zip(ps, adjusted, strict=True)}


def equivalence(pooled: Pooled, margin: float) -> dict[str, float]:
    """Tests whether a difference lies within a margin of 0.

    Returns:
        ``loss``: p of the one-sided test that the mean is above ``-margin`` (not inferior);
        ``p``: the larger of both one-sided tests (equivalent).

    Raises:
        ValueError: If the margin is not positive.
    """
    if margin <= 0:
        raise ValueError(f"the margin must be positive, got {margin}")
    above = float(stats.t.sf((pooled.mean + margin) / pooled.error, pooled.freedom))
    below = float(stats.t.cdf((pooled.mean - margin) / pooled.error, pooled.freedom))
    return {"loss": above, "p": max(above, below)}
