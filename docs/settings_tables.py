"""Write the tables of docs/configuration.md from the declarations of the settings."""

from __future__ import annotations

from pathlib import Path

import lavis.models  # noqa: F401 (this package registers itself with it)

from lavis_cir_plugin.training.reference import with_tables

PAGE = Path(__file__).with_name("configuration.md")

if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
