"""Arrays as Flower's records, and messages as bytes."""

import io
import math
from collections.abc import Mapping

import numpy as np
from flwr.app import Array, ArrayRecord, Message
from flwr.common.serde import recorddict_to_proto
from numpy.typing import NDArray

__all__ = ["from_record", "measurable", "message_bytes", "to_record"]


def to_record(arrays: Mapping[str, NDArray[np.floating]]) -> ArrayRecord:
    """Arrays as Flower carries them."""
    # Not ascontiguousarray, which gives a scalar a dimension.
    return ArrayRecord({name: Array(np.asarray(array, order="C")) for name, array in arrays.items()})


def from_record(record: ArrayRecord) -> dict[str, NDArray[np.floating]]:
    """Inverse of `to_record`.

    Raises:
        TypeError, ValueError: an array of another form, or one that claims another size than it has.

    """
    for array in record.values():
        _require_size(array)
    return {name: array.numpy() for name, array in record.items()}


def _require_size(array: Array) -> None:
    """NumPy makes room for what a header claims before it reads on."""
    file = io.BytesIO(array.data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("no array of NumPy's format 1.0")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(array.data) - file.tell():
        raise ValueError(f"not the bytes of an array of shape {shape}")


def message_bytes(message: Message) -> int:
    """Size of a message's content as Flower's protobuf; 0 for an error, which has none."""
    return int(recorddict_to_proto(message.content).ByteSize()) if message.has_content() else 0


def measurable(update: ArrayRecord, start: ArrayRecord) -> ArrayRecord:
    """The update; if nothing in it moved, moved by 1e-12: Flower divides by its length (1.41)."""
    arrays = {name: array.numpy() for name, array in update.items()}
    if any(not np.array_equal(array, start[name].numpy()) for name, array in arrays.items()):
        return update
    first = next(iter(arrays))
    arrays[first] = arrays[first].copy()
    arrays[first].flat[0] += max(1e-12, float(np.spacing(np.abs(arrays[first].flat[0]))))
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})
