"""What makes a claim hold, and how it is written."""

from __future__ import annotations

import json
import math

from gvpo.lab.claim import above, below, brief, claim, near, shown


def test_bounds_are_strict() -> None:
    assert below("x", 0.9, 1).holds and not below("x", 1, 1).holds
    assert above("x", 1.1, 1).holds and not above("x", 1, 1).holds
    assert near("x", 2.05, 2, 0.1).holds and not near("x", 2.2, 2, 0.1).holds and not near("x", 1.8, 2, 0.1).holds


def test_what_is_not_finite_never_holds() -> None:
    for value in (math.nan, math.inf, -math.inf):
        assert not below("x", value, 1).holds
        assert not above("x", value, 1).holds
        assert not shown("x", value).holds
        assert not shown("x", [0.0, value]).holds
    assert shown("x", [1.0, 2.0]).holds


def test_a_claim_holds_if_all_of_its_checks_do() -> None:
    assert claim("a/b", "s", below("x", 0, 1), above("y", 2, 1)).holds
    assert not claim("a/b", "s", below("x", 0, 1), above("y", 0, 1)).holds


def test_an_entry_is_strict_json() -> None:
    checks = (below("x", math.nan, 1e-6), shown("ys", [1, math.inf]), near("z", 2, 2, 0.1))
    entry = claim("a/b", "what is stated", *checks).as_dict()
    assert json.loads(json.dumps(entry, allow_nan=False)) == {
        "claim": "a/b",
        "statement": "what is stated",
        "measured": {"x": None, "ys": [1.0, None], "z": 2.0},
        "tolerance": {"x": "< 1e-06", "ys": "reported", "z": "2 +- 0.1"},
        "holds": False,
    }


def test_numbers_are_brief() -> None:
    assert brief(1.23456e-9) == "1.23e-09"
    assert brief([3.0, 0.5, 12.0]) == "0.5 .. 12"
