"""Build backend that gives LAVIS's own wheel back without its requirements; pip and uv call it."""

from __future__ import annotations

import base64
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

VERSION = "1.0.2"
NEW_VERSION = f"{VERSION}+without.pins"
SHA256 = "489782efc2d98d8e878112b2758f82ac2e6c10dfcfa087db6656465c7784d49f"


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: Any = None) -> str:
    """Download LAVIS's wheel from the index that pip is set to, and write it anew into a folder.

    Args:
        wheel_directory: Where the new wheel goes.
        config_settings: Not used.
        metadata_directory: Not used.

    Returns:
        The new wheel's file name.

    Raises:
        subprocess.CalledProcessError: If pip cannot download it, or the file is another one than was published.
    """
    name = f"salesforce_lavis-{NEW_VERSION}-py3-none-any.whl"
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "wanted.txt"
        wanted.write_text(f"salesforce-lavis=={VERSION} --hash=sha256:{SHA256}\n")
        options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--dest", folder]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, "-r", wanted], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        repack(wheel, Path(wheel_directory) / name)
    return name


def repack(wheel: Path, new: Path) -> None:
    """Copy a wheel of LAVIS, but for its requirements and its version.

    Args:
        wheel: The published one.
        new: The file to be written, named after the new version.
    """
    old_info, new_info = (f"salesforce_lavis-{version}.dist-info" for version in (VERSION, NEW_VERSION))
    record = []
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            content = source.read(name)
            place = name.replace(old_info, new_info)
            if name == f"{old_info}/RECORD":
                continue
            if name == f"{old_info}/METADATA":
                content = without_pins(content.decode()).encode()
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            record.append(f"{place},sha256={digest},{len(content)}\n")
            target.writestr(place, content)
        target.writestr(f"{new_info}/RECORD", "".join([*record, f"{new_info}/RECORD,,\n"]))


def without_pins(metadata: str) -> str:
    """Return a wheel's METADATA without requirements, and with the new version."""
    head, blank, description = metadata.partition("\n\n")
    lines = [line for line in head.splitlines() if not line.startswith("Requires-Dist:")]
    return re.sub(r"(?m)^Version: .*$", f"Version: {NEW_VERSION}", "\n".join(lines)) + blank + description
