"""What the process that writes a rank's files tells the process that trains."""

from __future__ import annotations

import pickle
import queue
import tempfile
from pathlib import Path
from typing import Any

from megatron_dlm.checkpoint.checksums import hash_files


class WriterReport:
    """The report of the one save under way, from a (forked) writer to this process.

    The writer also sums its files, so that neither training nor one rank for all has to wait.
    Megatron Core takes this for a queue. It is an unnamed file, not a multiprocessing.Manager: the
    server of that would die of a signal to the process group, and outlive this process when that
    is killed.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - lives as long as this
        self._directory = Path()
        self.checksums: dict[str, str] = {}
        """File name -> SHA-256 of what this rank wrote in the newest save."""

    def expect(self, directory: Path) -> None:
        """Call before every save."""
        self._directory, self.checksums = directory, {}

    def put(self, report: Any) -> None:
        """Called by the writer, with offset and file shared with the parent."""
        checksums: dict[str, str] = {}
        if isinstance(report, dict):
            results = [result for part in report.values() for result in part]
            names = sorted({result.storage_data.relative_path for result in results})
            try:
                checksums = hash_files(self._directory, names)
            except OSError as error:
                report = error
        self._file.write(pickle.dumps((report, checksums)))

    def get_nowait(self) -> Any:
        """The report, once; queue.Empty if a writer died before it wrote one."""
        self._file.seek(0)
        content = self._file.read()
        self._file.seek(0)
        self._file.truncate()
        try:
            # Not a file of anybody else: nobody but our own child can have written it.
            report, self.checksums = pickle.loads(content)
        except (EOFError, pickle.UnpicklingError):
            raise queue.Empty from None
        return report
