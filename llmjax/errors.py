"""The exceptions that a command reports in one line; every other exception is a bug and keeps its traceback."""


class UserError(ValueError):
    """A mistake that the user can mend: the message says what is wrong and how to mend it.

    It is a ValueError, so that programs may catch it as one. Library code raises it, and never a bare ValueError, for
    whatever a user can cause. A ValueError of NumPy or JAX is therefore never taken for a mistake of the user.
    """


class Diverged(UserError):  # noqa: N818
    """A training ended because too many of its updates in a row were not finite."""


class Stopped(Exception):  # noqa: N818
    """Training was stopped by a signal after its state was saved; the message says where. It is no error."""
