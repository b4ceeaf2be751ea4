"""Secure aggregation: the server learns the weighted sum of the clients' vectors and no vector.

The protocol of Bonawitz et al. (CCS 2017) with the signed consistency round, on X25519, HKDF, AES-256 and
Ed25519. Sans-IO: `SecAggClient` and `SecAggServer` take bytes and return bytes. docs/federation-math.md says
what it protects, against whom, and what it does not.
"""

from tightbeam.federation.secagg.answered import Answered
from tightbeam.federation.secagg.client import SecAggClient
from tightbeam.federation.secagg.fixed_point import FixedPoint, Layout, WeightedSum
from tightbeam.federation.secagg.keys import Roster, roster_from
from tightbeam.federation.secagg.plan import Plan
from tightbeam.federation.secagg.server import SecAggServer

__all__ = [
    "Answered",
    "FixedPoint",
    "Layout",
    "Plan",
    "Roster",
    "SecAggClient",
    "SecAggServer",
    "WeightedSum",
    "roster_from",
]
