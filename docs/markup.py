"""Markdown that GitHub and docstrings have and Python-Markdown lacks: formulas, as MathML, and Sphinx's roles.

A formula stands in a fenced block called ``math``, or within a line between ``$`` with backticks inside; in a docstring
in the directive or the role ``math``. It becomes MathML, which browsers draw without a script or a font from anywhere.
A role such as ``:func:`name``` becomes code, and a link where the site has that name. A table between lines of ``=``
becomes one of Markdown.
"""

from __future__ import annotations

import html
import re
from typing import Any
from xml.etree import ElementTree

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor
from markdown.preprocessors import Preprocessor

_BLOCK = re.compile(r"^```math\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_DIRECTIVE = re.compile(r"^\.\. math::[ ]?(.*(?:\n(?:[ ]+\S.*|(?=\n[ ]+\S)))*)", re.MULTILINE)
_TABLE = re.compile(r"^(=+(?: +=+)+)\n((?:[^=].*\n)+?)(?:\1\n((?:[^=].*\n)+))?\1$", re.MULTILINE)
_INLINE = r"\$`([^`]+)`\$|:math:`([^`]+)`"
_ROLE = r":(?:attr|class|data|func|meth|mod):`~?([\w.]+)`"


def _mathml(formula: str, display: str) -> str:
    """Return a formula as MathML.

    Raises:
        ValueError: A command that the converter does not know is left over in the MathML.
    """
    if "&" in formula or r"\\" in formula:
        formula = rf"\begin{{aligned}}{formula}\end{{aligned}}"
    # Browsers slant an identifier of one letter, and draw a prime too small unless it is an operator.
    upright = re.sub(r"\\mathrm\{(\w)\}", r"\\text{\1}", formula)
    upright = re.sub(r"\\[Bb]igg?(?=\\)", "", upright)  # the bars of a norm grow by themselves
    drawn = convert(upright, display=display).replace("<mi>&#x02032;</mi>", "<mo>&#x02032;</mo>")
    if "\\" in drawn:
        raise ValueError(
            f"the formula {formula!r} holds a command that latex2mathml does not know; write it otherwise."
        )
    return drawn


class _Blocks(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        """Put the MathML of each block where the block stood."""

        def stashed(block: re.Match[str]) -> str:
            drawn = _mathml(block[1], "block")
            return "\n\n" + self.md.htmlStash.store(f'<div class="formula">{drawn}</div>') + "\n\n"

        text = _TABLE.sub(_as_markdown, "\n".join(lines))
        return _DIRECTIVE.sub(stashed, _BLOCK.sub(stashed, text)).split("\n")


def _as_markdown(table: re.Match[str]) -> str:
    """Return a simple table as Markdown's. A line whose first column is empty goes on with the row before it."""
    starts = [rule.start() for rule in re.finditer("=+", table[1])]
    rows: list[list[str]] = [] if table[3] else [[""] * len(starts)]  # Markdown has no table without a head
    for line in [*table[2].splitlines(), *(table[3] or "").splitlines()]:
        cells = [line[start:end].strip() for start, end in zip(starts, [*starts[1:], None])]
        if cells[0]:
            rows.append(cells)
        else:
            rows[-1] = [f"{above} {cell}".strip() for above, cell in zip(rows[-1], cells)]
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in rows]
    return "\n".join([lines[0], "|---" * len(starts) + "|", *lines[1:]])


class _Inline(InlineProcessor):
    def handleMatch(self, m: re.Match[str], data: str) -> tuple[str, int, int]:  # noqa: N802
        """Return the MathML of a formula within a line."""
        return self.md.htmlStash.store(_mathml(m[1] or m[2], "inline")), m.start(0), m.end(0)


class _Roles(InlineProcessor):
    def handleMatch(self, m: re.Match[str], data: str) -> tuple[Any, int, int]:  # noqa: N802
        """Return the last part of a role's name as code, with a link where the name is a whole one."""
        name, last = html.escape(m[1]), html.escape(m[1].rpartition(".")[2])
        if not name.startswith("lavis_cir_"):
            code = ElementTree.Element("code")
            code.text = name
            return code, m.start(0), m.end(0)
        link = f'<autoref optional identifier="{name}"><code>{last}</code></autoref>'
        return self.md.htmlStash.store(link), m.start(0), m.end(0)


class Markup(Extension):
    """Formulas and roles."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        """Register before fenced blocks (25) and code (190) are looked for."""
        md.preprocessors.register(_Blocks(md), "formula_blocks", 29)
        md.inlinePatterns.register(_Inline(_INLINE, md), "formulas", 195)
        md.inlinePatterns.register(_Roles(_ROLE, md), "roles", 194)


def makeExtension(**settings: Any) -> Markup:  # noqa: N802
    """Return the extension, by the name that Python-Markdown asks for."""
    return Markup(**settings)
