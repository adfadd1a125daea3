"""Messages of other libraries inside of ours."""

import pytest

from fxquant.errors import in_short


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a\n  b\tc"), "ValueError: a b c"),
        (RuntimeError(), "RuntimeError"),
        (KeyError("name"), "KeyError: 'name'"),
        (RuntimeError("x" * 500), "RuntimeError: " + "x" * 300),
    ],
)
def test_an_error_is_told_on_one_line(error, line):
    assert in_short(error) == line
