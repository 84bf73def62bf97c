"""All errors of the library.

Each derives from [`BitFitError`] and from the built-in that a caller would catch, so `except ValueError` keeps
working. A message says what was given, where, why it fails and what to do; several problems of one kind are collected
and raised once (see [`collect`]).
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "AdapterNameError",
    "AddedTokensError",
    "BaseModelMismatchError",
    "BitFitError",
    "ConfigError",
    "DeltaFormatError",
    "DeltaIOError",
    "DeltaMismatchError",
    "DeltaNotFoundError",
    "MergeError",
    "MissingDependencyError",
    "MixedBatchError",
    "NoBiasesError",
    "NoMatchError",
    "NonFiniteDeltaError",
    "OnnxExportError",
    "OnnxGraphError",
    "OptimizerError",
    "PrivacyError",
    "PushError",
    "RecomputationError",
    "RegistrationError",
    "StockExportError",
    "TaskBankError",
    "TextTooLongError",
    "TrainerSetupError",
    "UnknownHeadError",
    "UnknownTaskError",
    "UnknownTermError",
    "UnsupportedLayerError",
]


class BitFitError(Exception):
    """Root of all errors raised by `bitfit_hf`."""


class UnknownTermError(BitFitError, ValueError):
    """`bias_terms` names a term that does not exist."""


class NoBiasesError(BitFitError, ValueError):
    """The model, or the part of it that was asked for, has no bias to tune."""


class NoMatchError(BitFitError, ValueError):
    """`target_modules`, `exclude_modules`, `layers_to_transform` or `modules_to_save` match nothing."""


class UnknownHeadError(BitFitError, ValueError):
    """It is not known which modules of this model class are the new task head."""


class UnsupportedLayerError(BitFitError, TypeError):
    """A layer cannot be tuned, or not in the way that was asked for."""


class MixedBatchError(UnsupportedLayerError, ValueError):
    """`adapter_names` cannot be applied to the model as it is at present: in training, or with adapters merged."""


class MergeError(BitFitError, ValueError):
    """A delta cannot be merged into the base model's own weights."""


class AdapterNameError(BitFitError, ValueError):
    """An adapter name is unknown, taken, or does not fit the batch."""


class ConfigError(BitFitError, ValueError):
    """A configuration holds a value of the wrong type or kind."""


class AddedTokensError(BitFitError, ValueError):
    """The token embeddings were resized in a way that a delta cannot carry, or that does not fit this one."""


class DeltaFormatError(BitFitError, ValueError):
    """A delta's files are damaged, incomplete, of two different saves, or not a BitFit delta at all."""


class NonFiniteDeltaError(BitFitError, ValueError):
    """A delta or a head that holds NaN or Inf is about to be saved as if it were a result."""


class DeltaNotFoundError(BitFitError, FileNotFoundError):
    """There is no delta in this folder or Hub repo."""


class DeltaIOError(BitFitError, OSError):
    """A delta could not be read from or written to disk or the Hub (permissions, full disk, network)."""


class DeltaMismatchError(BitFitError, ValueError):
    """A delta's tensors do not fit the model (missing, extra or of another shape)."""


class BaseModelMismatchError(BitFitError, ValueError):
    """A delta is being used with a checkpoint other than the one it was trained on."""


class TrainerSetupError(BitFitError, RuntimeError):
    """A Trainer is set up in a way in which it would not train the deltas and the head, and them alone."""


class OptimizerError(BitFitError, ValueError):
    """An optimizer cannot hold BitFit's parameter groups."""


class PrivacyError(BitFitError, ValueError):
    """Private training was asked for in a way whose guarantee would not hold, or that cannot meet its budget."""


class PushError(BitFitError, OSError):
    """A push to the Hub was refused or failed; nothing was overwritten."""


class StockExportError(BitFitError, ValueError):
    """A delta cannot be written as an adapter that stock PEFT loads."""


class OnnxExportError(BitFitError, ValueError):
    """A base or a delta cannot be exported to ONNX."""


class OnnxGraphError(BitFitError, ValueError):
    """A folder with an ONNX graph is damaged, incomplete, or does not compute what its base computes."""


class TaskBankError(BitFitError, ValueError):
    """A request to a [`TaskBank`] cannot be answered; the bank is as it was."""


class UnknownTaskError(TaskBankError):
    """A [`TaskBank`] has no task of that name, or no longer the one that a text was encoded for."""


class TextTooLongError(TaskBankError):
    """A text has more tokens than the model takes, and was not to be cut."""


class RecomputationError(BitFitError, RuntimeError):
    """What the backward pass computes again would no longer be what the forward pass computed."""


class CheckpointError(BitFitError, ValueError):
    """A base model or tuned model that was named on the command line cannot be used."""


class TableError(BitFitError, ValueError):
    """A table of labelled texts cannot be trained on or evaluated; the message names the row."""


class ServingError(BitFitError, ValueError):
    """`bitfit serve` cannot start with these options, or a task cannot be served over HTTP."""


class OutputError(BitFitError, OSError):
    """The result of a command cannot be put where the command line says."""


class MissingDependencyError(BitFitError, ImportError):
    """An optional package is needed that is not installed; the message names the extra that brings it."""


class RegistrationError(BitFitError, RuntimeError):
    """The installed `peft` or `transformers` cannot take the `BITFIT` method."""


def collect(problems: Iterable[str], *, limit: int = 8) -> str:
    """Joins the `problems` of one kind into the body of one message, and says how many more there are.

    Args:
        problems (`Iterable[str]`): One line each.
        limit (`int`, *optional*, defaults to 8): How many are spelled out.

    Returns:
        `str`: The lines, each indented behind a dash.
    """
    lines = list(problems)
    shown = "".join(f"\n  - {line}" for line in lines[:limit])
    return shown + (f"\n  - and {len(lines) - limit} more" if len(lines) > limit else "")
