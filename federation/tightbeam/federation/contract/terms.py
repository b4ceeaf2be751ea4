"""What a secure round is about, worked out by the server and by each of its clients for itself.

A server that has the others compute something else than one client reads its update from the sum: it has
them start from another adapter, fold something into their weights, learn at another rate. So everything that
shapes what a client computes is in the plan that all of a cohort sign, and a client that is asked for
anything else masks nothing.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from flwr.app import RecordDict
from numpy.typing import NDArray

from tightbeam.common.errors import ProtocolError
from tightbeam.federation.contract.records import from_record
from tightbeam.federation.scenario import Scenario
from tightbeam.federation.secagg import FixedPoint, Plan
from tightbeam.federation.secagg.framing import digest

__all__ = ["CLIP", "Arrays", "Purpose", "plan_of", "require_agreed", "with_loss", "without_loss"]

CLIP = 8.0
"""Adapters' values are far below; one beyond it is refused, not clipped."""
_LOSS, _LARGEST_LOSS = "loss", 64.0  # nats; a loss beyond it counts as it
_MAX_WEIGHT = 2**20  # examples or tokens of one client
_OWN = (
    "first",
    "spent-mb",
    "spent-joules",
    "spent-money",
    "known-run",
)  # of one client: whether it leaves, and its figures
_RECORDS = {"arrays", "config", "secure"}
_WORDS = {
    "model_sha256": "adapter to start from",
    "terms_sha256": "scenario or backbone",
    "round": "round or kind of work",
}
Arrays = Mapping[str, NDArray[Any]]
Purpose = Literal["train", "evaluate"]


def plan_of(
    scenario: Scenario,
    backbone: str,
    purpose: Purpose,
    number: int,
    arrays: Arrays,
    participants: Sequence[str],
    size: int,
) -> Plan:
    """The plan of one sum: `size` values of clients that start from `arrays`, on a backbone's fingerprint.

    Raises:
        FederationError: terms that are not possible.

    """
    section, count = scenario.strategy, len(participants)
    terms = json.dumps(scenario.numbers(), sort_keys=True)
    return Plan(
        federation=scenario.output.name,
        round=2 * number + (purpose == "evaluate"),  # each sum has its own number, and they rise
        model_sha256=_model_sha256(purpose, arrays),
        terms_sha256=digest("terms", terms.encode(), backbone.encode()),
        participants=tuple(participants),
        threshold=max(int(count * section.threshold + 1e-9), count // 2 + 1),
        min_cohort=section.min_cohort,
        size=size,
        encoding=FixedPoint.fitting(CLIP, _MAX_WEIGHT, count),
    )


def require_agreed(
    name: str, plan: Plan, scenario: Scenario, backbone: str, purpose: Purpose, content: RecordDict
) -> None:
    """Hold what a client is asked against the plan that it and all others of its cohort have signed.

    Raises:
        ProtocolError: anything else than the plan says, or anything that a secure round has no use for.

    """
    config = content.config_records["config"]
    foreign = content.keys() - _RECORDS or config.keys() - {"server-round", *_OWN}
    if foreign:
        raise ProtocolError(f"{name} got {min(foreign)!r} in a secure round, which has none.", cure=_STOP)
    arrays, number = from_record(content.array_records["arrays"]), int(str(config["server-round"]))
    asked = plan_of(scenario, backbone, purpose, number, arrays, plan.participants, plan.size)
    for field in dataclasses.fields(Plan):
        if getattr(asked, field.name) != getattr(plan, field.name):
            what = _WORDS.get(field.name, field.name)
            raise ProtocolError(f"{name} got another {what} than its plan names.", cure=_STOP)


def with_loss(arrays: Arrays, loss: float) -> dict[str, NDArray[Any]]:
    """The loss as one more value, in a unit that fits the encoding."""
    return {**arrays, _LOSS: np.array([min(loss, _LARGEST_LOSS) * CLIP / _LARGEST_LOSS])}


def without_loss(
    mean: Mapping[str, NDArray[np.float64]],
) -> tuple[dict[str, NDArray[np.float64]], float]:
    """Inverse of `with_loss`: the arrays and the loss, nats."""
    arrays = dict(mean)
    return arrays, float(arrays.pop(_LOSS)[0]) * _LARGEST_LOSS / CLIP


def _model_sha256(purpose: Purpose, arrays: Arrays) -> bytes:
    """One for each adapter and what is done with it, however a server names the round."""
    parts = []
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        parts += [name.encode(), array.dtype.str.encode(), str(arrays[name].shape).encode(), array.tobytes()]
    return digest("model", purpose.encode(), *parts)


_STOP = "The server, or somebody between, treats clients differently: do not go on."
