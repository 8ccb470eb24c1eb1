import math

import pytest
from peft_kernels.bench.stats import Sample, clean_rounds, clean_seconds, median_band, paired_ratios


def sample(seconds, share=1.0):
    return Sample(wall=seconds, cpu=seconds * share, calls=1)


@pytest.mark.parametrize(("n", "rank"), [(6, 1), (8, 1), (9, 2), (20, 6), (100, 40)])
def test_band_takes_the_tabulated_order_statistics(n, rank):
    # Ranks of the 95 % interval for a median: any table of the sign test.
    band = median_band(list(range(1, n + 1)))
    assert (band.low, band.high) == (rank, n + 1 - rank)
    assert band.median == (n + 1) / 2


def test_band_covers_the_median_as_often_as_promised():
    n, rank = 20, 6
    outside = 2 * sum(math.comb(n, i) for i in range(rank)) / 2**n
    assert 1 - outside >= 0.95
    assert 1 - outside - 2 * math.comb(n, rank) / 2**n < 0.95  # and no narrower band would


def test_band_ignores_order_and_one_outlier():
    values = [1.0, 1.1, 0.9, 1.05, 0.95, 1.02, 0.98, 1.01, 50.0]
    band = median_band(values)
    assert band.median == 1.01
    assert band.high == 1.1
    assert median_band(values[::-1]) == band


def test_one_thread_drops_rounds_in_which_cpu_and_wall_time_disagree():
    rounds = [sample(1.0), sample(2.0, share=0.5), sample(1.0, share=1.2), sample(1.0, share=0.96), None]
    assert clean_rounds(rounds, threads=1) == [True, False, False, True, False]


def test_threads_are_compared_with_the_contestants_own_share():
    serial_half = [sample(1.0, share=1.5)] * 7 + [sample(1.4, share=1.07)]
    assert clean_rounds(serial_half, threads=2) == [True] * 7 + [False]


def test_ratio_is_of_paired_undisturbed_rounds_only():
    ours = [sample(1.0), sample(2.0), sample(9.0, share=0.2), sample(1.0), sample(1.0)]
    baseline = [sample(3.0), sample(6.0), sample(3.0), sample(30.0, share=0.1), None]
    assert paired_ratios(baseline, ours, threads=1) == [3.0, 3.0]
    assert clean_seconds(ours, threads=1) == [1.0, 2.0, 1.0, 1.0]


def test_ratio_follows_a_machine_that_changes_speed():
    # Both slow down threefold half way: medians of each alone would mix speeds, pairs do not.
    speeds = [1.0] * 5 + [3.0] * 5
    ours, baseline = ([sample(base * speed) for speed in speeds] for base in (1.0, 2.0))
    assert set(paired_ratios(baseline, ours, threads=1)) == {2.0}
