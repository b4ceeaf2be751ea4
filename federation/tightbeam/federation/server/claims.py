"""Whose node is whose: a client's name belongs to one node, the first that says it, for the whole run.

On a SuperLink that admits registered keys a node's number stands for its key, and keeps doing so when the
node is started again. Where a key was registered under a client's name (`tightbeam federate register`
does it), that node can be no other client.
"""

from collections.abc import Iterable, Mapping

from tightbeam.common.errors import FederationError

__all__ = ["Claims"]


class Claims:
    """Which node each client is."""

    def __init__(self, clients: Iterable[str]) -> None:
        self._clients = frozenset(clients)
        self._node_ids: dict[str, int] = {}
        self._registered: dict[int, str] = {}

    def note_registered(self, names: Mapping[int, str]) -> None:
        """Hear under which names the operator registered nodes; any will do, or none."""
        self._registered |= names

    def bind(self, node_id: int, client: str) -> None:
        """Let a node be this client from now on.

        Raises:
            FederationError: another node is, or it is registered as another client; names both.

        """
        registered = self._registered.get(node_id)
        if registered in self._clients and registered != client:
            raise FederationError(
                f"{self._who(node_id)} says that it is {client}.",
                cure="Start it with the partition-id of the client whose key it has.",
            )
        first = self._node_ids.setdefault(client, node_id)
        if first != node_id:
            raise FederationError(
                f"{self._who(node_id)} says that it is {client}, and so did {self._who(first)} before it.",
                cure="Start each node with a partition-id of its own.",
            )

    def client_of(self, node_id: int) -> str:
        """Which client a node is, or was registered as; nothing where that is not known."""
        registered = self._registered.get(node_id, "")
        known = {number: client for client, number in self._node_ids.items()}
        return known.get(node_id, registered if registered in self._clients else "")

    def _who(self, node_id: int) -> str:
        name = self._registered.get(node_id)
        return f"Node {node_id}" + (f" (registered as {name})" if name else "")
