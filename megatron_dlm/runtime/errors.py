"""Whose error it is."""

from __future__ import annotations


class AgreedError(ValueError):
    """A user error that every rank raises with the same message; one may speak for all."""


def is_users(error: BaseException) -> bool:
    """Whether the user can cause it: one line will do.

    A ValueError that a library raised is a defect, whose traceback is wanted.
    """
    if isinstance(error, OSError):
        return True
    traceback = error.__traceback__
    if traceback is None or not isinstance(error, ValueError):
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return str(traceback.tb_frame.f_globals.get("__name__", "")).split(".")[0] == "megatron_dlm"
