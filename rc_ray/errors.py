"""The errors a user can act on, in one small tree.

Every message names the field (or file), its value, the reason and the next step. The command line prints them without a
stack trace and exits with `exit_code`; anything else that escapes is a bug of ours and keeps its trace.
"""

from __future__ import annotations


class RcRayError(Exception):
    """Base of all errors that the user can act on."""

    exit_code = 1


class ConfigError(RcRayError):
    """The configuration is wrong: unknown key, wrong type, impossible combination."""

    exit_code = 2


class DataError(RcRayError):
    """An input file or table is missing, unreadable or not of the stated shape."""

    exit_code = 3


class ModelError(RcRayError):
    """A model folder or Hub id cannot be found, read or used."""

    exit_code = 4


class ClusterError(RcRayError):
    """The Ray cluster cannot be reached or cannot hold the pools."""

    exit_code = 5


class ResumeError(RcRayError):
    """A run directory belongs to another configuration, or its records do not add up."""

    exit_code = 6
