"""A mode is one class and one entry: everything else asks the registry, and a mode of this page trains."""

import ast
from pathlib import Path
from pkgutil import resolve_name

import pytest
from torch import Tensor

from support.cached_runs import cached_recipe, losses, train_over
from support.in_process import InProcessCloud
from tightbeam.common.errors import RecipeError
from tightbeam.edge.comparison.compare import recipe_of
from tightbeam.edge.modes import MODES, ModeSpec, recipe_modes
from tightbeam.edge.modes.base import Mode
from tightbeam.edge.modes.top import Top
from tightbeam.edge.report.summary import summarise
from tightbeam.edge.report.table import sum_lines
from tightbeam.federation.scenario import scenario_from_mapping

ROOT = Path(__file__).parents[3]
PARTS = ("edge", "federation", "simulations", "cli", "benchmarks")


class Doubled(Top):
    """As `top`, with twice its loss."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return 2 * super().loss(batch)


TOY = ModeSpec(
    name="doubled",
    builds=f"{__name__}:Doubled",
    crosses="once",
    trains_bottom=False,
    bytes_rule="2d per token, for twice the loss",
    payload=lambda work: work.rows_once * work.row.forward,
    cloud_sees="each text once",
)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(MODES, TOY.name, TOY)
    return TOY.name


def test_a_new_mode_trains_and_is_reported_and_compared(
    toy: str, cloud: InProcessCloud, tmp_path: Path
) -> None:
    plain = {"train": {"epochs": 1}, "adapter": {"dropout": 0.0}}
    top, _ = train_over(cloud, cached_recipe(tmp_path / "top", **plain))
    recipe = cached_recipe(tmp_path / "toy", mode=toy, **plain)
    doubled, crossing = train_over(cloud, recipe)
    assert float(losses(doubled.folder)[0]) == pytest.approx(2 * float(losses(top.folder)[0]), rel=1e-6)
    assert {row.kind for row in crossing.rows} == {"forward"}  # once, and no gradient
    costs = summarise([doubled.folder.path])
    measured, *others = costs.modes
    assert (measured.mode, measured.measured, measured.cloud_sees) == (toy, True, "each text once")
    assert (
        measured.rule
        == "2d per token, for twice the loss; each example crosses once, then a local cache serves it"
    )
    assert [other.mode for other in others] == ["ushape", "top", "side", "local"]
    assert measured.payload_bytes == costs.total.step_payload_bytes > 0
    assert "top " in sum_lines(costs)[-1]
    assert recipe_of(recipe, toy).mode == toy
    (elsewhere,) = (one for one in summarise([top.folder.path]).modes if one.mode == toy)
    assert elsewhere.payload_bytes == pytest.approx(measured.payload_bytes, rel=0.01)


def test_a_federation_takes_a_new_mode(toy: str) -> None:
    scenario = scenario_from_mapping({"clients": 2, "rounds": 1, "client": {"mode": toy, "cut": "2:3"}})
    assert scenario.client.shared_blocks == 3


def test_a_mode_that_is_not_registered_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="mode should be 'ushape', 'top' or 'side', not 'doubled'"):
        cached_recipe(tmp_path, mode=TOY.name)
    with pytest.raises(RecipeError, match="mode should be 'ushape', 'top' or 'side', not 'freeze'"):
        cached_recipe(tmp_path, mode="freeze")  # a variant is asked for by its own key


@pytest.mark.parametrize("spec", MODES.values(), ids=lambda spec: spec.name)
def test_every_entry_holds_together(spec: ModeSpec) -> None:
    for place in filter(None, (spec.builds, spec.builds_frozen)):
        assert issubclass(resolve_name(place), Mode)
    assert not spec.variant_of or spec.variant_of in recipe_modes()
    assert not spec.freezes_as or MODES[spec.freezes_as].variant_of == spec.name
    assert f"`{spec.name}`" in (ROOT / "docs" / "modes.md").read_text(encoding="utf-8")


def comparisons_with_a_name(source: str) -> list[str]:
    """Comparisons of something that is called `mode` with the name of one."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            asked = [ast.unparse(side) for side in (node.left, *node.comparators)]
            words = {
                n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)
            }
            if any(text.rpartition(".")[2] in ("mode", "modes") for text in asked) and words & MODES.keys():
                found.append(ast.unparse(node))
    return found


def test_nobody_tests_the_name_of_a_mode() -> None:
    assert comparisons_with_a_name(
        "a.mode == 'top'; mode in ('side', 'x'); 'side' in modes; f.mode == 'r'"
    ) == [
        "a.mode == 'top'",
        "mode in ('side', 'x')",
        "'side' in modes",
    ]
    for part in PARTS:
        for path in (ROOT / part).rglob("*.py"):
            assert not comparisons_with_a_name(path.read_text(encoding="utf-8")), path
