"""A value that is null, NaN or infinite never ranks first, wherever it stands."""

import itertools
import math

import pytest

from ddt.metrics.ranking import better, is_number, ranked

NO_NUMBERS = [None, math.nan, math.inf, -math.inf, True, "0", 10**400]


def test_what_is_a_number():
    assert all(map(is_number, (0, -1.5, 1e308)))
    assert not any(map(is_number, NO_NUMBERS))


@pytest.mark.parametrize("worthless", NO_NUMBERS, ids=str)
def test_only_finite_values_are_ranked(worthless):
    for values in itertools.permutations([("a", 2.0), ("b", 1.0), ("c", worthless), ("d", 0)]):
        assert ranked(dict(values), "fid_5k") == ["d", "b", "a"]
        assert ranked(dict(values), "recall") == ["a", "b", "d"]
    assert ranked({"a": worthless}, "fid") == []
    assert ranked({"b": 1, "a": 1.0}, "recall") == ["b", "a"]


def test_directions():
    assert {better(name) for name in ("fid", "sfid_5k", "fd_digits_1k", "validation_loss")} == {"lower"}
    assert {better(name) for name in ("inception_score", "precision_1k", "authenticity")} == {"higher"}
    assert better("grad_norm") is None
