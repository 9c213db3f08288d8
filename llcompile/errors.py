"""Every error and warning class of llcompile, in one file.

A message names the user's module and shapes, says what was expected, and says what to do.
"""

from __future__ import annotations


class LLCompileError(Exception):
    """Base of every error that llcompile raises on purpose."""


class OperandError(LLCompileError, ValueError):
    """An operand of the operator has a wrong shape, dtype, device or value."""


class StateError(LLCompileError, ValueError):
    """A state does not belong to the operator that received it."""


class KernelError(LLCompileError, RuntimeError):
    """Generated kernels were requested explicitly but cannot run here or for these operands."""


class KernelCacheError(KernelError):
    """The folder for generated kernels cannot be written."""


class KernelTestError(KernelError):
    """Generated kernels gave wrong numbers in a test on this device, or the test left the device unusable."""


class KernelMemoryError(KernelError):
    """The buffers of a call of generated kernels do not fit into the device's memory."""


class CompilerError(KernelError):
    """No C++ compiler was found, or it cannot make a library of generated kernels that can be loaded."""


class DerivativeError(LLCompileError, NotImplementedError):
    """An unsupported derivative of the operators was requested: forward mode, or a second derivative."""


class DistributedError(LLCompileError, RuntimeError):
    """A model cannot be spread over processes as requested, or level weights come too late for a wrapper."""


class OptionError(LLCompileError, ValueError):
    """An option of the backend is unknown or has a wrong type or value."""


class ModelError(LLCompileError, TypeError):
    """The model argument of convert, inspect, revert or another function is not an nn.Module."""


class CaptureError(LLCompileError, RuntimeError):
    """The model could not be traced: it does not run on the example inputs, or Dynamo cannot trace it."""


class ExampleError(CaptureError):
    """The model does not run on the example inputs."""


class LevelWeightsError(LLCompileError, ValueError):
    """Level weights have the wrong size or kind for their mixer."""


class CheckpointError(LevelWeightsError):
    """A checkpoint's level weights do not fit the model, or were not loaded."""


class MissedLevelWeightsError(LevelWeightsError):
    """A module that owns level weights ran in a compiled call whose graph does not read them."""


class WrappedBackendError(LLCompileError, RuntimeError):
    """A wrapper passes the backend only a part or a copy of Dynamo's graph."""


class MixerError(LLCompileError, ValueError):
    """A Mixer node is invalid: a bug in a table entry or a pass, not in the user's code."""


class GraphError(LLCompileError, RuntimeError):
    """A pass left the graph in an invalid state: a bug in llcompile."""


class BenchError(LLCompileError, RuntimeError):
    """A requested measurement cannot be made here, or a results file cannot be read."""


class DemoError(LLCompileError, RuntimeError):
    """A conversion in the demo has no effect: its level weights do not change the output, or have no gradient."""


class TrialError(LLCompileError, ValueError):
    """A trial cannot be made: its data, settings or model do not serve, or its folder holds another trial."""


class ReproError(LLCompileError, ValueError):
    """No reproducer can be written: no mixer has that name, or its code cannot be written to a standalone file."""


class MlirError(LLCompileError, RuntimeError):
    """No MLIR can be made: no such mixer, no values, a state, or a graph that torch-mlir does not support."""


class DecompositionError(LLCompileError, RuntimeError):
    """An operator cannot be written in ATen operations: a symbolic length, or packed or padded sequences."""


class SpecError(LLCompileError, ValueError):
    """The command line names something unknown: a model that cannot be found or built, or an unknown peer."""


class OutputError(LLCompileError, OSError):
    """A requested file or folder cannot be written."""


class MissingLibraryError(LLCompileError, ImportError):
    """A required optional library is not installed; see the message for the command that installs it."""


class StrictError(LLCompileError, RuntimeError):
    """With `strict=True`, a linear-time mixer was declined, or nothing that mixes positions was found."""


class LLCompileWarning(UserWarning):
    """Base of every warning that llcompile gives."""


class LevelWeightsIgnoredWarning(LLCompileWarning):
    """A converted model ran without the backend, so its level weights had no effect."""


class LateAttachWarning(LLCompileWarning):
    """Level weights were attached at the first compiled call; optimizers built earlier do not include them."""


class LevelWeightsFrozenWarning(LLCompileWarning):
    """Level weights were frozen with other parameters of their mixer, and will not be trained."""


class StateAdoptedWarning(LLCompileWarning):
    """A state of an unconverted model, without levels, was imported as a single level."""


class EagerStateWarning(LLCompileWarning):
    """The library's own code received a state with levels, which it cannot read; its error follows."""


class OptimizerWarning(LLCompileWarning):
    """An optimizer trains a converted model without its level weights."""


class TrialDataWarning(LLCompileWarning):
    """A trial is judged on sequences that it also trains on."""


class UntestedVersionWarning(LLCompileWarning):
    """torch or another library is newer than every release that llcompile was tested with."""
