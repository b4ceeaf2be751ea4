"""The edge's end of delta coding: the values that last crossed of each sample, both ways.

The edge leads in both directions: it names the bases, and what it holds is what counts. A cloud that lacks
one gets the step once more with whole values, the very ones that the delta stands for, and its bases for the
reply. So a restart costs bytes and changes no bit. Where a cloud is short of memory, that would cost bytes in
every epoch: then the edge forgets too, and starts anew with what was used longest ago.

N = rows, D = hidden size.
"""

import hmac
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tightbeam.common.backbone import Segments
from tightbeam.common.config import DELTA, Codecs
from tightbeam.common.wire.delta import (
    KEY_BYTES,
    WHOLE,
    Bases,
    BaseStore,
    Samples,
    decode_delta,
    encode_delta,
)
from tightbeam.common.wire.delta_header import BASE, DeltaHeader
from tightbeam.common.wire.messages import encode_tensor, tensor_spec
from tightbeam.common.wire.stepping import HIDDEN
from tightbeam.edge.cache.keys import sample_digest
from tightbeam.edge.channel import Exchange
from tightbeam.edge.jobs import Job

__all__ = ["DeltaStep", "EdgeDeltas"]


class EdgeDeltas:
    """What one run remembers of its samples, bounded in bytes.

    Sample keys are an HMAC over token ids under a secret that lives as long as what it names: the cloud sees
    that a sample comes again, and cannot find out which text it is by guessing, nor know it in another run.
    """

    def __init__(self, codecs: Codecs, max_bytes: float) -> None:
        self._codecs, self.max_bytes = codecs.alone, max_bytes
        uses = [name.startswith(DELTA) for name in (codecs.activations_up, codecs.activations_down)]
        share = max_bytes / max(sum(uses), 1)
        self._up, self._down = (BaseStore(share) if used else None for used in uses)
        self._secret = secrets.token_bytes(32)
        self._session, self._crossed = 0, set[bytes]()  # what crossed in the session that is open

    @property
    def num_bytes(self) -> int:
        """Kept, both directions."""
        return sum(store.num_bytes for store in (self._up, self._down) if store is not None)

    def clear(self) -> None:
        """Remember nothing: no sample will come again."""
        for store in filter(None, (self._up, self._down)):
            while len(store):
                store.drop_oldest()

    def entries(self) -> Iterator[bytes]:
        """Everything that `restore` needs: the secret, then a direction, key and rows for each base."""
        yield self._secret
        for direction, store in enumerate((self._up, self._down)):
            for key, rows in store.items() if store is not None else ():
                yield bytes([direction]) + key + rows.view(torch.uint8).numpy().tobytes()

    def restore(self, entries: Iterator[bytes], size: int) -> None:
        """Remember what another process did; rows have `size` elements."""
        self.clear()
        self._secret = next(entries)
        for entry in entries:
            store, key = (self._up, self._down)[entry[0]], entry[1 : 1 + KEY_BYTES]
            rows = torch.frombuffer(bytearray(entry[1 + KEY_BYTES :]), dtype=torch.bfloat16).view(-1, size)
            if store is not None:
                store.remember(Samples((key,), (len(rows),), size), rows)

    def begin(self, job: Job, hidden_ND: Tensor, input_ids_N: Tensor) -> "DeltaStep":
        """Put the tensor of a forward whose backward follows into its request; `NonFiniteError`."""
        samples = self._samples(job.segments, input_ids_N, hidden_ND.shape[1])
        up, down = (None if store is None else store.latest(samples) for store in (self._up, self._down))
        codec = self._codecs.activations_up
        DeltaHeader.write(job.header, samples, up, down)
        if up is None or self._up is None:
            job.add(HIDDEN, hidden_ND, codec)
            return DeltaStep(samples, None, down, self._down)
        with job.coding():
            payload, decoded_ND = encode_delta(codec, hidden_ND, up, samples.lengths)
            job.put(tensor_spec(HIDDEN, hidden_ND, codec), payload)
            self._up.remember(samples, decoded_ND)
        return DeltaStep(samples, decoded_ND, down, self._down)

    def crossed(self, samples: Samples, session: int) -> None:
        """These samples have reached the cloud in that session, counted by whoever opens them."""
        if session != self._session:
            self._session, self._crossed = session, set()
        self._crossed.update(samples.keys)

    def lost(self, samples: Samples, session: int) -> None:
        """The cloud lacks one of these. If it had all in this session, it is short of memory: forget half."""
        if session != self._session or not self._crossed.issuperset(filter(None, samples.keys)):
            return
        for store in (self._up, self._down):
            keep_bytes = store.num_bytes / 2 if store is not None else 0
            while store is not None and store.num_bytes > keep_bytes:
                store.drop_oldest()

    def _samples(self, segments: Segments, input_ids_N: Tensor, size: int) -> Samples:
        ids = input_ids_N.tolist()
        # not where the tokens stand: that may follow from the padding, and differ from epoch to epoch
        digests = [sample_digest(ids[a:b], range(b - a)) for a, b in segments.bounds]
        keys = [hmac.digest(self._secret, digest, "sha256")[:KEY_BYTES] for digest in digests]
        return Samples.of(keys, segments.lengths, size)


@dataclass(frozen=True, slots=True)
class DeltaStep:
    """One delta-coded forward until it is answered."""

    samples: Samples
    decoded_ND: Tensor | None  # what the cloud makes of the delta, bfloat16; None: coded alone
    down: Bases | None
    store: BaseStore | None  # of what comes down

    def send_whole(self, job: Job) -> None:
        """Say the same without relying on anything the cloud keeps."""
        with job.coding():
            if self.decoded_ND is not None:
                nothing: Bases = (None,) * len(self.samples.keys)
                DeltaHeader.write(job.header, self.samples, nothing, self.down)
                job.clear()
                job.add(HIDDEN, self.decoded_ND, WHOLE)
            if self.down is not None and any(self.down):
                job.put(*encode_tensor(BASE, self._rows_of(self.down), WHOLE))

    def result(self, exchange: Exchange) -> Tensor:
        """Hidden states after the trunk, `[N, D]`."""
        if self.down is None or self.store is None:
            return exchange.reply.tensor(HIDDEN)
        spec, payload = exchange.reply.coded(HIDDEN)
        out_ND = decode_delta(spec.codec, payload, self.down, self.samples.lengths, self.samples.size)
        self.store.remember(self.samples, out_ND)
        return out_ND

    def _rows_of(self, bases: Bases) -> Tensor:
        empty = [torch.zeros(n, self.samples.size, dtype=torch.bfloat16) for n in self.samples.lengths]
        return torch.cat(
            [rows if base is None else base.rows for rows, base in zip(empty, bases, strict=True)]
        )
