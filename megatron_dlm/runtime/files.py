"""Small files that are there whole or not at all, and paths that stay where they belong."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath, PureWindowsPath


def write_whole(path: Path, content: str | bytes) -> None:
    """Write under a temporary name, flush to disk, then rename; an older file is replaced.

    An OSError names the path, not the temporary name.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(content.encode("utf-8") if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def flush_to_disk(path: Path) -> None:
    """Ask that a file, or the names in a directory, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_plain_name(name: object) -> bool:
    """Whether a name that a file holds is that of a file beside it: no path, and no way out."""
    if not isinstance(name, str) or name in ("", ".", "..") or "\0" in name:
        return False
    return PurePosixPath(name).name == name == PureWindowsPath(name).name


def contained(directory: Path, name: str) -> Path:
    """The path of `name`, a file inside `directory` that some other file there names.

    Raises ValueError where it would leave the directory: by an absolute path, `..` or a link.
    """
    parts = Path(name).parts
    path = directory
    is_inside = bool(parts) and not Path(name).is_absolute() and ".." not in parts
    for part in parts if is_inside else ():
        path = path / part
        # Few names are links: only for them the file system is asked where they lead.
        if path.is_symlink() and not path.resolve().is_relative_to(directory.resolve()):
            is_inside = False
    if not is_inside or "\0" in name:
        raise ValueError(f"{name!r} lies outside {directory}")
    return path
