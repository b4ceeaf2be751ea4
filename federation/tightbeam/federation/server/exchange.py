"""Messages to clients, and an answer to every one of them, whatever became of its node.

What Flower's SuperLink answers in place of a node that it has not heard from bears the SuperLink's own number
(1.41), and a node that is there but does not answer in time leaves nothing at all. Here either is an error
that comes from the node itself, so that whoever takes the answers in knows whose they are.
"""

import time
from collections.abc import Iterable

from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

__all__ = ["ANSWER_S", "exchange"]

ANSWER_S = 7200.0
"""How long a client may take for a round."""

_FIRST_LOOK_S, _LONGEST_LOOK_S = 0.1, 3.0
_LOST = "Its node is lost: the SuperLink has not heard from it."


def exchange(grid: Grid, messages: Iterable[Message], timeout_s: float | None = None) -> list[Message]:
    """Send messages to their nodes; one answer to each, in their order.

    Each is made, sent and let go before the next: a grid that got them all at once would hold every client's
    adapter at the same time.
    """
    sent, waiting, came = list[Message](), set[str](), dict[str, Message]()
    for message in messages:
        (name,) = list(grid.push_messages([message])) or [""]
        bare = Message(RecordDict(), message.metadata.dst_node_id, message.metadata.message_type)
        bare.metadata.__dict__["_message_id"] = name or ""
        sent.append(bare)
        waiting |= {name} - {"", None}
        del message
    timeout_s = ANSWER_S if timeout_s is None else timeout_s
    deadline_s, wait_s = time.monotonic() + timeout_s, _FIRST_LOOK_S
    while waiting:
        for reply in grid.pull_messages(waiting):
            came[reply.metadata.reply_to_message_id] = reply
        waiting -= came.keys()
        if not waiting or time.monotonic() >= deadline_s:
            break
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, _LONGEST_LOOK_S)
    return [_answer(message, came.get(message.metadata.message_id), timeout_s) for message in sent]


def _answer(sent: Message, reply: Message | None, timeout_s: float) -> Message:
    if not sent.metadata.message_id:
        return Message(Error(ErrorCode.UNKNOWN, "Flower would not take its message."), reply_to=sent)
    if reply is None:
        return Message(Error(ErrorCode.UNKNOWN, f"No answer within {timeout_s:.0f} s."), reply_to=sent)
    if not reply.has_error():
        return reply
    lost = reply.error.code == ErrorCode.NODE_UNAVAILABLE
    return Message(Error(reply.error.code, _LOST if lost else reply.error.reason), reply_to=sent)
