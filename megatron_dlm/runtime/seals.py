"""JSON objects that carry a checksum of themselves: whoever damages a value gives himself away."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

SEAL = "sha256"


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with a checksum of itself."""
    values = unsealed(content)
    return {**values, SEAL: _hash_values(values)}


def unsealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content without the checksum, whether it has one or not."""
    return {name: value for name, value in content.items() if name != SEAL}


def is_sealed(content: Mapping[str, Any]) -> bool:
    """Whether nothing has changed since it was `sealed`."""
    return content.get(SEAL) == _hash_values(unsealed(content))


def _hash_values(values: Mapping[str, Any]) -> str:
    # Through JSON and back, so that tuples and integer keys are what a reader will see.
    text = json.dumps(json.loads(json.dumps(values)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
