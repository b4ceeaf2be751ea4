"""The accounts: edge and cloud agree to the byte, and with a TCP proxy that counts what really passed.

Against real cloud processes, with TLS and without; float32, codec fp32.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel, get_peft_model

from support import commands
from support.comparing import lora
from support.counting_proxy import CountingProxy
from support.tiny import ragged_batch
from tightbeam.common.accounts.rows import StepBytes, StepRow
from tightbeam.common.identity.authority import init_certificates
from tightbeam.edge import Cloud, connect
from tightbeam.proto.backbone_pb2 import Receipt


@pytest.fixture(scope="module", params=["tls", "insecure"])
def process(
    request: pytest.FixtureRequest,
    tiny_folder: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[commands.Cloud]:
    folder = tmp_path_factory.mktemp(request.param)
    options = []
    if request.param == "tls":
        init_certificates(folder / "certs", clients=["clinic"])
        options = ["--identity", str(folder / "certs" / "cloud")]
    with commands.Cloud(tiny_folder("llama"), folder, *options) as process:
        yield process


def _connect(process: commands.Cloud, port: int, run: str, rows: list[StepRow]) -> Cloud:
    def on_row(row: dict[str, Any]) -> None:
        if row["row"] == "step":
            rows.append(StepRow.from_json(row))

    certs = process.folder / "certs" / "clinic"
    identity = certs if certs.is_dir() else None
    return connect(f"127.0.0.1:{port}", identity=identity, insecure=identity is None, run=run, on_row=on_row)


def _train(model: PeftModel, *seeds: int, batch: int = 40, length: int = 60) -> None:
    """Of the default size a step has some 1,200 tokens: 150 KB a transfer."""
    for seed in seeds:
        model(**ragged_batch(batch, length, side="right", seed=seed)).loss.backward()


def _sum(rows: list[StepRow]) -> StepBytes:
    return sum((row.bytes for row in rows[1:]), rows[0].bytes)


def _as_bytes(receipt: Receipt) -> StepBytes:
    return StepBytes(**{field.name: value for field, value in receipt.ListFields()})


def test_edge_and_cloud_agree_to_the_byte(process: commands.Cloud) -> None:
    rows: list[StepRow] = []
    with _connect(process, process.port, "agree", rows) as cloud:
        model = get_peft_model(cloud.load_model("1:2"), lora("llama"))
        _train(model, 0, 1, batch=7, length=33)
        _train(model, 2, batch=1, length=4)
        usage = {row.run: row for row in cloud.usage()}["agree"]
    assert _as_bytes(usage.bytes) == _sum(rows)
    assert (usage.forward_steps, usage.backward_steps, usage.reexecuted_steps) == (3, 3, 0)
    assert usage.tokens == sum(row.tokens for row in rows)
    assert usage.flops == sum(row.cloud_flops for row in rows)


def test_wire_bytes_are_those_of_the_proxy(
    process: commands.Cloud, record_property: Callable[[str, object], None]
) -> None:
    rows: list[StepRow] = []
    with CountingProxy(process.port) as proxy, _connect(process, proxy.port, "proxy", rows) as cloud:
        model = get_peft_model(cloud.load_model("1:2"), lora("llama"))
        _train(model, 0)  # opens the stream: handshakes, settings and headers come once
        rows.clear()
        before = proxy.snapshot()
        _train(model, 1, 2, 3)
        up_bytes, down_bytes = (now - then for now, then in zip(proxy.snapshot(), before, strict=True))
    counted = _sum(rows)
    record_property("wire against proxy, up", counted.wire_up_bytes / up_bytes - 1)
    record_property("wire against proxy, down", counted.wire_down_bytes / down_bytes - 1)
    assert counted.payload_up_bytes > 500_000
    assert counted.wire_up_bytes == pytest.approx(up_bytes, rel=0.01)
    assert counted.wire_down_bytes == pytest.approx(down_bytes, rel=0.01)
    # the detector detects: one transfer more or less is far outside
    assert counted.payload_up_bytes / len(rows) > 0.1 * up_bytes


def test_a_training_step_is_four_transfers(process: commands.Cloud) -> None:
    rows: list[StepRow] = []
    with _connect(process, process.port, "four", rows) as cloud:
        _train(get_peft_model(cloud.load_model("1:2"), lora("llama")), 0)
    one_bytes = rows[0].tokens * 32 * 4
    moved = _sum(rows)
    assert moved.payload_up_bytes == moved.payload_down_bytes == 2 * one_bytes
    assert moved.wire_total_bytes <= 1.01 * 4 * one_bytes


def test_a_cloud_killed_after_the_forward_bills_once(process: commands.Cloud) -> None:
    rows: list[StepRow] = []
    with _connect(process, process.port, "killed", rows) as cloud:
        model = get_peft_model(cloud.load_model("1:2"), lora("llama"))
        loss = model(**ragged_batch(4, 10, side="left")).loss
        process.kill()
        process.start()
        loss.backward()
        usage = {row.run: row for row in cloud.usage()}["killed"]
    assert [(row.kind, row.attempts > 1) for row in rows] == [("forward", False), ("backward", True)]
    assert rows[1].resent_bytes > 0
    assert _as_bytes(usage.bytes) == _sum(rows)
    assert (usage.forward_steps, usage.backward_steps) == (1, 1)
