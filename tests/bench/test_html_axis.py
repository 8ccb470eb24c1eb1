"""Axes of the report's charts."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft_kernels.bench.html.axis import Axis, log_axis, spread


@pytest.mark.parametrize(
    ("axis", "most", "ticks"),
    [
        (Axis(1, 1000, 0, 100), 5, [1, 10, 100, 1000]),
        (Axis(1, 4096, 0, 100, 2), 7, [1, 4, 16, 64, 256, 1024, 4096]),
        (Axis(1, 1e8, 0, 100), 5, [1, 100, 1e4, 1e6, 1e8]),
        (Axis(0.4, 60, 0, 100), 8, [0.5, 1, 2, 5, 10, 20, 50]),  # too few powers of ten
        (Axis(0.4, 60, 0, 100), 5, [1, 3, 10, 30]),
        (Axis(2, 4, 0, 100), 4, [2, 2.5, 3, 3.5, 4]),
        (Axis(0, 108, 0, 100, None), 6, [0, 20, 40, 60, 80, 100]),
    ],
)
def test_ticks_are_round_numbers(axis, most, ticks):
    assert axis.ticks(most) == pytest.approx(ticks)


def test_a_place_is_by_the_logarithm_and_never_off_the_axis():
    axis = Axis(1, 100, 50, 250)
    assert [axis.at(value) for value in (1, 10, 100)] == [50, 150, 250]
    assert (axis.at(0), axis.at(1e9)) == (50, 250)
    assert Axis(0, 10, 300, 100, None).at(2.5) == 250  # y grows downwards


positive = st.floats(1e-12, 1e12)


@given(st.lists(positive, max_size=20), st.sampled_from([2, 10]), st.integers(3, 12))
def test_all_values_are_on_their_axis_which_has_ticks(values, base, most):
    axis = log_axis([*values, 0.0], 0, 100, base)
    assert all(axis.low < value < axis.high for value in values)
    assert axis.high / axis.low >= 4 * (1 - 1e-9)
    ticks = axis.ticks(most)
    assert len(ticks) >= 1
    assert len(ticks) <= most + 1
    assert all(axis.low <= tick * (1 + 1e-9) and tick <= axis.high * (1 + 1e-9) for tick in ticks)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8))
def test_labels_are_spread_without_leaving_the_chart(places):
    moved = spread(places, 12.0, 0.0, 100.0)
    order = sorted(range(len(places)), key=places.__getitem__)
    for before, after in itertools.pairwise(order):
        assert moved[after] - moved[before] >= 12 - 1e-9
    assert min(moved) >= -1e-9
    assert max(moved) <= 100 + 1e-9


def test_labels_that_are_apart_stay():
    assert spread([80.0, 10.0, 40.0], 12.0, 0.0, 100.0) == [80.0, 10.0, 40.0]
