"""Errors that all ranks agreed on."""

from __future__ import annotations


class AgreedError(ValueError):
    """A user error that every rank raises with the same message; one may speak for all."""
