"""Damaged inputs end in a right result or in one clear line: 60 of the cases that tests/fuzz.py has without end."""
import pytest

import fuzz


@pytest.mark.parametrize("kind", range(len(fuzz.KINDS)), ids=[kind.__name__ for kind in fuzz.KINDS])
def test_mutated_inputs_end_in_a_right_result_or_one_clear_line(kind):
    assert fuzz.run_cases(range(kind, 60, len(fuzz.KINDS)), seed=1) == {"wrong": 0, "unclear": 0}
