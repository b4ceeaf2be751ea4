"""What a federation says of money and of adapters: by its clouds' prices, and mode by mode."""

from collections.abc import Iterator
from typing import Any

import pytest

from support.federations import Playground, save_backbone
from support.in_process import InProcessCloud
from tightbeam.common.accounts.prices import ASSUMED, CLOUD, PriceList
from tightbeam.common.errors import DataError
from tightbeam.federation.accounts.from_ledger import account
from tightbeam.federation.scenario import Scenario
from tightbeam.federation.server.pricing import tariff_of, with_offers
from tightbeam.proto import backbone_pb2 as pb

LIST = {"currency": "EUR", "per_gigabyte": 1000.0, "per_petaflop": 7.0}


@pytest.fixture(scope="module")
def priced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Playground]:
    base = tmp_path_factory.mktemp("priced")
    save_backbone(base / "model")
    asked = pb.Prices(currency="EUR", per_gigabyte=1000.0, per_petaflop=7.0)
    with InProcessCloud(base / "model", base / "cloud", prices=asked) as cloud:
        yield Playground(cloud.listen(), base, base / "model")


def _work(playground: Playground, scenario: Scenario) -> list[dict[str, Any]]:
    return [row for kind in ("client_round", "client_eval") for row in playground.rows(scenario, kind)]


def test_clients_are_billed_and_bounded_by_their_clouds_prices(priced: Playground) -> None:
    """By prices of its own making, 0.09 a gigabyte, the last one would have stayed."""
    budget = {"budget": {"money": 0.02}}
    scenario = priced.scenario(rounds=1, groups={"poor": {"clients": 1, **budget}})
    priced.run(scenario)
    found = account(scenario.folder, scenario)
    assert {name: getattr(found.prices, name) for name in LIST} == LIST
    assert {found.price_sources[name] for name in LIST} == {CLOUD}
    assert found.price_sources["per_kilowatt_hour"] == ASSUMED
    (poor,) = (client for client in found.clients if client.group == "poor")
    assert poor.statuses == {"left": 1}
    assert "of 0.02 of money" in poor.reasons[0]
    assert "assumed" not in poor.reasons[0]
    rows = [row for row in _work(priced, scenario) if row["status"] == "ok"]
    assert all(row["prices"] == LIST for row in rows)
    total = found.total
    by_hand = total.moved_bytes / 1e6 + total.cloud_flops / 1e15 * 7 + total.joules / 3.6e6 * 0.3
    assert total.money == pytest.approx(by_hand)
    page = (scenario.folder / "report.html").read_text(encoding="utf-8")
    assert "the cloud&#39;s price list; electricity: assumed" in page
    assert "USD" not in page


def test_a_row_without_a_list_gets_its_clients_or_the_only_one() -> None:
    rows: list[dict[str, Any]] = [{"client": "a", "prices": LIST}, {"client": "a"}, {"client": "b"}]
    assert [row["prices"] for row in with_offers(rows)] == [LIST] * 3
    other = LIST | {"per_gigabyte": 1.0}
    rows += [{"client": "c", "prices": other}]
    assert [row["prices"] for row in with_offers(rows)] == [LIST, LIST, None, other]
    with pytest.raises(DataError, match="EUR and USD"):
        tariff_of([{"prices": LIST}, {"prices": PriceList().model_dump()}])


@pytest.mark.parametrize("mode", ["ushape", "top"])
def test_top_shares_the_adapters_of_the_top_alone(playground: Playground, mode: str) -> None:
    """Whichever of the two ran: the computed figure of its own mode is what was measured."""
    scenario = playground.scenario(rounds=1, client={"cut": "1:2", "mode": mode})
    playground.run(scenario)
    found = {one.name: one for one in account(scenario.folder, scenario).alternatives}
    measured = found["as it was"].adapter_bytes
    assert measured == sum(
        row["adapter_up_bytes"] + row["adapter_down_bytes"] for row in _work(playground, scenario)
    )
    ushape, top = found["ushape, bf16"].adapter_bytes, found["top, bf16, cached"].adapter_bytes
    assert {"ushape": ushape, "top": top}[mode] == measured
    assert top == pytest.approx(ushape * 2 / 3, rel=1e-6)
