"""Every error a user can cause. Each message is one line: what, found, expected, how to mend it.

The command line prints the line and exits with code 2; anything else that escapes is our bug.
"""


class SbedgeError(Exception):
    """Base of all expected errors; `str(error)` is one line meant for a person."""


class CheckpointError(SbedgeError):
    """A checkpoint folder is missing, damaged, or not a model we can run."""


class ModelFileError(SbedgeError):
    """An exported model (GGUF file or ONNX folder) is missing, damaged, or not ours."""


class ExportError(SbedgeError):
    """An export cannot be written as asked (bad option, existing output, full disk)."""


class StateError(SbedgeError):
    """A state does not fit the model it is used with, or its file is damaged."""


class TokenizerError(SbedgeError):
    """Tokenizer files are missing or damaged, or do not match the model's vocabulary."""


class EngineUnavailable(SbedgeError):
    """A library an engine needs is not installed; the message says which command installs it."""


class InputError(SbedgeError):
    """A request is malformed: empty prompt, token id out of range, bad sampling option."""
