"""Differential privacy at the client: its update clipped, and in secure rounds its part of the noise."""

import math

import numpy as np
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.supercore.differential_privacy import KEY_CLIPPING_NORM
from numpy.typing import NDArray

from tightbeam.federation.contract.messages import ADAPTIVE
from tightbeam.federation.contract.records import measurable
from tightbeam.federation.math import Arrays
from tightbeam.federation.math.privacy import clipped, noised
from tightbeam.federation.scenario import PrivacySection

__all__ = ["clipped_reply", "private_update"]


def clipped_reply(message: Message, context: Context, reply: Message) -> Message:
    """A training reply after Flower's own mod, where clients are to clip.

    Replies without an update pass: of them the mod would make an error of its own, and hide the client's.
    """
    config = message.content.config_records.get("config")
    if config is None or KEY_CLIPPING_NORM not in config or not reply.has_content():
        return reply
    if not (update := reply.content.array_records.get("arrays")):
        return reply
    sent = message.content.array_records["arrays"]
    reply.content.array_records["arrays"] = update = measurable(update, sent)
    message.content = RecordDict(
        {"arrays": ArrayRecord({name: sent[name] for name in update}), "config": config}
    )
    mod = adaptiveclipping_mod if config.get(ADAPTIVE) else fixedclipping_mod
    return mod(message, context, lambda message, context: reply)


def private_update(
    section: PrivacySection, after: Arrays, before: Arrays, quorum: int
) -> dict[str, NDArray[np.float64]]:
    """What a client masks: its change clipped, with its part of the noise.

    There is no sum of fewer than `quorum` clients, so a sum has at least the noise that was asked for.
    """
    bounded = clipped(after, before, section.clipping_norm)
    return noised(bounded, section.noise_multiplier * section.clipping_norm / math.sqrt(quorum))
