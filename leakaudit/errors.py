"""Errors that reach the user: one clear line and an exit code.

Everything a user can get wrong is an `InputError`; its message says what was
wrong, the value found, and what is accepted.  Anything else is a bug and keeps
its traceback.
"""

from __future__ import annotations

EXIT_WITHIN_POLICY = 0
EXIT_LEAKAGE = 1
EXIT_INPUT = 2
EXIT_INCONCLUSIVE = 3


class LeakauditError(Exception):
    """Base of every error the command line turns into one line on stderr."""

    exit_code = EXIT_INPUT

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


class InputError(LeakauditError, ValueError):
    """A file, an option or a value that cannot be used as given."""


class AmbiguityError(InputError):
    """More than one reading of a file fits; the message lists the candidates."""


class Unmeasurable(Exception):
    """A metric cannot be computed here; the message is the reason."""
