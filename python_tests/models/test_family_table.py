"""README's table of families says what quantizing each of them does."""

import family_table
import pytest
import transformers


@pytest.mark.skipif(transformers.__version__ < "5", reason="modules have other names under transformers 4")
def test_the_table_is_what_the_families_do() -> None:
    made = family_table.table()
    assert made == family_table.in_readme(), "python python_tests/models/family_table.py writes it"
    assert made.count("\n") > 20
