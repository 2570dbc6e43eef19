"""The rule that chooses peaks, on tables worked out by hand and on simulated ones."""

import numpy as np
import pytest

from fomo.guide.tuning import choose_peak, noise_of

START = [40.0, 42.0]


def test_noise_is_the_standard_error_of_a_difference_without_what_seeds_share():
    """Two rows: that of a paired t-test. By hand: differences 1 and 3, their variance 2, over two seeds 1."""
    assert noise_of(np.array([[50.0, 60.0], [51.0, 63.0]])) == pytest.approx(1.0)
    rng = np.random.default_rng(0)
    tables = rng.normal(0, 3, (4000, 1, 3)) + rng.normal(0, 1, (4000, 4, 3))
    assert np.mean([noise_of(t) ** 2 for t in tables]) == pytest.approx(2 / 3, rel=0.05)


def test_ties_within_the_noise_go_to_the_smaller_peak():
    gm = {1e-2: [50.0, 60.0], 1e-3: [49.5, 59.9], 1e-4: [45.0, 52.0]}  # any order of peaks
    choice = choose_peak(gm, START)
    assert choice.peak == 1e-3 and choice.tied == (1e-3, 1e-2) and not choice.at_end
    clear = {1e-2: [50.0, 60.0], 1e-3: [45.0, 55.1], 1e-4: [40.0, 50.0]}
    assert choose_peak(clear, START).peak == 1e-2 and choose_peak(clear, START).at_end


def test_a_peak_below_the_untouched_model_loses_to_any_that_is_not():
    """Without the rule 1e-4 would tie with the best, whose noise is large, and be the smallest."""
    gm = {1e-4: [40.9, 40.9], 1e-3: [38.0, 46.0], 1e-2: [46.0, 38.2]}
    choice = choose_peak(gm, START)
    assert choice.noise > 1 and choice.peak == 1e-3 and choice.tied == (1e-3, 1e-2)
    assert choose_peak(gm, [60.0, 60.0]).harmful and choose_peak(gm, [60.0, 60.0]).peak == 1e-4


def test_equal_peaks_are_told_apart_seldom():
    """Of four equal trials the smallest is chosen far more often than in the quarter in which it scores best."""
    rng = np.random.default_rng(1)
    tables = rng.normal(50, 1, (1000, 4, 3))
    chosen = [choose_peak(dict(enumerate(table)), [0, 0, 0]).peak for table in tables]
    assert np.mean(np.array(chosen) == 0) > 0.4


def test_one_seed_has_no_noise_to_compare_by():
    with pytest.raises(ValueError, match="no noise"):
        choose_peak({1e-3: [50.0], 1e-2: [51.0]}, [40.0])
