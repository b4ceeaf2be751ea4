"""What the report's first figures say: of the same clients, and of the adapter that opens in stock PEFT."""

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from support.edge_runs import byte_tokenizer
from support.federations import Playground
from tightbeam.edge.data import collate, load_examples
from tightbeam.federation.accounts.headline import headline_of
from tightbeam.federation.scenario import Scenario
from tightbeam.federation.server.journal import Row

MIXED = {
    "small": {"clients": 1, "r": 2},
    "wide": {"clients": 1, "cut": "2:1", "r": 4},
    "top": {"clients": 1, "mode": "top"},
}


def _stock_losses(playground: Playground, scenario: Scenario) -> dict[str, tuple[float, int]]:
    """Of the whole backbone with `adapter/`, in stock PEFT: loss and learned tokens of each client."""
    model = AutoModelForCausalLM.from_pretrained(playground.backbone)
    opened = peft.PeftModel.from_pretrained(model, scenario.folder / "adapter").eval()
    found = {}
    for profile in scenario.profiles():
        file = scenario.folder / "clients" / profile.name / "eval.jsonl"
        batch = collate(load_examples(file, byte_tokenizer(), max_length=48), 0)
        with torch.no_grad():
            loss = float(opened(**batch).loss)
        found[profile.name] = loss, int((batch["labels"][:, 1:] != -100).sum())
    return found


def test_the_headline_is_of_the_adapter_that_opens_in_peft(playground: Playground) -> None:
    scenario = playground.scenario(groups=MIXED, clients=4, train={"lr": 5e-2}, strategy={"name": "flexlora"})
    playground.run(scenario)
    stock = _stock_losses(playground, scenario)
    report = playground.report(scenario)
    mean = sum(loss * n for loss, n in stock.values()) / sum(n for _, n in stock.values())
    assert report["headline"]["exported"]
    assert report["headline"]["clients"] == 4
    assert report["headline"]["after"] == pytest.approx(mean, rel=1e-5)
    assert report["headline"]["worst"][1] == pytest.approx(max(loss for loss, _ in stock.values()), rel=1e-5)
    own = report["evaluations"][-1]["loss"]
    assert own != pytest.approx(mean, rel=1e-4), "else the clients' own parts would do"
    page = (scenario.folder / "report.html").read_text(encoding="utf-8")
    assert f"&rarr; {mean:.2f}<small>nats per token, mean of 4 clients, the same both times" in page


def test_equal_clients_are_not_asked_again(playground: Playground) -> None:
    scenario = playground.scenario(rounds=1)
    playground.run(scenario)
    report = playground.report(scenario)
    assert (report["exported"], playground.rows(scenario, "client_exported")) == (None, [])
    stock = _stock_losses(playground, scenario)
    mean = sum(loss * n for loss, n in stock.values()) / sum(n for _, n in stock.values())
    assert report["headline"]["after"] == pytest.approx(mean, rel=1e-5)
    assert report["headline"]["exported"]


def test_who_cannot_hold_it_or_has_a_budget_says_so(playground: Playground) -> None:
    groups = {"metered": {"clients": 1, "budget": {"mb": 50}}, "wide": {"clients": 1, "cut": "2:2"}}
    scenario = playground.scenario(rounds=1, groups=groups)
    playground.run(scenario)
    report = playground.report(scenario)
    (reason,) = report["exported"]["absent"].values()
    assert reason.startswith("It has a budget")
    assert report["exported"]["clients"] == report["headline"]["clients"] == 2
    assert report["total"]["activation_up_bytes"] == sum(
        row["wire_up_bytes"]
        for kind in ("client_round", "client_eval")
        for row in playground.rows(scenario, kind)
    )


def _eval(number: int, client: str, loss: float, weight: int, status: str = "ok") -> Row:
    told = {"round": number, "client": client, "loss": loss, "weight": weight, "status": status}
    return {"row": "client_eval", **told}


def test_a_client_that_is_gone_at_the_end_is_in_neither_mean() -> None:
    """With it the first mean is 5.0: it seems that 2.0 was gained where the survivors gained 1.0."""
    rows = [
        _eval(0, "a", 4.0, 10), _eval(0, "b", 4.0, 30), _eval(0, "gone", 7.0, 20),
        {"row": "evaluation", "round": 0, "clients": 3, "loss": 5.0},
        _eval(2, "a", 3.6, 10), _eval(2, "b", 2.8, 30), _eval(2, "gone", 1.0, 20, "failed"),
        {"row": "evaluation", "round": 2, "clients": 2, "loss": 3.0},
    ]  # fmt: skip
    head = headline_of(rows)
    assert head is not None
    assert (head.clients, head.before, head.after, head.same_clients) == (2, 4.0, 3.0, True)
    assert (head.worst, head.best, head.exported) == ((4.0, 3.6), (4.0, 2.8), False)
    assert headline_of(rows[:4]) is None
