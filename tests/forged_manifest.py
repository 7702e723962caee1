"""What somebody would do who wants changed files of a checkpoint to pass for the written ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_dlm.checkpoint import retention


def forge(checkpoint: Path, **changes: Any) -> None:
    """Write the manifest again for the files as they are, with entries changed."""
    path = checkpoint / retention.MANIFEST_NAME
    content = {**json.loads(path.read_text()), **changes}
    retention.write_manifest(checkpoint, content)
