"""What can go wrong, as one tree.

Every message reads ``where = value: rule. Why. What to type.`` so that a user can act on it without a traceback. Each
class also inherits the standard exception it refines, so that callers may catch either.
"""


class DistillError(Exception):
    """Base of every error a user can cause or mend; the command line prints it without a traceback."""


class ConfigError(DistillError, ValueError):
    """A run's configuration breaks a rule. Raised before any process starts."""


class DataError(DistillError, ValueError):
    """A prompt file, a reply or a batch does not hold what it must."""


class BusyError(DistillError, RuntimeError):
    """Another command is making the run of this folder."""


class CheckpointError(DistillError, ValueError):
    """A model directory or checkpoint is missing, corrupt, or holds what we would not carry over."""


class ServerError(DistillError, RuntimeError):
    """An SGLang server did not start, died, or answered with an error."""


class StaleWeightsError(ServerError):
    """No server that can be reached serves the weights that a request names: they must be sent again."""


class TeacherError(DistillError, RuntimeError):
    """Too many teacher scores are missing to go on without bias."""


class LossError(DistillError, ValueError):
    """A loss was asked for a value that it can compute but that would not be what its name promises."""


class BuildError(DistillError, RuntimeError):
    """Kernels that are built on this machine could not be."""


class RewardError(DistillError, RuntimeError):
    """A reward raised, hung, or returned something other than one finite number for each response."""


class StopRequested(DistillError):
    """The process was told to end (a signal, the end of a job's time) while it waited for somebody."""
