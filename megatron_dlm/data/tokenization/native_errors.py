"""What the tokenizer libraries raise, in words of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def native_errors(what: str) -> Iterator[None]:
    """Raise any error of a native library as ValueError: `what` and the first line of its words.

    The libraries raise plain Exception, RuntimeError, and panics that are no Exception at all.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        words = str(error).strip().split("\n")[0]
        raise ValueError(f"{what} ({words})") from None
