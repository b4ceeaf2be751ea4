"""The client's side: what a node answers to the server's messages.

    query.hello      which client of the scenario it is
    query.secure     an exchange of a secure aggregation
    query.layers     which layers its cut leaves at the edge, and their shapes
    train            some local steps from the global adapter, over its own sealed stream to the cloud
    evaluate         the global adapter's loss on this client's held-out text

Adapters and figures travel in Flower's messages, nothing else. What goes wrong comes back as a `notes` record
with the error's own text, so that it reads the same on every runtime.
"""

import json
import uuid
from collections.abc import Callable
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from tightbeam.common.config import Codecs
from tightbeam.common.costs.rows import StepRow
from tightbeam.common.errors import TightbeamError
from tightbeam.common.federation import LoraAdapter, parse_adapter
from tightbeam.edge.connection import Cloud
from tightbeam.edge.data import Example
from tightbeam.edge.federation import Lender, LocalTask, SplitAdapter, Work, held_bytes, pad_id
from tightbeam.simulations.apps.participant import Client, Leaving
from tightbeam.simulations.apps.secure import answer_step, certificate_of, mask_update
from tightbeam.simulations.apps.settings import Settings
from tightbeam.simulations.budgets import Plan, Spent, choose_codec, codec_text
from tightbeam.simulations.global_adapter import from_record, to_record
from tightbeam.simulations.profiles import steps_seconds

__all__ = ["app", "evaluate", "hello", "layers", "secure", "train"]

app = ClientApp()
_LENDER = Lender()  # one per process: its models serve every client that this process plays


def _answer(message: Message, context: Context, work: Callable[[Client], RecordDict]) -> Message:
    """Do the work and reply; what goes wrong is a reply too."""
    name = f"node {context.node_id}"
    try:
        settings = Settings.of(context.run_config)
        profile = settings.profile(context.node_config)
        name = profile.name
        if settings.scenario.threads is not None:
            torch.set_num_threads(settings.scenario.threads)
        content = work(Client(settings, profile, dict(context.node_config)))
    except Leaving as leaving:
        content = _notes(client=name, status=leaving.status, reason=str(leaving))
    except (TightbeamError, OSError, RuntimeError, ValueError) as error:  # torch raises the last two
        text = " ".join(str(error).split())
        reason = text if isinstance(error, TightbeamError) else f"{type(error).__name__}: {text}"
        code = error.code if isinstance(error, TightbeamError) else "internal"
        content = _notes(client=name, status="failed", reason=reason, code=code)
    return Message(content=content, reply_to=message)


def _notes(**values: str) -> RecordDict:
    return RecordDict({"notes": ConfigRecord(dict(values))})


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Say which client this node is, and show its certificate in a secure federation."""

    def work(client: Client) -> RecordDict:
        content = _notes(client=client.profile.name, status="ok")
        content.config_records["notes"]["certificate"] = certificate_of(client)
        return content

    return _answer(message, context, work)


@app.query("secure")
def secure(message: Message, context: Context) -> Message:
    """Answer one exchange of a secure aggregation."""

    def work(client: Client) -> RecordDict:
        content = _notes(client=client.profile.name, status="ok")
        content.config_records["notes"]["secure"] = answer_step(client, context, message.content)
        return content

    return _answer(message, context, work)


@app.query("layers")
def layers(message: Message, context: Context) -> Message:
    """Name the tensors of this client's adapter, with their shapes."""

    def work(client: Client) -> RecordDict:
        with client.cloud(f"layers-{uuid.uuid4().hex[:8]}", []) as cloud:
            lent = _LENDER.lend(cloud, client.shape(), client.profile.options.codec)
            facts = {"shapes": lent.layers(), "backbone": _backbone(cloud)}
        return _notes(client=client.profile.name, status="ok", layers=json.dumps(facts))

    return _answer(message, context, work)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the asked steps from the global adapter and hand in the result."""
    return _answer(message, context, lambda client: _train(client, context, message.content))


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the global adapter on what this client held out."""
    return _answer(message, context, lambda client: _evaluate(client, message.content))


def _train(client: Client, context: Context, content: RecordDict) -> RecordDict:
    config, scenario = content.config_records["config"], client.scenario
    number = int(str(config["server-round"]))
    if client.draw("dropout", number).random() < scenario.faults.dropout:
        raise Leaving("dropped", "It vanished, as faults.dropout asks.")
    run, rows = f"{client.profile.name}-r{number}-{uuid.uuid4().hex[:8]}", list[StepRow]()
    with client.cloud(run, rows) as cloud:
        learn, _ = client.examples(cloud, _LENDER)
        lent = _LENDER.lend(cloud, client.shape(), client.profile.options.codec)
        task = _task(client, number)
        _require_memory(client, lent)
        codec = _affordable(client, cloud, lent, learn, task, content)
        lent = _LENDER.lend(cloud, client.shape(), codec)
        arrays, folded = _worn(content)
        lent.wear(arrays, folded)
        try:
            work = lent.train(learn, task, pad_id(_LENDER.tokenizer(cloud)), rows)
            trained = lent.arrays(only_B=task.only_B)
            # In the order that they came in: Flower's FedAvgM pairs arrays by position.
            update = to_record({name: trained[name] for name in arrays if name in trained})
        finally:
            lent.undress()
        first = held_bytes(_blobs(cloud), client.profile.options.cut, cloud.card.num_blocks)
    slow = 1.0
    if client.draw("straggler", number).random() < scenario.faults.straggler:
        slow = scenario.faults.slowdown
    weight = work.learned_tokens if scenario.strategy.weight == "tokens" else len(learn)
    reply = _notes(client=client.profile.name, status="ok", run=run, codec=codec_text(codec))
    up_bytes = update.count_bytes()
    if client.scenario.strategy.secure:
        inbox = content.config_records["secure"]["inbox"]
        assert isinstance(inbox, bytes)
        masked = mask_update(client, context, inbox, from_record(update), weight)
        reply.config_records["notes"]["secure"], up_bytes = masked, len(masked)
    else:
        reply.array_records["arrays"] = update
    figures = _figures(client, content, work, up_bytes, first, slow)
    reply.metric_records["metrics"] = MetricRecord(
        {"weight": weight, "examples": len(learn), "adapter-up-bytes": up_bytes, **figures}
    )
    return reply


def _evaluate(client: Client, content: RecordDict) -> RecordDict:
    config, rows = content.config_records["config"], list[StepRow]()
    run = f"{client.profile.name}-e{int(str(config['server-round']))}-{uuid.uuid4().hex[:8]}"
    with client.cloud(run, rows) as cloud:
        _, held_out = client.examples(cloud, _LENDER)
        lent = _LENDER.lend(cloud, client.shape(), client.profile.options.codec)
        arrays, folded = _worn(content)
        lent.wear(arrays, folded)
        try:
            size = client.scenario.train.batch_size
            work = lent.evaluate(held_out, size, pad_id(_LENDER.tokenizer(cloud)), rows)
        finally:
            lent.undress()
        first = held_bytes(_blobs(cloud), client.profile.options.cut, cloud.card.num_blocks)
    figures = _figures(client, content, work, 0, first, 1.0)
    metrics = MetricRecord({"weight": work.learned_tokens, "examples": len(held_out), **figures})
    return RecordDict({"metrics": metrics, **_notes(client=client.profile.name, status="ok", run=run)})


def _worn(content: RecordDict) -> tuple[dict[str, Any], LoraAdapter | None]:
    arrays, fold = from_record(content.array_records["arrays"]), content.array_records.get("fold")
    return arrays, parse_adapter(from_record(fold), 1.0, "the server") if fold else None


def _task(client: Client, number: int) -> LocalTask:
    section = client.scenario.train
    return LocalTask(
        steps=section.steps,
        batch_size=section.batch_size,
        lr=section.lr,
        optimizer=section.optimizer,
        max_grad_norm=section.max_grad_norm,
        proximal=section.proximal,
        first_step=(number - 1) * section.steps,
        order_seed=client.draw("order", 0).randrange(2**31),
        dropout_seed=client.draw("adapter-dropout", number).randrange(2**31),
        only_B=client.scenario.strategy.name == "ffa",
    )


def _require_memory(client: Client, lent: SplitAdapter) -> None:
    needed_mb = lent.training_bytes(client.scenario.train.optimizer) / 1e6
    limit_mb = client.profile.options.device.memory_mb
    if needed_mb > limit_mb:
        raise Leaving(
            "left", f"Weights and optimizer need {needed_mb:.0f} MB; its device has {limit_mb:.0f} MB."
        )


def _affordable(
    client: Client,
    cloud: Cloud,
    lent: SplitAdapter,
    examples: list[Example],
    task: LocalTask,
    content: RecordDict,
) -> Codecs:
    """The codec of this round: the client's own, or a smaller one that its budget still allows."""
    config, options = content.config_records["config"], client.profile.options
    flops = lent.planned_flops(examples, task)
    plan = Plan(
        tokens=lent.plan_tokens(examples, task),
        hidden_size=cloud.card.hidden_size,
        dtype=cloud.card.dtype,
        gradients=options.mode == "ushape",
        # down, up, and down again: to be asked once more costs even those who then leave
        adapter_bytes=3 * content.array_records["arrays"].count_bytes(),
        joules=options.device.seconds(flops) * options.device.watts,
        cloud_flops=_cloud_flops(cloud, options.cut, options.mode, lent.plan_tokens(examples, task)),
    )
    spent = Spent(*(float(str(config[f"spent-{unit}"])) for unit in ("mb", "joules", "money")))
    codec, refusal = choose_codec(options, plan, spent)
    if codec is None:
        raise Leaving("left", f"Its budget would be exceeded: {refusal}.")
    return codec


def _cloud_flops(cloud: Cloud, cut: str, mode: str, tokens: int) -> int:
    """About what the cloud will compute, from the size of the trunk's weights; attention left out."""
    edge = held_bytes(_blobs(cloud), cut, cloud.card.num_blocks)
    total = sum(size for name, size in _blobs(cloud).items() if not name.startswith("file/"))
    weights = (total - edge) // (4 if cloud.card.dtype == "float32" else 2)
    return (4 if mode == "ushape" else 2) * tokens * weights


def _backbone(cloud: Cloud) -> dict[str, Any]:
    """What the report must know to say what the same experiment had cost otherwise."""
    card, sizes = cloud.card, {n: size for n, size in _blobs(cloud).items() if not n.startswith("file/")}
    return {
        "model": card.model,
        "fingerprint": card.fingerprint,
        "dtype": card.dtype,
        "num_blocks": card.num_blocks,
        "hidden_size": card.hidden_size,
        "weight_bytes": sum(sizes.values()),
    }


def _blobs(cloud: Cloud) -> dict[str, int]:
    return {blob.name: blob.num_bytes for blob in cloud.card.blobs}


def _figures(
    client: Client, content: RecordDict, work: Work, up_bytes: int, weight_bytes: int, slow: float
) -> dict[str, int | float]:
    """What the report is made of; seconds without `virtual` are this machine's own."""
    options, moved = client.profile.options, work.moved
    first = bool(content.config_records["config"]["first"])
    down_bytes = sum(record.count_bytes() for record in content.array_records.values())
    compute_s = options.device.seconds(work.edge_flops)
    exchange_s = options.network.seconds(up_bytes=up_bytes, down_bytes=down_bytes, round_trips=1)
    weights_s = options.network.seconds(up_bytes=0, down_bytes=weight_bytes * first, round_trips=first)
    steps_s = steps_seconds(options.network, work.rows, client.scenario.cloud.gflops)
    return {
        "loss": work.loss,
        "steps": work.steps,
        "tokens": work.tokens,
        "learned-tokens": work.learned_tokens,
        "payload-up-bytes": moved.payload_up_bytes,
        "payload-down-bytes": moved.payload_down_bytes,
        "wire-up-bytes": moved.wire_up_bytes,
        "wire-down-bytes": moved.wire_down_bytes,
        "weight-bytes": weight_bytes * first,
        "edge-flops": work.edge_flops,
        "cloud-flops": work.cloud_flops,
        "wall-s": work.wall_s,
        "edge-s": work.edge_s,
        "memory-bytes": work.memory_bytes,
        "virtual-s": slow * (compute_s + steps_s + exchange_s) + weights_s,
        "joules": compute_s * options.device.watts,
    }
