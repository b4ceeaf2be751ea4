"""Messages to clients, and an answer to every one of them, whatever became of its node.

What Flower's SuperLink answers in place of a node that it has not heard from bears the SuperLink's own number
(1.41), and a node that is there but does not answer in time leaves nothing at all. Here either is an error
that comes from the node itself, so that whoever takes the answers in knows whose they are.
"""

from collections.abc import Iterable

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

__all__ = ["ANSWER_S", "exchange"]

ANSWER_S = 7200.0
"""How long a client may take for a round."""

_LOST = "Its node is lost: the SuperLink has not heard from it."


def exchange(grid: Grid, messages: Iterable[Message], timeout_s: float = ANSWER_S) -> list[Message]:
    """Send messages to their nodes; one answer to each, in their order."""
    sent = list(messages)
    came = {
        reply.metadata.reply_to_message_id: reply for reply in grid.send_and_receive(sent, timeout=timeout_s)
    }
    return [_answer(message, came.get(message.metadata.message_id), timeout_s) for message in sent]


def _answer(sent: Message, reply: Message | None, timeout_s: float) -> Message:
    if reply is None:
        return Message(Error(ErrorCode.UNKNOWN, f"No answer within {timeout_s:.0f} s."), reply_to=sent)
    if not reply.has_error():
        return reply
    lost = reply.error.code == ErrorCode.NODE_UNAVAILABLE
    return Message(Error(reply.error.code, _LOST if lost else reply.error.reason), reply_to=sent)
