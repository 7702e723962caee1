"""The JSON file that holds every number of a report, and numbers in words."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megatron_dlm.runtime.files import write_whole


def prepare_report(path: str | None) -> None:
    """Refuse before the work what could not be written after it."""
    if path is None:
        return
    parent = Path(path).parent
    parent.mkdir(parents=True, exist_ok=True)
    if Path(path).is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"output {path} cannot be written; name a file in a folder of your own")


def write_report(path: str | None, content: dict[str, Any]) -> None:
    """Write the content as JSON, if a file is named."""
    if path is not None:
        write_whole(Path(path), json.dumps(content, indent=1) + "\n")


def in_bytes(size_bytes: float) -> str:
    """4.2 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.3g} {unit}" if unit != "B" else f"{size_bytes:.0f} B"
        size_bytes /= 1000
    return f"{size_bytes:.3g} TB"
