"""Parts of messages: sizes, and texts that a terminal shows as they are."""

import pytest

from lavis_cir_plugin.core.error_messages import first_line, size_text


def test_the_first_line_of_an_error_has_no_terminal_codes():
    assert first_line(ValueError("\x1b[1mbold\x1b[0m \x07bell\nsecond")) == r"bold \x07bell"
    assert first_line(ValueError()) == "ValueError"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1_500, "1.5 kB"), (2_000_000, "2.0 MB"), (4e9, "4.0 GB")]
)
def test_sizes_are_written_in_the_unit_that_shows_them(count, text):
    assert size_text(count) == text
