"""What a watcher of a simulation sees: a table that fits 80 columns, who is slow, and lines that stay."""

import io
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from tightbeam.federation.accounts.progress import FederationProgress
from tightbeam.federation.scenario import Scenario, scenario_from_mapping

OK: dict[str, Any] = {
    "status": "ok",
    "reason": "",
    "loss": 12.3456,
    "steps": 4,
    "wire_up_bytes": 123_456_789,
    "adapter_down_bytes": 1_000,
    "joules": 987_654.0,
    "virtual_s": 100.0,
}


def progress(clients: int, **changes: Any) -> tuple[FederationProgress, io.StringIO]:
    scenario: Scenario = scenario_from_mapping({"clients": clients, "rounds": 100} | changes)
    text = io.StringIO()
    return FederationProgress(scenario, Console(file=text, width=80)), text


def trained(shown: FederationProgress, number: int, name: str, **changes: Any) -> None:
    shown.on_start(number, "train")
    row = {"row": "client_round", "round": 1, "client": name} | OK | changes
    shown.on_reply(number, row if row["status"] == "ok" else {})
    shown.on_row(row)


def ended(shown: FederationProgress, number: int = 1, **changes: Any) -> None:
    row = {"row": "round", "round": number, "updates": 3, "loss": 2.5, "virtual_s": 400.0}
    shown.on_row(row | changes)


def drawn(shown: FederationProgress, width: int = 80) -> list[str]:
    text = io.StringIO()
    Console(file=text, width=width).print(shown.table())
    return text.getvalue().splitlines()


@pytest.mark.parametrize("groups", [{}, {"hospitals": {"clients": 3, "network": "4g"}}])
def test_the_table_fits_80_columns_with_one_line_a_client(groups: dict[str, Any]) -> None:
    shown, _ = progress(20, groups=groups)
    for number in range(20):
        trained(shown, number, f"client-{number:02d}", virtual_s=7200.0 if number == 4 else 100.0)
        shown.on_row({"row": "client_eval", "round": 1, "client": f"client-{number:02d}"} | OK)
    ended(shown)
    lines = drawn(shown)
    assert max(map(cell_len, lines)) <= 80
    assert not any("\u2026" in line for line in lines), "something was cut off"
    clients = [line for line in lines if line.startswith("client-")]
    assert len(clients) == 20
    assert ["slow" in line for line in clients] == [number == 4 for number in range(20)]
    assert "12.346" in clients[0]
    assert "247 MB" in clients[0]
    assert ("group" in lines[1]) == bool(groups)


def test_the_title_says_where_it_is_and_what_it_cost() -> None:
    shown, _ = progress(4)
    assert shown.title == "starting: 0 in; 0 B, 0 J"
    trained(shown, 0, "client-00")
    trained(shown, 1, "client-01", status="failed", reason="no power", joules=0.0)
    assert shown.title == "round 1 of 100: 2 in; 247 MB, 988 kJ"
    ended(shown)
    shown.on_start(3, "evaluate")
    assert shown.title == "evaluation after round 1: 0 in; 247 MB, 988 kJ"
    shown.on_start(3, "train")
    assert shown.title.startswith("round 2 of 100: 0 in")


def test_slow_is_measured_against_this_round_only() -> None:
    shown, text = progress(6)
    for number in range(3):
        trained(shown, number, f"client-{number:02d}", virtual_s=1.0)
    ended(shown)
    assert "waited for" not in text.getvalue()
    for number in range(3, 6):
        trained(shown, number, f"client-{number:02d}", virtual_s=50.0 + 60.0 * (number == 5))
    ended(shown, 2)
    assert (
        "round 2 of 100: 3 updates, loss 2.5000, 6 min 40 s virtual, waited for client-05;" in text.getvalue()
    )
    assert [line[:9] for line in drawn(shown) if "slow" in line] == ["client-05"]


def test_who_hands_in_nothing_is_told_with_the_reason_and_took_no_time() -> None:
    shown, text = progress(3)
    trained(shown, 0, "client-00", virtual_s=9.0)
    ended(shown)
    trained(shown, 0, "client-00", status="left", reason="Its budget would be exceeded.", virtual_s=0.0)
    assert "round 1: client-00 left: Its budget would be exceeded." in text.getvalue()
    (line,) = (line for line in drawn(shown) if line.startswith("client-00"))
    assert "left" in line
    assert not shown.phase.endswith("done")


def test_of_many_clients_those_active_last_are_shown_and_fit_the_terminal() -> None:
    shown, _ = progress(100)
    for number in range(90, 100):
        trained(shown, number, f"client-{number:02d}")
    assert sum(line.startswith("client-9") for line in drawn(shown)) == 10
    assert drawn(shown)[-1].strip() == "24 of 100 clients: those active last"
    shown.console = Console(file=io.StringIO(), force_terminal=True, width=80, height=12)
    assert shown.console.is_terminal
    assert len(drawn(shown)) <= 12
