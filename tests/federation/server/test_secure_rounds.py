"""A secure round between real nodes on Flower's messages: what it sums, whom it names, what it gives away."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from support.secure_nodes import SecureNodes, adapter, secure_scenario
from tightbeam.common.errors import CohortError, FederationError, ProtocolError
from tightbeam.common.identity.authority import init_certificates
from tightbeam.federation.client.participant import Client
from tightbeam.federation.client.secure import answer_step, shown
from tightbeam.federation.secagg.messages import MaskedVector

CLIENTS = 5
NAMES = [f"client-{number:02d}" for number in range(CLIENTS)]


@pytest.fixture
def nodes(certs: Path, tmp_path: Path) -> SecureNodes:
    return SecureNodes(secure_scenario(CLIENTS), certs, tmp_path)


def _require_mean(nodes: SecureNodes, found: Any, names: list[str]) -> None:
    assert list(found.survivors) == names
    assert found.weight == sum(nodes.weights[name] for name in names)
    for tensor, array in nodes.mean(names).items():
        np.testing.assert_allclose(found.mean[tensor], array, rtol=0, atol=2e-8)
    loss = np.average([nodes.losses[n] for n in names], weights=[nodes.weights[n] for n in names])
    assert found.loss == pytest.approx(loss, abs=1e-6)


def test_adapters_losses_and_weights_come_out_as_sums(nodes: SecureNodes) -> None:
    _require_mean(nodes, nodes.run(), NAMES)
    assert nodes.server.failures == {}
    assert nodes.server.moved_bytes > 0


def test_rounds_and_their_evaluations_follow_each_other(nodes: SecureNodes) -> None:
    for number in (1, 2):
        _require_mean(nodes, nodes.run(number), NAMES)
        found = nodes.run(number, purpose="evaluate")
        assert found.mean == {}
        assert found.loss == pytest.approx(np.average([1, 2, 3, 4, 5], weights=[1, 2, 3, 4, 5]), abs=1e-6)


def test_a_round_is_not_done_twice(nodes: SecureNodes) -> None:
    """Two sums of one round over other cohorts would differ by a client."""
    nodes.run(2)
    with pytest.raises(CohortError, match="client-00 says: Round 4 was proposed to client-00 after round 4"):
        nodes.run(2)


def test_who_vanished_in_one_round_joins_the_next_without_its_former_peers(nodes: SecureNodes) -> None:
    nodes.gone = {NAMES[2]}
    nodes.run(1)
    nodes.gone, others = set(), NAMES[:4]
    del nodes.ids[NAMES[4]]  # not sampled this time, so nobody gets its certificate
    _require_mean(nodes, nodes.run(2), others)
    assert nodes.server.failures == {}


def test_two_vanish_and_the_sum_of_three_is_exact_but_of_two_there_is_none(nodes: SecureNodes) -> None:
    nodes.gone = {NAMES[1], NAMES[4]}
    _require_mean(nodes, nodes.run(1), [NAMES[0], NAMES[2], NAMES[3]])
    nodes.gone.add(NAMES[0])
    with pytest.raises(CohortError, match="Only 2 of 5 clients sent masked, and 3 are needed"):
        nodes.run(2)


@pytest.mark.parametrize(
    ("section", "gone", "needed"),
    [({"threshold": 1.0}, 1, 5), ({"threshold": 0.8}, 2, 4), ({"min_cohort": 4}, 2, 4), ({}, 3, 3)],
)
def test_how_many_it_takes_is_the_scenarios(
    certs: Path, tmp_path: Path, section: dict[str, Any], gone: int, needed: int
) -> None:
    nodes = SecureNodes(secure_scenario(CLIENTS, **section), certs, tmp_path)
    nodes.gone = set(NAMES[: gone - 1])
    _require_mean(nodes, nodes.run(1), NAMES[gone - 1 :])
    nodes.gone = set(NAMES[:gone])
    with pytest.raises(CohortError, match=f"Only {CLIENTS - gone} of 5 .*, and {needed} are needed"):
        nodes.run(2)


def test_the_server_gets_no_figure_and_no_vector_of_a_client(nodes: SecureNodes) -> None:
    """To the server a vector is noise: its bits are uniform. The control: the same vector without masks."""
    replies = nodes.work()
    encoding = nodes.server._server.plan.encoding
    for name, data in nodes.vectors(replies).items():
        masked = np.frombuffer(MaskedVector.from_bytes(data).vector, np.uint64)
        flat = np.concatenate([nodes.updates[name][tensor].ravel() for tensor in sorted(nodes.start)])
        plain = encoding.encode(flat, nodes.weights[name], name)
        tops = [
            np.bincount((vector >> np.uint64(60)).astype(int), minlength=16) for vector in (masked, plain)
        ]
        assert tops[0].max() < 0.3 * masked.size
        assert tops[1][0] + tops[1][15] == plain.size, "small numbers lie at both ends of the ring"
        decoded = encoding.decode(masked).total
        assert abs(np.corrcoef(decoded[: flat.size], flat)[0, 1]) < 0.4
    assert not any(reply.content.array_records or reply.content.metric_records for reply in nodes.replies)


def test_figures_of_one_client_stay_out_of_a_secure_reply() -> None:
    metrics = {
        "loss": 1.5,
        "weight": 7,
        "examples": 7,
        "learned-tokens": 90,
        "tokens": 120,
        "wire-up-bytes": 4,
    }
    assert dict(shown(metrics, secure=True)) == {"tokens": 120, "wire-up-bytes": 4}
    assert dict(shown(metrics, secure=False)) == metrics


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 9.0])
def test_a_value_that_would_spoil_the_sum_is_refused_at_the_client_and_named(
    nodes: SecureNodes, wrong: float
) -> None:
    nodes.updates[NAMES[2]]["m.layers.0.q.lora_B.weight"][3, 1] = wrong
    replies = nodes.work()
    reason = str(replies[NAMES[2]].content.config_records["notes"]["reason"])
    assert NAMES[2] in reason
    assert ("lora_B.weight holds NaN or infinite" if wrong != 9.0 else "1 of 101 values") in reason
    _require_mean(nodes, nodes.server.close(nodes.vectors(replies)), [n for n in NAMES if n != NAMES[2]])


def test_an_update_of_another_shape_is_refused_and_named(nodes: SecureNodes) -> None:
    nodes.updates[NAMES[3]]["m.layers.0.q.lora_A.weight"] = np.zeros((3, 30), np.float32)
    replies = nodes.work()
    assert "client-03 has 131 values, and round 2 sums 101" in str(
        replies[NAMES[3]].content.config_records["notes"]["reason"]
    )
    _require_mean(nodes, nodes.server.close(nodes.vectors(replies)), [n for n in NAMES if n != NAMES[3]])


def test_a_server_that_gives_one_client_another_adapter_gets_no_vector_of_it(nodes: SecureNodes) -> None:
    """Else it could tell from the sum who moved where (model inconsistency, Pasquini et al. 2022)."""
    replies = nodes.work(sent={NAMES[1]: adapter(5)})
    reason = str(replies[NAMES[1]].content.config_records["notes"]["reason"])
    assert "client-01 got another adapter to start from than its plan names" in reason
    assert NAMES[1] not in nodes.vectors(replies)


@pytest.mark.parametrize("step", ["restore", "state", "mask", "_forget", ""])
def test_the_server_asks_for_the_four_steps_and_nothing_else(nodes: SecureNodes, step: str) -> None:
    """`restore` would put a seed of the server's in place of the client's own."""
    nodes.work()
    (context, *_) = nodes.grid._contexts.values()
    before = dict(context.state.config_records["secagg"])
    client = Client(nodes.settings, nodes.settings.profile(context.node_config), dict(context.node_config))
    content = RecordDict({"secure": ConfigRecord({"step": step, "message": bytes(9)})})
    with pytest.raises(ProtocolError, match=f"asked for the step '{step}'"):
        answer_step(client, context, content)
    assert dict(context.state.config_records["secagg"]) == before


def _tampering(nodes: SecureNodes, name: str, number: int, change: Any) -> None:
    """Change what one client answers to one of the exchanges."""
    inner, seen = nodes.grid._app, list[str]()

    def call(message: Message, context: Any) -> Message:
        reply = inner(message, context)
        notes = reply.content.config_records["notes"]
        if notes["client"] == name and message.metadata.message_type == "query.secure":
            seen.append(name)
            if len(seen) == number:
                notes["secure"] = change(notes["secure"])
        return reply

    nodes.grid._app = call


def test_keys_that_the_identity_did_not_sign_are_named_and_left_out(nodes: SecureNodes) -> None:
    _tampering(nodes, NAMES[0], 1, lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    found = nodes.run()
    assert "Round 2's keys of client-00 are not signed by its identity" in nodes.opened.failures[NAMES[0]]
    _require_mean(nodes, found, NAMES[1:])


def test_a_consent_to_another_set_is_named_and_the_sum_still_right(nodes: SecureNodes) -> None:
    _tampering(nodes, NAMES[4], 3, lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    _require_mean(nodes, nodes.run(), NAMES)
    assert "of client-04 are not signed" in nodes.server.failures[NAMES[4]]


def test_a_vector_of_another_length_is_named_and_left_out(nodes: SecureNodes) -> None:
    vectors = nodes.vectors(nodes.work())
    one = MaskedVector.from_bytes(vectors[NAMES[2]])
    vectors[NAMES[2]] = MaskedVector(one.client, one.plan_digest, one.vector[:-8]).to_bytes()
    found = nodes.server.close(vectors)
    assert "The vector of client-02 has 808 bytes, not 816" in nodes.server.failures[NAMES[2]]
    _require_mean(nodes, found, [n for n in NAMES if n != NAMES[2]])


def test_a_client_that_the_server_made_up_is_refused_by_all(certs: Path, tmp_path: Path) -> None:
    init_certificates(tmp_path / "others", clients=NAMES)
    nodes = SecureNodes(secure_scenario(CLIENTS), certs, tmp_path)
    stranger = SecureNodes(secure_scenario(CLIENTS), tmp_path / "others", tmp_path).server._certificates[
        NAMES[0]
    ]
    nodes.server._certificates[NAMES[0]] = stranger
    with pytest.raises(CohortError, match=r"client-01 says: Not issued by this side's certificate authority"):
        nodes.run()


def test_two_clients_cannot_hide_each_other(certs: Path, tmp_path: Path) -> None:
    nodes = SecureNodes(secure_scenario(2), certs, tmp_path)
    with pytest.raises(FederationError, match="needs 3 clients or more, not 2"):
        nodes.run()


def test_a_loss_beyond_the_range_counts_as_its_end(nodes: SecureNodes) -> None:
    nodes.losses = dict.fromkeys(NAMES, 1e9)
    assert nodes.run().loss == pytest.approx(64.0)


def test_ffa_sums_b_alone(certs: Path, tmp_path: Path) -> None:
    nodes = SecureNodes(secure_scenario(3, name="ffa"), certs, tmp_path)
    for update in nodes.updates.values():
        del update["m.layers.0.q.lora_A.weight"]
    found = nodes.run()
    assert set(found.mean) == {"m.layers.0.q.lora_B.weight"}
