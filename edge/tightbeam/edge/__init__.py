"""The edge: keeps data, labels, adapters and optimizer, and trains against a cloud's trunk.

from tightbeam.edge import connect
with connect("localhost:50051", identity="certs/clinic") as cloud:
    model = cloud.load_model(cut="4:4")
"""

from tightbeam.edge.connection import Cloud, connect
from tightbeam.edge.remote_trunk import RemoteTrunk

__all__ = ["Cloud", "RemoteTrunk", "connect"]
