"""Every refusal of this package is an :class:`AldsError`; subclasses are also the matching built-in exception."""


class AldsError(Exception):
    """Base class of all errors raised by alds_fast."""


class ArgumentError(AldsError, ValueError):
    """An argument is outside its allowed range."""


class BudgetError(ArgumentError):
    """A budget is missing, given twice, out of range, or cannot be met."""


def unreachable(budget: int, least: int) -> BudgetError:
    """The error for a budget below the smallest cost that can be reached."""
    return BudgetError(f"a cost of {budget} cannot be met; the smallest reachable one is {least}")


class WeightError(AldsError, ValueError):
    """A weight cannot be analysed: NaN or infinite entries, or no values at all (meta device)."""


class LayerNotFoundError(AldsError, LookupError):
    """A layer name or pattern matches nothing, or names a layer of another shape or kind."""


class ModelError(AldsError, TypeError):
    """The model is not something that can be analysed, copied or rebuilt."""


class PlanError(AldsError, ValueError):
    """A plan is malformed or does not fit the model."""


class FileFormatError(AldsError, ValueError):
    """A file is truncated, corrupt, of another format, or of a newer version."""


class FileWriteError(AldsError, OSError):
    """A file could not be written; what stood there before is unchanged."""


class MissingFileError(AldsError, FileNotFoundError):
    """A file does not exist."""


class BackendError(AldsError, RuntimeError):
    """A kernel that was asked for by name cannot run on these arguments or on this machine."""


class TrainingError(AldsError, RuntimeError):
    """Training cannot go on: the loss is not finite."""


class WorkerError(AldsError, RuntimeError):
    """Another process of the same job failed, ended, or cannot be reached."""


class DependencyError(AldsError, ImportError):
    """A package that this function needs is not installed, or too old."""


class EvaluationError(AldsError, RuntimeError):
    """Cells of an evaluation failed, or one of its processes ended.

    ``evaluation`` holds the whole table, the failed cells with their messages; None where a process ended.
    """

    evaluation: object = None
