"""What each pass does, as listings before and after; `listings/*.ir` are the page to read."""

from __future__ import annotations

import pytest

from cortexflow.ir import parse
from tests.passes.listing import FOLDER, PASSES, Case, cases, listed

CASES = [case for name in PASSES for case in cases(name)]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.passed}: {c.title}")
def test_before_and_after(case: Case) -> None:
    expected = case.before if case.unchanged else case.after
    # both sides are printed by the same printer: a listing may be written with any names and numbers
    assert listed(parse(case.run())) == listed(parse(expected))


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.passed}: {c.title}")
def test_a_case_says_whether_it_changes_anything(case: Case) -> None:
    assert case.unchanged == (listed(parse(case.run())) == listed(parse(case.before)))


def test_every_listing_has_its_pass() -> None:
    assert {path.stem for path in FOLDER.glob("*.ir")} == set(PASSES)
