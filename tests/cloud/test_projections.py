"""Taps are the model's own hidden states, their projection is a whitened PCA, and nothing else is given."""

import hashlib
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from support.edge_runs import byte_tokenizer, tiny_llama
from support.in_process import InProcessCloud
from support.tiny import TINY, tiny_model
from tightbeam.cloud.backbone import load_backbone
from tightbeam.cloud.engine import Done
from tightbeam.cloud.projections import ProjectionOptions
from tightbeam.common.accounts.rows import StepRow
from tightbeam.common.backbone import CutPolicy, PackedTrunk, Projection, Segments, Taps
from tightbeam.common.errors import (
    FingerprintError,
    ProtocolError,
    StepConflictError,
    StepRefusedError,
    TightbeamError,
    UsageError,
)
from tightbeam.common.wire.messages import encode_tensor
from tightbeam.edge import connect
from tightbeam.edge.link.stepper import Answer
from tightbeam.edge.model.weights import check_card
from tightbeam.proto import backbone_pb2 as pb

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 40
SIZE = 4
SEGMENTS = Segments((5, 3), torch.tensor([0, 1, 2, 3, 4, 0, 1, 2]))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(num_hidden_layers=6).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "public.txt").write_text(TEXT, encoding="utf-8")
    return folder


def options(model: Path, file: Path, size: int = SIZE) -> ProjectionOptions:
    return ProjectionOptions(file=file, text=model / "public.txt", size=size)


@pytest.fixture(scope="module")
def cloud(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcessCloud]:
    folder = tmp_path_factory.mktemp("cloud")
    with InProcessCloud(model, folder, projection=options(model, folder / "p.safetensors")) as running:
        yield running


@pytest.fixture
def projection(cloud: InProcessCloud) -> Projection:
    (found,) = cloud.backbone.projections.values()
    return found


def whole(model: Path) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded.eval()
    return loaded


def inner_states(model: PreTrainedModel, ids_1N: Tensor) -> list[Tensor]:
    """What each block puts out, `[N, D]`; the last is left out: the model norms it."""
    with torch.no_grad():
        states = model(input_ids=ids_1N, output_hidden_states=True, use_cache=False).hidden_states
    return [state[0] for state in states[1:-1]]


def sizes(cloud: InProcessCloud) -> tuple[str, int]:
    (offer,) = cloud.card.tap_offer.projections
    return offer.sha256, offer.size


def ask(
    cloud: InProcessCloud, taps: Taps, hidden_ND: Tensor, segments: Segments, codec: str = "fp32"
) -> tuple[Answer, StepRow]:
    rows: list[StepRow] = []
    stepper = cloud.stepper(f"run-{uuid.uuid4().hex}", codec=codec, on_row=rows.append)
    stepper.taps = taps
    answer = stepper.collect(stepper.submit(hidden_ND, segments))
    return answer, rows[0]


@pytest.mark.parametrize("family", TINY)
def test_a_tap_is_what_the_block_puts_out(family: str) -> None:
    model = tiny_model(family)
    ids_1N = torch.arange(3, 12)[None]
    states = inner_states(model, ids_1N)
    segments = Segments((9,), torch.arange(9))
    out_ND, tapped = PackedTrunk(model).run_tapped(states[0], segments, range(1, 5), (2, 3))
    assert sorted(tapped) == [2, 3]
    for block, tap_ND in tapped.items():
        assert torch.allclose(tap_ND, states[block], rtol=1e-4, atol=1e-5)
    assert torch.allclose(out_ND, states[4], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("projected", [True, False])
def test_taps_over_the_wire_are_the_whole_models_states(
    cloud: InProcessCloud, model: Path, projection: Projection, projected: bool
) -> None:
    ids = torch.tensor([[70, 71, 72, 73, 74], [80, 81, 82, 80, 80]])
    each = [inner_states(whole(model), row[:n][None]) for row, n in zip(ids, SEGMENTS.lengths, strict=True)]
    states = [torch.cat(pair) for pair in zip(*each, strict=True)]
    sha256, size = sizes(cloud)
    taps = Taps((1, 3), size, sha256) if projected else Taps((1, 3), 16)
    answer, _ = ask(cloud, taps, states[0], SEGMENTS)
    assert torch.allclose(answer.hidden_ND, states[3], atol=1e-5)  # cut 1:2: blocks 1 to 3
    for block, tap in zip((1, 3), answer.taps, strict=True):
        expected = states[block]
        if projected:
            expected = ((expected - projection.means[block]) @ projection.bases[block]).clamp(-8, 8)
        assert torch.allclose(tap.hidden_ND, expected, atol=1e-5)
    assert not torch.allclose(answer.taps[0].hidden_ND, answer.taps[1].hidden_ND, atol=1e-3)


def test_a_projection_is_a_whitened_pca_without_first_tokens(model: Path, projection: Projection) -> None:
    ids = byte_tokenizer()(TEXT)["input_ids"]
    reference = whole(model)
    chunks = [torch.tensor([ids[start : start + 256]]) for start in range(0, len(ids), 256)]
    states = [inner_states(reference, chunk) for chunk in chunks]
    for block in (1, 4):
        rows_ND = torch.cat([state[block][1:] for state in states]).double()
        assert torch.allclose(projection.means[block].double(), rows_ND.mean(0), atol=1e-5)
        white_NP = (rows_ND - rows_ND.mean(0)) @ projection.bases[block].double()
        assert torch.allclose(white_NP.T @ white_NP / len(rows_ND), torch.eye(SIZE).double(), atol=1e-3)
        _, _, axes_DD = torch.linalg.svd(rows_ND - rows_ND.mean(0), full_matrices=False)
        unit_DP = projection.bases[block].double()
        unit_DP = unit_DP / unit_DP.norm(dim=0)
        assert torch.allclose((axes_DD[:SIZE] @ unit_DP).abs(), torch.eye(SIZE).double(), atol=1e-3)
        with_first = torch.cat([state[block] for state in states]).double()
        assert not torch.allclose(projection.means[block].double(), with_first.mean(0), atol=1e-5)


def test_outliers_are_clamped(projection: Projection) -> None:
    assert projection(2, torch.full((1, 16), 1e6)).abs().max() == 8.0


def test_the_same_text_gives_the_same_file_and_is_fitted_once(model: Path, tmp_path: Path) -> None:
    def serve(file: Path, size: int = SIZE) -> str:
        policy = CutPolicy.parse("")
        loaded = load_backbone(
            str(model), policy, device="cpu", dtype="auto", projection=options(model, file, size)
        )
        (name,) = loaded.projections
        assert name == hashlib.sha256(file.read_bytes()).hexdigest()
        return name

    first = serve(tmp_path / "a.safetensors")
    assert serve(tmp_path / "b.safetensors") == first
    before = (tmp_path / "a.safetensors").stat().st_mtime_ns
    serve(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_mtime_ns == before
    assert serve(tmp_path / "a.safetensors", SIZE + 1) != first


def test_the_card_names_it_and_edges_can_download_it(cloud: InProcessCloud) -> None:
    sha256, size = sizes(cloud)
    card = cloud.card
    check_card(card)  # it is not part of the fingerprint
    (blob,) = [blob for blob in card.blobs if blob.name.startswith("projection.")]
    assert (blob.sha256, blob.name, size) == (sha256, f"projection.{sha256[:12]}", SIZE)
    data = b"".join(cloud.fetch(sha256, 0))
    assert Projection.sha256(data) == sha256
    assert list(card.tap_offer.blocks) == [1, 2, 3, 4]


def test_a_cloud_without_projection_offers_raw_taps(tiny_folder: object, model: Path, tmp_path: Path) -> None:
    with InProcessCloud(model, tmp_path) as plain:
        assert not plain.card.tap_offer.projections
        answer, _ = ask(plain, Taps((2,), 16), torch.randn(8, 16), SEGMENTS)
        assert answer.taps[0].hidden_ND.shape == (8, 16)


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_both_accounts_count_the_taps(cloud: InProcessCloud, codec: str) -> None:
    sha256, size = sizes(cloud)
    hidden_ND = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    answer, row = ask(cloud, Taps((1, 2, 3), size, sha256), hidden_ND, SEGMENTS, codec)
    specs = [encode_tensor("x", t, codec)[1].numel() for t in (hidden_ND, *(torch.randn(8, SIZE),) * 3)]
    assert row.bytes.payload_down_bytes == sum(specs)
    assert row.bytes.payload_up_bytes == specs[0]
    (usage,) = [run for run in cloud.ledger.usage("insecure/edge", None) if run.run == row.run]
    assert usage.bytes == row.bytes
    assert {tap.codec for tap in answer.taps} == {codec}
    bare, _ = ask(cloud, Taps((1,), size, sha256), hidden_ND, SEGMENTS)
    without = cloud.stepper(f"bare-{codec}")
    assert torch.equal(without.forward(hidden_ND, SEGMENTS, keep=False)[0], bare.hidden_ND)


def test_taps_cross_grpc(cloud: InProcessCloud) -> None:
    sha256, size = sizes(cloud)
    with connect(cloud.address or cloud.listen(), insecure=True) as edge:
        stepper = edge.open_steps("1:2")
        stepper.taps = Taps((2, 3), size, sha256)
        hidden_ND = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
        answer = stepper.collect(stepper.submit(hidden_ND, SEGMENTS))
        direct, _ = ask(cloud, stepper.taps, hidden_ND, SEGMENTS)
        for one, other in zip(answer.taps, direct.taps, strict=True):
            assert torch.equal(one.hidden_ND, other.hidden_ND)
        stepper.taps = replace(stepper.taps, size=size + 1)  # a cloud that answers otherwise than announced
        with pytest.raises(ProtocolError, match="tap of 4 elements"):
            stepper.collect(stepper.submit(hidden_ND, SEGMENTS))


@pytest.mark.parametrize("lie", ["another block", "wider than the hidden states", "fewer tokens", "none"])
def test_an_edge_takes_no_other_taps_than_it_asked_for(
    cloud: InProcessCloud, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    honest = cloud.engine.forward_tapped
    shapes = {"wider than the hidden states": (8, 17), "fewer tokens": (7, SIZE)}

    async def lying(tenant: str, hidden_ND: Tensor, segments: Segments, span: range, taps: Taps) -> Done:
        done = await honest(tenant, hidden_ND, segments, span, taps)
        if lie == "none":
            return replace(done, taps={})
        if lie == "another block":
            return replace(done, taps={3: done.taps[2]})
        return replace(done, taps={2: torch.zeros(shapes[lie])})

    monkeypatch.setattr(cloud.engine, "forward_tapped", lying)
    sha256, size = sizes(cloud)
    with connect(cloud.address or cloud.listen(), insecure=True) as edge:
        stepper = edge.open_steps("1:2")
        stepper.taps = Taps((2,), size, sha256)
        with pytest.raises(ProtocolError, match="answered step 0 with tensors of shape"):
            stepper.collect(stepper.submit(torch.ones(8, 16), SEGMENTS))


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        (Taps((0,), SIZE), "Block 0 cannot be tapped"),
        (Taps((1, 4), SIZE), "Block 4 cannot be tapped"),  # loaded, but not in the trunk of cut 1:2
        (Taps((4_000_000_000,), SIZE), "cannot be tapped"),
        (Taps((2, 1), SIZE), "ascending"),
        (Taps((1, 1), SIZE), "ascending"),
        (Taps(tuple(range(1, 18)), SIZE), "17 taps, more than this cloud's 16"),
        (Taps((1,), SIZE, "ab" * 32), "no projection 'abab"),
        (Taps((), SIZE, "ab" * 32), "belong to a forward"),
    ],
)
def test_what_is_not_offered_is_refused_by_name(cloud: InProcessCloud, taps: Taps, message: str) -> None:
    with pytest.raises(StepRefusedError, match=message):
        ask(cloud, taps, torch.zeros(8, 16), SEGMENTS)


@pytest.mark.parametrize("change", ["keep", "backward"])
def test_taps_belong_to_a_forward_without_backward(cloud: InProcessCloud, change: str) -> None:
    spec, payload = encode_tensor("hidden", torch.zeros(8, 16), "fp32")
    header = pb.StepRequest(
        step=1, kind=pb.FORWARD, keep=change == "keep", reply_codec="fp32", lengths=[5, 3],
        run_starts=[0, 0], run_lengths=[5, 3], tensors=[spec], taps=[1],
    )  # fmt: skip
    if change == "backward":
        header.kind = pb.BACKWARD
        header.tensors[0].name = "grad_hidden"
    channel = cloud.open_channel(f"run-{change}", "1:2")
    with pytest.raises(StepRefusedError, match="belong to a forward"):
        channel.submit(header, [payload]).result(timeout=30)
    channel.close()


def test_one_step_key_cannot_ask_for_other_taps(cloud: InProcessCloud) -> None:
    spec, payload = encode_tensor("hidden", torch.ones(8, 16), "fp32")

    def send(*taps: int) -> pb.StepReply:
        header = pb.StepRequest(
            step=7, kind=pb.FORWARD, reply_codec="fp32", lengths=[5, 3], run_starts=[0, 0],
            run_lengths=[5, 3], tensors=[spec], taps=taps,
        )  # fmt: skip
        channel = cloud.open_channel("one-key", "1:2")
        reply = channel.submit(header, [payload]).result(timeout=30).reply.header
        channel.close()
        return reply

    assert not send(1).HasField("failure")
    assert send(1).HasField("billed_before")
    assert send(2).failure.code == StepConflictError.code


def test_what_cannot_be_fitted_is_refused(model: Path, tmp_path: Path) -> None:
    def load(changed: ProjectionOptions) -> None:
        load_backbone(str(model), CutPolicy.parse(""), device="cpu", dtype="auto", projection=changed)

    file = tmp_path / "p.safetensors"
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(UsageError, match="8 usable tokens, too few for 6"):
        load(ProjectionOptions(file=file, text=tmp_path / "short.txt", size=6))
    with pytest.raises(UsageError, match="17 elements"):
        load(options(model, file, 17))
    with pytest.raises(UsageError, match="Cannot read the projection text"):
        load(ProjectionOptions(file=file, text=tmp_path / "absent.txt"))
    with pytest.raises(UsageError, match="no projection of this version"):
        load(ProjectionOptions(file=file))
    load(options(model, file))
    load(ProjectionOptions(file=file))
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(UsageError, match="no projection of this version"):
        load(ProjectionOptions(file=file))


def test_a_projection_of_another_backbone_is_refused(model: Path, tmp_path: Path) -> None:
    file, other = tmp_path / "p.safetensors", tmp_path / "other"
    load_backbone(
        str(model), CutPolicy.parse(""), device="cpu", dtype="auto", projection=options(model, file)
    )
    tiny_llama(seed=1, num_hidden_layers=6).save_pretrained(other)
    with pytest.raises(FingerprintError, match="fitted for another backbone"):
        load_backbone(
            str(other), CutPolicy.parse(""), device="cpu", dtype="auto",
            projection=ProjectionOptions(file=file),
        )  # fmt: skip
    with pytest.raises(TightbeamError, match="no usable tokenizer"):
        load_backbone(
            str(other), CutPolicy.parse(""), device="cpu", dtype="auto",
            projection=options(model, tmp_path / "q.safetensors"),
        )  # fmt: skip
