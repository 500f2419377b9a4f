"""Parts of messages: sizes, and texts that a terminal shows as they are."""

import pytest
from omegaconf import OmegaConf

from lavis_cir_plugin.core.error_messages import first_line, option, size_text


def test_the_first_line_of_an_error_has_no_terminal_codes():
    assert first_line(ValueError("\x1b[1mbold\x1b[0m \x07bell\nsecond")) == r"bold \x07bell"
    assert first_line(ValueError()) == "ValueError"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1_500, "1.5 kB"), (2_000_000, "2.0 MB"), (4e9, "4.0 GB")]
)
def test_sizes_are_written_in_the_unit_that_shows_them(count, text):
    assert size_text(count) == text


@pytest.mark.parametrize(
    "path",
    ["/my data/x", "/my #2", "/a: b", "/c:", "/x${HOME}y", r"/x\${HOME}", r"/x\\${HOME}", "/tab\tx\ny", '/"q"', "/it's",
     "/back\\slash", "/é ü", "2024", "null", "[a]", " /a ", "/a ", "~"],
)  # fmt: skip
def test_an_option_is_read_as_the_path_that_it_names(path):
    read = OmegaConf.from_dotlist([option("run.output_dir", path)])
    assert OmegaConf.to_container(read, resolve=True) == {"run": {"output_dir": path}}


def test_a_usual_path_needs_no_quotes():
    assert option("k", "/data/my FashionIQ_2-x/é") == "k=/data/my FashionIQ_2-x/é"
