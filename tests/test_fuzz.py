"""Damaged inputs end in a right result or in one clear line: 60 of the cases that tests/fuzz.py has without end."""
import pytest

import fuzz


@pytest.mark.parametrize("n", range(60))
def test_a_mutated_input_ends_in_a_right_result_or_one_clear_line(n):
    done, problem = fuzz.case(n, seed=1)
    assert problem is None, f"{done}\n{problem}"
