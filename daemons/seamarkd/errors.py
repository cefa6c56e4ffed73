"""Errors that several daemons end with."""

from __future__ import annotations


class StateError(Exception):
    """A file of durable state can't be used; the sentence names the file and says what to do."""


class ManifestError(StateError):
    """The coordinator's database can't be used."""
