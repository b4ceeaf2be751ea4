"""Every error that a user or a peer can cause, with the cure in its text.

    TightbeamError
    |-- UsageError                 what the user gave is wrong: exit code 2, never retried
    |   |-- RecipeError            a recipe key or value
    |   |-- DataError              a data file, with its line
    |   |-- CutError               a cut that this model or this cloud does not allow
    |   |-- UnsupportedModelError  a model that cannot be cut, and why
    |   |-- IdentityError          missing, foreign or expired certificates
    |   |   `-- StaleHandshakeError  a key or session that a restarted cloud forgot: transient
    |   `-- FingerprintError       weights or a cache that belong to another backbone
    |-- StepRefusedError           the cloud will never accept this step: permanent
    |   |-- StepTooLargeError
    |   |-- NonFiniteError         NaN or Inf in a tensor
    |   `-- StepConflictError      the same step key with another content
    |-- WireError                  bytes that are not what the protocol says
    |   |-- IntegrityError         a record that does not authenticate
    |   |-- ProtocolError          a malformed or unexpected message
    |   `-- CodecError             a payload that its codec cannot decode
    |-- FederationError            a federated round cannot go on with what it got
    |   |-- UpdateRefusedError     an adapter update that cannot be aggregated: names client and tensor
    |   `-- CohortError            fewer clients than the round needs
    |-- BudgetError                the recipe's limit of traffic would be exceeded
    |-- UnknownStepError           the cloud no longer holds this step: send the inputs again
    |-- LedgerError                the cloud has lost its books: permanent until its operator mends them
    |-- CloudBusyError             over a limit now, not for ever: transient
    `-- CloudUnavailableError      no answer: transient

Each class has a stable `code`, which crosses the wire, and an `exit_code` for the command line. `transient`
says whether the same request may succeed later; everything else is never retried.
"""

from typing import ClassVar

__all__ = [
    "BudgetError",
    "CloudBusyError",
    "CloudUnavailableError",
    "CodecError",
    "CohortError",
    "CutError",
    "DataError",
    "FederationError",
    "FingerprintError",
    "IdentityError",
    "IntegrityError",
    "LedgerError",
    "NonFiniteError",
    "ProtocolError",
    "RecipeError",
    "StaleHandshakeError",
    "StepConflictError",
    "StepRefusedError",
    "StepTooLargeError",
    "TightbeamError",
    "UnknownStepError",
    "UnsupportedModelError",
    "UpdateRefusedError",
    "UsageError",
    "WireError",
    "error_from_code",
    "printable",
    "reason",
]


class TightbeamError(Exception):
    """Base of all errors with a cure. `str(error)` is the message and, after it, the cure."""

    code: ClassVar[str] = "internal"
    status: ClassVar[str] = "INTERNAL"  # the gRPC status that carries it outside a step
    exit_code: ClassVar[int] = 1
    transient: ClassVar[bool] = False

    def __init__(self, message: str, *, cure: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.cure = cure

    def __str__(self) -> str:
        return f"{self.message} {self.cure}".rstrip()


class UsageError(TightbeamError):
    """What the user gave is wrong."""

    code, status, exit_code = "usage", "INVALID_ARGUMENT", 2


class RecipeError(UsageError):
    """A recipe key or value is wrong."""

    code = "recipe"


class DataError(UsageError):
    """A data file is empty, malformed or unusable; the message names file and line."""

    code = "data"


class CutError(UsageError):
    """The cut is not one that this model and this cloud allow."""

    code, status = "cut", "FAILED_PRECONDITION"


class UnsupportedModelError(UsageError):
    """The model cannot be cut or run on packed rows; the message says why."""

    code = "unsupported_model"


class IdentityError(UsageError):
    """An identity is missing, foreign, expired or does not sign what it should."""

    code, status, exit_code = "identity", "UNAUTHENTICATED", 3


class StaleHandshakeError(IdentityError):
    """The cloud no longer holds what a handshake was made for, or led to; a fresh one will do."""

    code, transient = "stale_handshake", True


class FingerprintError(UsageError):
    """Weights, an adapter or a cache belong to another backbone."""

    code, status = "fingerprint", "FAILED_PRECONDITION"


class StepRefusedError(TightbeamError):
    """The cloud will never accept this step."""

    code, status, exit_code = "step_refused", "INVALID_ARGUMENT", 4


class StepTooLargeError(StepRefusedError):
    """A step has more tokens than the cloud's limit."""

    code = "step_too_large"


class NonFiniteError(StepRefusedError):
    """A tensor holds NaN or Inf."""

    code = "non_finite"


class StepConflictError(StepRefusedError):
    """A step key was used before with another content."""

    code, status = "step_conflict", "ALREADY_EXISTS"


class WireError(TightbeamError):
    """Bytes on the wire are not what the protocol says."""

    code, status, exit_code = "wire", "DATA_LOSS", 5


class IntegrityError(WireError):
    """A record does not authenticate: flipped, dropped, doubled, reordered or truncated on its way."""

    code = "integrity"


class ProtocolError(WireError):
    """A message is malformed or comes at the wrong moment."""

    code, status = "protocol", "INVALID_ARGUMENT"


class CodecError(WireError):
    """A payload that its codec cannot encode or decode."""

    code, status = "codec", "INVALID_ARGUMENT"


class FederationError(TightbeamError):
    """A federated round cannot go on with what it got from its clients."""

    code, status, exit_code = "federation", "FAILED_PRECONDITION", 7


class UpdateRefusedError(FederationError):
    """An adapter update that cannot be aggregated; the message names the client and the tensor."""

    code, status = "update_refused", "INVALID_ARGUMENT"


class CohortError(FederationError):
    """Fewer clients than the round needs: for its threshold, or for anybody to hide among them."""

    code = "cohort"


class BudgetError(TightbeamError):
    """The next step would exceed `train.max_mb`; what was trained so far is saved."""

    code, status = "budget", "FAILED_PRECONDITION"


class UnknownStepError(TightbeamError):
    """The cloud does not hold this step (restart, eviction); the edge sends the inputs again."""

    code, status, exit_code = "unknown_step", "NOT_FOUND", 6


class LedgerError(TightbeamError):
    """The cloud's ledger is damaged, gone or something else: it can bill nothing, so it computes nothing."""

    code, status, exit_code = "ledger", "FAILED_PRECONDITION", 6


class CloudBusyError(TightbeamError):
    """The cloud is over a limit now; the same request may succeed later."""

    code, status, exit_code, transient = "busy", "RESOURCE_EXHAUSTED", 6, True


class CloudUnavailableError(TightbeamError):
    """The cloud did not answer."""

    code, status, exit_code, transient = "unavailable", "UNAVAILABLE", 6, True


def _tree(root: type[TightbeamError]) -> list[type[TightbeamError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in _tree(child))]


_BY_CODE = {error.code: error for error in _tree(TightbeamError)}


def error_from_code(code: str, message: str, cure: str = "") -> TightbeamError:
    """Rebuild the error that a peer named by `code`; an unknown code gives a plain `TightbeamError`."""
    return _BY_CODE.get(code, TightbeamError)(printable(message), cure=printable(cure))


def printable(text: str, limit: int = 2000) -> str:
    """A peer's text as it may be printed: one line, and nothing that a terminal obeys."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:limit])


def reason(error: Exception) -> str:
    """What went wrong, less the error number and the path, which a message names in its own words."""
    return (isinstance(error, OSError) and error.strerror) or str(error)
