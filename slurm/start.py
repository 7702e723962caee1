"""`python -m MODULE ARGUMENTS` with the code that lies beside this folder, whatever the working
directory and the environment hold: `python start.py megatron_dlm train --config FILE`.

An error is also written, one line, to the file that MEGATRON_DLM_FAILURES names. There the job
script finds which rank failed first and how: srun itself reports the ranks that it then killed.
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from pathlib import Path


def main() -> None:
    """Run the module as __main__; its exit status is ours."""
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    del sys.argv[0]
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code not in (None, 0):
            _report(end.code if isinstance(end.code, int) else 1, "its log says why")
        raise
    except BaseException as error:
        _report(1, traceback.format_exception_only(type(error), error)[-1])
        raise


def _report(status: int, message: str) -> None:
    """Append "status task node message"; one small write, so that ranks do not mix."""
    path = os.environ.get("MEGATRON_DLM_FAILURES")
    if path is None:
        return
    task, node = (os.environ.get(name, "?") for name in ("SLURM_PROCID", "SLURMD_NODENAME"))
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"{status} {task} {node} {' '.join(message.split())}\n")


if __name__ == "__main__":
    main()
