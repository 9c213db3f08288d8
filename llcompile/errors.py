"""Every error and warning class of llcompile, in one file.

A message names the user's module and shapes, says what was expected, and says what to do.
"""

from __future__ import annotations


class LLCompileError(Exception):
    """Base of every error that llcompile raises on purpose."""


class OperandError(LLCompileError, ValueError):
    """An operand of the operator has a wrong shape, dtype, device or value."""


class StateError(LLCompileError, ValueError):
    """A state does not belong to the operator it was handed to."""


class KernelError(LLCompileError, RuntimeError):
    """Triton kernels were asked for by name and cannot run here, or not for these operands."""


class KernelCacheError(KernelError):
    """The folder for generated kernels cannot be written."""


class DerivativeError(LLCompileError, NotImplementedError):
    """A derivative that the operators do not have was asked for: forward mode, or a second one."""


class OptionError(LLCompileError, ValueError):
    """An option of the backend is unknown or has a wrong type or value."""


class ModelError(LLCompileError, TypeError):
    """What was handed to convert, inspect or revert is not an nn.Module."""


class CaptureError(LLCompileError, RuntimeError):
    """The model could not be traced: its example inputs do not run, or Dynamo refused it."""


class LevelWeightsError(LLCompileError, ValueError):
    """Level weights have a wrong size or kind for the mixer that owns them."""


class CheckpointError(LevelWeightsError):
    """A checkpoint's level weights do not fit the model, or were left out when it was loaded."""


class MissedLevelWeightsError(LevelWeightsError):
    """A module that owns level weights ran in a compiled call whose graph does not read them."""


class WrappedBackendError(LLCompileError, RuntimeError):
    """A wrapper around the backend keeps it from seeing what it must."""


class MixerError(LLCompileError, ValueError):
    """A Mixer node breaks one of its own rules (a bug of a row or of a pass, not of the user)."""


class GraphError(LLCompileError, RuntimeError):
    """A pass left the graph in a state that breaks the pipeline's rules."""


class BenchError(LLCompileError, RuntimeError):
    """A measurement was asked for that cannot be made here, or a file of results cannot be read."""


class DemoError(LLCompileError, RuntimeError):
    """The demo saw a conversion that does not act: its level weights do not move the output, or get no gradient."""


class ReproError(LLCompileError, ValueError):
    """No reproducer can be written: nothing has that name, or its code cannot stand in a file of its own."""


class MlirError(LLCompileError, RuntimeError):
    """MLIR was asked for something that has none: no mixer, no values, states, or what torch-mlir does not take."""


class SpecError(LLCompileError, ValueError):
    """The command line names something unknown: a model that cannot be found or built, a peer that nobody knows."""


class OutputError(LLCompileError, OSError):
    """A file or folder that was asked for cannot be written."""


class MissingLibraryError(LLCompileError, ImportError):
    """An optional library is needed for this and is not installed; the message says what to install."""


class StrictError(LLCompileError, RuntimeError):
    """`strict=True` and a linear-time mixer stayed unconverted, or nothing was found."""


class LLCompileWarning(UserWarning):
    """Base of every warning that llcompile gives."""


class LevelWeightsIgnoredWarning(LLCompileWarning):
    """A converted model ran without the backend, so its level weights had no effect."""


class LateAttachWarning(LLCompileWarning):
    """Level weights were attached at the first compiled call; optimisers built earlier do not know them."""


class LevelWeightsFrozenWarning(LLCompileWarning):
    """Level weights were frozen with other parameters of their mixer, and a training runs without them."""


class StateAdoptedWarning(LLCompileWarning):
    """A state without levels, of an unconverted model, was taken up as one level."""


class EagerStateWarning(LLCompileWarning):
    """A state with levels met the library's own code, which cannot read it; its error follows."""


class OptimizerWarning(LLCompileWarning):
    """An optimiser stepped a converted model without its level weights."""


class UntestedVersionWarning(LLCompileWarning):
    """Torch or a library is newer than every release that llcompile was tested with."""
