"""The errors a user can mend. Each message is one line and ends with what to do."""


class LcxError(Exception):
    """Base of every error this package raises on purpose: bad input, a missing model, a corrupt file."""


class UnknownProfileError(LcxError):
    """A profile name that does not exist."""


class ModelNotFoundError(LcxError):
    """A model, checkpoint or text is neither in the cache nor to be had from its source."""


class CorruptFileError(LcxError):
    """A file whose sha256 is not the expected one."""


class NotebookError(LcxError):
    """A notebook that does not exist, fails in a cell, or whose kernel died."""


class UnsupportedModelError(LcxError):
    """A model family the methods cannot attach to."""
