"""How a tensor becomes bytes: plain floats, int8 per token, rotated int4 and int5 (docs/codecs.md).

All work on torch tensors of any device; payloads are little-endian. Names that end in `s` round
stochastically, which gradients need: rounded to the nearest, what is small vanishes in every step alike.
"""

import torch

from tightbeam.common.errors import CodecError
from tightbeam.common.wire.codecs.base import Codec
from tightbeam.common.wire.codecs.plain import FLOATS, Int8
from tightbeam.common.wire.codecs.rotated import Rotated

__all__ = ["CODECS", "Codec", "codec", "lossless"]

CODECS: dict[str, Codec] = {
    each.name: each
    for each in (
        *FLOATS,
        Int8("int8"),
        Rotated("int5", bits=5),
        Rotated("int4", bits=4),
        Int8("int8s", stochastic=True),
        Rotated("int5s", bits=5, stochastic=True),
        Rotated("int4s", bits=4, stochastic=True),
    )
}


def codec(name: str) -> Codec:
    """Look one up by name."""
    try:
        return CODECS[name]
    except KeyError:
        raise CodecError(f"Unknown codec {name!r}.", cure=f"Known codecs: {', '.join(CODECS)}.") from None


def lossless(dtype: torch.dtype) -> str:
    """The smallest codec that changes nothing in tensors of `dtype`."""
    return "bf16" if dtype == torch.bfloat16 else "fp32"
