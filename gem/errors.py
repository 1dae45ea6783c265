"""The one exception for what the user can put right: the command line prints it as one line and exits with 2."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in a configuration, a data file or a path; its message says where it is and what to do."""
