"""JSON from files that may be damaged."""

from __future__ import annotations

import json
from typing import Any


def parse_json(content: str | bytes) -> Any:
    """What JSON says; ValueError for all that is wrong with it, too deep nesting included."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
