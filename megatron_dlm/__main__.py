"""`python -m megatron_dlm`, for torchrun."""

from __future__ import annotations

import sys

from megatron_dlm.cli import main

if __name__ == "__main__":
    sys.exit(main())
