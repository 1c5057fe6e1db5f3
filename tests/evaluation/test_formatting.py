"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bimos.evaluation import formatting


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (formatting.significant, 21.57, "21.6"),
        (formatting.significant, 0.003121, "0.00312"),
        (formatting.significant, 1234.5, "1,234"),
        (formatting.significant, 0, "0.00"),
        (formatting.significant, 3.2e9, "3.20e+09"),
        (formatting.bits, 1.2738, "1.274"),
        (formatting.count, 999, "999"),
        (formatting.count, 410_000, "410 k"),
        (formatting.count, 999_950, "1.00 M"),
        (formatting.size, 512, "512 B"),
        (formatting.size, 45_812_331, "45.8 MB"),
        (formatting.size, 1_360_000_000, "1.36 GB"),
        (formatting.duration, 3.21, "3.2 s"),
        (formatting.duration, 59.97, "1 min 00 s"),
        (formatting.duration, 1450, "24 min 10 s"),
        (formatting.duration, 7500, "2 h 05 min"),
        (formatting.factor, 3.7649, "3.76\N{MULTIPLICATION SIGN}"),
    ],
)
def test_examples(function, value, text):
    assert function(value) == text


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "12", True])
@pytest.mark.parametrize("name", ["significant", "bits", "count", "size", "duration", "factor"])
def test_what_is_no_number_is_a_dash(name, value):
    assert getattr(formatting, name)(value) == formatting.DASH


@given(st.floats(1e-3, 1e15))
def test_three_digits_keep_the_value(value):
    number, _, prefix = formatting.count(value).partition(" ")
    scale = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[prefix]
    assert float(number.replace(",", "")) * scale == pytest.approx(value, rel=6e-3, abs=0.5)
