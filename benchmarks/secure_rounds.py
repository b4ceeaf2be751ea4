"""What a secure round adds to an open one, in Flower's messages: `python benchmarks/secure_rounds.py`.

The simulator's own grid, nodes and server code at 10 and at 100 clients with a million values each: real
certificates, real state machines, every message serialised by Flower. No training: a round here is what
federation itself costs. Beside it the same round in the open, combined by Flower's FedAvg. A tenth of the
clients vanish before they send their vector, so the recovery of their masks is in the figures; bytes and
seconds are means over the clients that stay. Seconds are of the processor, so that a busy machine changes
them little; all clients share one thread, one after the other. The last line is JSON.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from tightbeam.common.identity.authority import init_certificates
from tightbeam.common.identity.identities import load_identity
from tightbeam.federation.client.participant import Client
from tightbeam.federation.client.secure import SecureTask, answer_step
from tightbeam.federation.contract.records import to_record
from tightbeam.federation.contract.run_config import RunConfig
from tightbeam.federation.runtimes.grid import Exchange, InProcessGrid
from tightbeam.federation.scenario import Scenario, scenario_from_mapping
from tightbeam.federation.server.secure import SecureRounds

VALUES = 1_000_000
WEIGHT = 100
BACKBONE = "a fingerprint"
# flwr 1.41 SecAgg+, one client of three with a million float32 values, counted as serialised messages.
FLOWER_UP_BYTES, FLOWER_DOWN_BYTES = 8_000_474, 4_001_534


class Round:
    """One federation of clients that hand in what they were sent, moved a little."""

    def __init__(self, scenario: Scenario, certs: Path, values: int) -> None:
        self.names = [profile.name for profile in scenario.profiles()]
        self._settings = RunConfig(scenario, "127.0.0.1:1", certs, certs.parent)
        self._start = {"a": np.zeros((values // 2,), np.float32), "b": np.zeros((values // 2,), np.float32)}
        self._moved = {name: array + np.float32(1e-3) for name, array in self._start.items()}
        self.seconds = dict.fromkeys(self.names, 0.0)
        self.grid = InProcessGrid(self._answer, len(self.names), {}, on_exchange=self._count)
        self.ids = dict(zip(self.names, self.grid.get_node_ids(), strict=True))
        self.bytes = {name: [0, 0] for name in self.names}
        self.gone = self.names[: len(self.names) // 10]

    def _count(self, exchange: Exchange, reply: Message) -> None:
        name = self.names[exchange.partition]
        self.bytes[name][0] += exchange.up_bytes
        self.bytes[name][1] += exchange.down_bytes

    def _answer(self, message: Message, context: Context) -> Message:
        profile = self._settings.profile(context.node_config)
        client = Client(self._settings, profile, dict(context.node_config))
        began = time.process_time()
        notes: dict[str, Any] = {"client": profile.name, "status": "ok"}
        records: dict[str, Any] = {"notes": ConfigRecord(notes)}
        if message.metadata.message_type == "query.secure":
            records["notes"]["secure"] = answer_step(client, context, message.content)
        elif "secure" in message.content.config_records:
            task = SecureTask.of(client, context, message.content, "train", BACKBONE)
            records["notes"]["secure"] = task.masked(self._moved, WEIGHT, 2.5)
        else:
            records["arrays"] = to_record(self._moved)
            records["metrics"] = MetricRecord({"weight": WEIGHT, "loss": 2.5})
        self.seconds[profile.name] += time.process_time() - began
        return Message(RecordDict(records), reply_to=message)

    def _ask(self, inboxes: dict[str, bytes] | None) -> list[Message]:
        messages = []
        for name in self.names:
            if name in self.gone or (inboxes is not None and name not in inboxes):
                continue
            records: dict[str, Any] = {
                "arrays": to_record(self._start),
                "config": ConfigRecord({"server-round": 1}),
            }
            if inboxes is not None:
                records["secure"] = ConfigRecord({"inbox": inboxes[name]})
            messages.append(Message(RecordDict(records), self.ids[name], "train"))
        return list(self.grid.send_and_receive(messages))

    def open(self) -> None:
        """As without masks."""
        record, _ = FedAvg(weighted_by_key="weight").aggregate_train(1, self._ask(None))
        assert record is not None
        np.testing.assert_allclose(record["a"].numpy(), self._moved["a"], rtol=1e-4)

    def secure(self, certificates: dict[str, bytes]) -> None:
        """All five exchanges."""
        server = SecureRounds(self._settings.scenario, BACKBONE)
        for name, certificate in certificates.items():
            server.admit(name, self.ids[name], certificate)
        opened = server.open(1, "train", to_record(self._start), self.names, self.grid)
        replies = self._ask(dict(opened.inboxes))
        masked = {}
        for reply in replies:
            notes = reply.content.config_records["notes"]
            data = notes["secure"]
            assert isinstance(data, bytes)
            masked[str(notes["client"])] = data
        found = server.close(masked)
        assert len(found.survivors) == len(self.names) - len(self.gone)
        np.testing.assert_allclose(found.mean["a"], self._moved["a"], rtol=1e-4)

    def costs(self, whole_s: float) -> dict[str, float]:
        """Means over those who stayed; the server's seconds hold what Flower's serialising takes."""
        stayed = [name for name in self.names if name not in self.gone]
        return {
            "up_bytes": round(float(np.mean([self.bytes[name][0] for name in stayed]))),
            "down_bytes": round(float(np.mean([self.bytes[name][1] for name in stayed]))),
            "client_s": float(np.mean([self.seconds[name] for name in stayed])),
            "server_s": whole_s - sum(self.seconds.values()),
        }


def measure(clients: int, values: int) -> dict[str, dict[str, float]]:
    """One open and one secure round."""
    section = {"clients": clients, "rounds": 1, "strategy": {"secure": True}}
    scenario = scenario_from_mapping(section)
    names = [profile.name for profile in scenario.profiles()]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        certs = Path(folder) / "certs"
        init_certificates(certs, clients=names)
        certificates = {name: load_identity(certs / name).certificate_der for name in names}
        for kind in ("open", "secure"):
            trial = Round(scenario, certs, values)
            began = time.process_time()
            if kind == "open":
                trial.open()
            else:
                trial.secure(certificates)
            found[kind] = trial.costs(time.process_time() - began)
    return found


def main() -> None:
    """Print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a hundredth of the values, for a smoke test")
    values = VALUES // 100 if parser.parse_args().quick else VALUES
    result: dict[str, Any] = {"values": values}
    print(f"one round of {values:,} values as Flower's messages, a tenth of the clients gone on the way")
    print(f"  {'':<20}{'up B':>12}{'down B':>12}{'client s':>11}{'server s':>11}")
    for clients in (10, 100):
        found = measure(clients, values)
        found["added"] = {key: found["secure"][key] - found["open"][key] for key in found["open"]}
        for kind, row in found.items():
            counts = f"{row['up_bytes']:>12,.0f}{row['down_bytes']:>12,.0f}"
            print(f"  {clients:>4} clients {kind:<7}{counts}{row['client_s']:>11.3f}{row['server_s']:>11.3f}")
        result[str(clients)] = found
    print(
        "Flower's SecAgg+ (flwr 1.41, earlier measurement, 3 clients, a million values, 4 exchanges): "
        f"{FLOWER_UP_BYTES:,} B up and {FLOWER_DOWN_BYTES:,} B down in the exchange of the vector"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
