"""The cut activations that mode `side` keeps: no step is another for it, and none runs the bare bottom."""

import uuid
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor

from support.cached_runs import cached_recipe, losses, train_over
from support.in_process import InProcessCloud
from support.tiny import ragged_batch
from tightbeam.edge.cache import ActivationCache, inspect_cache, verify_cache
from tightbeam.edge.cache.shards import read_header
from tightbeam.edge.cache.store import shard_paths
from tightbeam.edge.modes.packed import PackedBatch, packed_attention_in, packed_loss
from tightbeam.edge.side import SidePath, add_side

# PEFT 0.21 asks transformers 5.23 for a property under its former name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SIDE = {"taps": 2, "width": 16, "heads": 2}
SECRET = b"s" * 32


class Edge:
    """A side model at cut 2:2 with trained numbers, a cache behind it, and how often block 0 runs."""

    def __init__(
        self, cloud: InProcessCloud, folder: Path, *, adapt_bottom: bool, keeps: bool = True
    ) -> None:
        base = cloud.load_model(cloud.stepper(f"run-{uuid.uuid4().hex}", "2:2"), "2:2")
        torch.manual_seed(3)
        layers = [0, 1, 4, 5] if adapt_bottom else [4, 5]
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], layers_to_transform=layers)
        model = peft.get_peft_model(base, config)
        assert isinstance(model, peft.PeftModel)
        self.model = model
        self.side: SidePath = add_side(model, cloud.card, **SIDE)
        with torch.no_grad():
            for parameter in self.trained().values():
                parameter.add_(0.3 * torch.randn(parameter.shape))
        scope = self.side.parts.scope(cloud.backbone.fingerprint, "2:2", "", base.dtype, 16)
        self.cache = ActivationCache(folder, scope, secret=SECRET, max_bytes=10**8, warn=pytest.fail)
        self.side.cache, self.side.keeps_bottom = self.cache, keeps
        self.runs = 0
        self.side.parts.blocks[0].register_forward_hook(self._count)

    def trained(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def step(self, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor], int]:
        """Loss, gradients, and how often the bottom ran."""
        before = self.runs
        self.model.zero_grad()
        with packed_attention_in(self.model.get_base_model()):
            loss = packed_loss(self.model, PackedBatch.of(batch))
            loss.backward()
        grads = {name: p.grad.clone() for name, p in self.trained().items() if p.grad is not None}
        return loss.item(), grads, self.runs - before

    def _count(self, *args: object) -> None:
        self.runs += 1


@pytest.fixture(params=[True, False], ids=["adapted", "bare"])
def adapt_bottom(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    given = ragged_batch(4, 12, side="right", vocab=261)
    given["input_ids"][:, :2] = 70
    return given


def test_steps_from_kept_rows_are_the_recomputed_ones(
    cloud: InProcessCloud, tmp_path: Path, adapt_bottom: bool, batch: dict[str, Tensor]
) -> None:
    found = {}
    for keeps in (True, False):
        edge = Edge(cloud, tmp_path / str(keeps), adapt_bottom=adapt_bottom, keeps=keeps)
        found[keeps] = [edge.step(batch) for _ in range(3)]
        edge.cache.close()
    assert len(found[True][0][1]) > 20
    for kept, computed in zip(found[True], found[False], strict=True):
        assert kept[0] == computed[0] == found[True][0][0]
        assert kept[1].keys() == computed[1].keys()
        assert all(torch.equal(kept[1][name], computed[1][name]) for name in kept[1])
    # The first fetches; the second has the answers, and keeps what the bottom gives.
    assert [step[2] for step in found[True]] == ([2, 2, 1] if adapt_bottom else [1, 1, 0])
    assert [step[2] for step in found[False]] == ([2, 2, 2] if adapt_bottom else [1, 1, 1])


def test_a_changed_row_is_computed_again(
    cloud: InProcessCloud, tmp_path: Path, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that lies would change the loss; one whose bytes were changed is told and made good."""
    edge = Edge(cloud, tmp_path / "cache", adapt_bottom=True)
    loss = [edge.step(batch)[0] for _ in range(2)][-1]
    with monkeypatch.context() as patch:
        patch.setattr(edge.side, "_kept", lambda lookup: torch.zeros(len(lookup.input_ids_N), 16))
        assert edge.step(batch)[0] != loss
    edge.cache.close()
    (path,) = shard_paths(tmp_path / "cache")
    raw = bytearray(path.read_bytes())
    for _, stop in read_header(path)[1].values():
        raw[stop - 1] ^= 1
    path.write_bytes(raw)
    warnings: list[str] = []
    scope = edge.cache.scope
    with ActivationCache(
        tmp_path / "cache", scope, secret=SECRET, max_bytes=10**8, warn=warnings.append
    ) as again:
        edge.side.cache = again
        steps = [edge.step(batch) for _ in range(3)]
    assert [(step[0], step[2]) for step in steps] == [(loss, 2), (loss, 2), (loss, 1)]
    assert len(warnings) == 8
    assert "was changed" in warnings[0]


def test_a_run_keeps_them_beside_the_answers_of_mode_top(cloud: InProcessCloud, tmp_path: Path) -> None:
    """A folder that mode top filled serves side without taps, which adds its rows; both are verified."""
    shared = {"cache": {"dir": str(tmp_path / "shared")}}
    train_over(cloud, cached_recipe(tmp_path / "top", **shared))
    (before,) = inspect_cache(tmp_path / "shared").scopes
    _, crossing = train_over(cloud, cached_recipe(tmp_path / "a", mode="side", side={"taps": 0}, **shared))
    assert crossing.rows == []
    (after,) = inspect_cache(tmp_path / "shared").scopes
    assert (before.num_entries, after.num_entries) == (23, 46)
    assert verify_cache(tmp_path / "shared", SECRET) == (46, [])
    assert after.num_bytes > 1.8 * before.num_bytes


def test_answers_come_first_where_room_is_short(cloud: InProcessCloud, tmp_path: Path) -> None:
    """A cache that holds all answers and not all rows keeps the answers alone, and trains the same."""
    whole, _ = train_over(cloud, cached_recipe(tmp_path / "a", mode="side", side=SIDE))
    (scope,) = inspect_cache(whole.folder.path / "cache").scopes
    assert scope.num_entries == 46
    room = {"cache": {"max_gb": 0.8 * scope.num_bytes / 1e9}}
    small, crossing = train_over(cloud, cached_recipe(tmp_path / "b", mode="side", side=SIDE, **room))
    (scope,) = inspect_cache(small.folder.path / "cache").scopes
    assert scope.num_entries == 23
    assert "full" not in crossing.said
    assert losses(small.folder) == losses(whole.folder)
