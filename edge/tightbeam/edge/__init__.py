"""The edge: private data, labels, adapters and optimizer, and a model whose trunk is computed by a cloud.

    with connect("localhost:50051", identity="certs/edge-a") as cloud:
        model = cloud.load_model(cut="4:4")
        model(**batch).loss.backward()

Nothing heavy is imported before `connect` or `Cloud` is asked for: a report needs no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tightbeam.edge.link.connection import Cloud, connect
    from tightbeam.edge.model.remote_trunk import RemoteTrunk

__all__ = ["Cloud", "RemoteTrunk", "connect"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tightbeam.edge.link import connection
    from tightbeam.edge.model import remote_trunk

    return getattr(remote_trunk if name == "RemoteTrunk" else connection, name)
