"""In `top` and `side` nothing crosses but cut activations, positions, and how many tokens samples share.

Every plaintext is looked at. What is recorded is what a channel is given to seal. The sealed bytes that the
accounts count are exactly those, so there is no other plaintext. A check that could not fail would show
nothing: labels, token ids, gradients and an adapter planted in a recording are each found.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from support.cached_runs import Crossing, cached_recipe, save_model, train_over
from support.edge_runs import byte_tokenizer
from support.in_process import InProcessCloud
from tightbeam.common.backbone import Segments
from tightbeam.common.errors import ProtocolError
from tightbeam.common.wire.codecs import codec
from tightbeam.common.wire.messages import decode_tensor
from tightbeam.common.wire.prefixes import RowMap, SharedPrefixes
from tightbeam.common.wire.records import TAG_BYTES
from tightbeam.edge.data import Example, load_examples
from tightbeam.proto import backbone_pb2 as pb

# PEFT 0.21 asks transformers 5.23 for a property under its former name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
Message = tuple[pb.StepRequest, list[Tensor]]
MODES: dict[str, dict[str, Any]] = {
    "top": {"mode": "top"},
    "side": {"mode": "side", "side": {"taps": 2, "width": 16, "heads": 2}},
}
ALLOWED = {"step", "kind", "tensors", "reply_codec", "lengths", "run_starts", "run_lengths"}
SHARED = {"prefix_of", "prefix_rows"}
ASKED = {"side": {"taps", "projection"}}
WIDTH = 16


class Recorded:
    """One run of each mode: what crossed, its data, its adapter, and the backbone."""

    def __init__(self, cloud: InProcessCloud, model: Path, folder: Path, mode: str) -> None:
        self.mode = mode
        recipe = cached_recipe(folder, data={"eval_fraction": 0.2}, train={"epochs": 2}, **MODES[mode])
        result, self.crossing = train_over(cloud, recipe)
        self.examples = load_examples(recipe.data.train, byte_tokenizer())
        self.adapter = load_file(result.folder.adapter / "adapter_model.safetensors")
        self.cut_states = [_cut_state(save_model(model), example) for example in self.examples]


def _cut_state(whole: PreTrainedModel, example: Example) -> Tensor:
    with torch.no_grad():
        states = whole(torch.tensor([example.input_ids]), output_hidden_states=True).hidden_states
    state_nD: Tensor = states[2][0]
    return state_nD


@pytest.fixture(scope="module", params=MODES)
def recorded(
    request: pytest.FixtureRequest, cloud: InProcessCloud, tmp_path_factory: pytest.TempPathFactory
) -> Recorded:
    model = tmp_path_factory.mktemp("whole")
    return Recorded(cloud, model, tmp_path_factory.mktemp("run"), request.param)


def foreign(run: Recorded, messages: Sequence[Message]) -> list[str]:
    """What in the messages is neither a cut activation of a sample, nor where its tokens stand."""
    found, seen = [], [0] * len(run.examples)
    for header, payloads in messages:
        if header.kind != pb.FORWARD or header.keep:
            found.append("something for a backward")
        names = {field.name for field, _ in header.ListFields()}
        found += sorted(names - ALLOWED - SHARED - ASKED.get(run.mode, set()))
        lengths, starts = list(header.lengths), list(header.run_starts)
        if starts != [0] * len(lengths) or list(header.run_lengths) != lengths:
            found.append("positions that are none")
        if len(header.tensors) != 1 or len(payloads) != 1:
            found.append("more than one tensor")
            continue
        (spec,), (payload,) = header.tensors, payloads
        try:
            row_map = _row_map(header)
        except ProtocolError:
            found.append("shared rows that are none")
            continue
        if payload.numel() != codec("fp32").num_bytes((len(row_map.crossing_M), WIDTH)):
            found.append("a tensor of another size")
            continue
        texts: list[tuple[int, ...]] = []
        for rows_nD in row_map.spread(decode_tensor(spec, payload)).split(lengths):
            same = [i for i, state in enumerate(run.cut_states) if _close(state, rows_nD)]
            if same:
                seen[same[0]] += 1
                texts.append(run.examples[same[0]].input_ids)
            else:
                found.append("rows that are no cut activation")
        if len(texts) == len(lengths) and _shared_by(texts) != SharedPrefixes.read(header):
            found.append("shared rows that are none")
    if any(count > 1 for count in seen):
        found.append("a sample again")
    return found


def _segments(lengths: Sequence[int]) -> Segments:
    return Segments(tuple(lengths), torch.cat([torch.arange(n) for n in lengths]))


def _row_map(header: pb.StepRequest) -> RowMap:
    """As the cloud makes it."""
    segments = _segments(header.lengths)
    nothing = SharedPrefixes(segments.lengths, *[(0,) * len(header.lengths)] * 2)
    return (SharedPrefixes.read(header) or nothing).row_map(segments.positions_N)


def _shared_by(texts: Sequence[tuple[int, ...]]) -> SharedPrefixes | None:
    """What the header may say: how long samples are the same, and nothing of what they are."""
    ids_N = torch.tensor([token for text in texts for token in text])
    return SharedPrefixes.find(ids_N, _segments([len(text) for text in texts]))


def _close(state_nD: Tensor, rows_nD: Tensor) -> bool:
    return state_nD.shape == rows_nD.shape and bool(torch.allclose(state_nD, rows_nD, atol=1e-5))


def test_only_cut_activations_and_positions(recorded: Recorded) -> None:
    messages = recorded.crossing.messages
    assert foreign(recorded, messages) == []
    assert sum(len(header.lengths) for header, _ in messages) == len(recorded.examples)
    assert all(
        max(header.prefix_rows) >= 2 for header, _ in messages
    )  # the texts end in " + 1 =" and begin alike


def test_the_recording_is_all_that_was_sealed(recorded: Recorded) -> None:
    """A header and one chunk a tensor, each record with its tag: to the byte what the accounts counted."""
    crossing: Crossing = recorded.crossing
    plain = [len(header.SerializeToString()) for header, _ in crossing.messages]
    plain += [payload.numel() for _, payloads in crossing.messages for payload in payloads]
    assert sum(row.bytes.sealed_up_bytes for row in crossing.rows) == sum(plain) + TAG_BYTES * len(plain)


def _labels_as_a_tensor(run: Recorded, header: pb.StepRequest, payloads: list[Tensor]) -> None:
    labels = torch.tensor(run.examples[0].labels)
    header.tensors.append(pb.TensorSpec(name="labels", codec="fp32", shape=[len(labels)]))
    payloads.append(labels.float().view(torch.uint8))


def _labels_in_a_channel(run: Recorded, header: pb.StepRequest, payloads: list[Tensor]) -> None:
    rows_ND = payloads[0].clone().view(torch.float32).view(-1, WIDTH)
    rows_ND[:, -1] = 1e-3 * torch.arange(len(rows_ND))
    payloads[0] = rows_ND.flatten().view(torch.uint8)


def _labels_as_positions(run: Recorded, header: pb.StepRequest, payloads: list[Tensor]) -> None:
    header.run_starts[0] = run.examples[0].input_ids[-1]


def _labels_behind_the_rows(run: Recorded, header: pb.StepRequest, payloads: list[Tensor]) -> None:
    payloads[0] = torch.cat([payloads[0], torch.tensor(run.examples[0].labels).view(torch.uint8)])


def _tokens_as_shared_rows(run: Recorded, header: pb.StepRequest, payloads: list[Tensor]) -> None:
    header.prefix_rows[:] = [0, *run.examples[0].input_ids[: len(header.lengths) - 1]]


def _a_gradient(run: Recorded, header: pb.StepRequest, payloads: list[Tensor]) -> None:
    header.kind = pb.BACKWARD


def _an_adapter(run: Recorded, header: pb.StepRequest, payloads: list[Tensor]) -> None:
    weights = torch.cat([tensor.flatten() for tensor in run.adapter.values()])
    size = payloads[0].numel() // 4
    payloads[0] = weights.repeat(size // len(weights) + 1)[:size].contiguous().view(torch.uint8)


def _another_epoch(run: Recorded, header: pb.StepRequest, payloads: list[Tensor]) -> None:
    other, rows = run.crossing.messages[0]
    header.CopyFrom(other)
    payloads[:] = rows


@pytest.mark.parametrize(
    ("plant", "named"),
    [
        (_labels_as_a_tensor, "more than one tensor"),
        (_labels_in_a_channel, "rows that are no cut activation"),
        (_labels_as_positions, "positions that are none"),
        (_labels_behind_the_rows, "a tensor of another size"),
        (_tokens_as_shared_rows, "shared rows that are none"),
        (_a_gradient, "something for a backward"),
        (_an_adapter, "rows that are no cut activation"),
        (_another_epoch, "a sample again"),
    ],
)
def test_what_is_planted_is_found(
    recorded: Recorded, plant: Callable[[Recorded, pb.StepRequest, list[Tensor]], None], named: str
) -> None:
    messages = [(deepcopy(header), list(payloads)) for header, payloads in recorded.crossing.messages]
    plant(recorded, *messages[-1])
    assert named in foreign(recorded, messages)
