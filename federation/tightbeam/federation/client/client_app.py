"""The client's side: what a node answers to the server's messages.

    query.hello      which client of the scenario it is
    query.secure     an exchange of a secure aggregation
    query.layers     what it shares of its adapter: names and shapes
    train            some local steps from the global adapter, over its own sealed stream to the cloud
    evaluate         the loss on this client's held-out text, of the global adapter with its own part

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

from tightbeam.common.accounts.prices import PriceList
from tightbeam.common.accounts.rows import StepRow
from tightbeam.common.errors import TightbeamError
from tightbeam.edge.link.connection import Cloud
from tightbeam.federation.client import Lender, LocalTask
from tightbeam.federation.client.figures import backbone_facts, counted, figures_of, weight_bytes_of
from tightbeam.federation.client.limits import affordable_codec, require_memory
from tightbeam.federation.client.participant import Client, Leaving
from tightbeam.federation.client.settings import Settings
from tightbeam.federation.math import LoraAdapter, parse_adapter
from tightbeam.federation.server.budgets import codec_text
from tightbeam.federation.server.exported import MESSAGE, exported_loss
from tightbeam.federation.server.global_adapter import from_record, to_record
from tightbeam.federation.server.privacy import clipped_reply
from tightbeam.federation.server.secure import SecureTask, answer_step, certificate_of, shown
from tightbeam.federation.server.terms import Purpose

__all__ = ["app", "evaluate", "exported", "hello", "layers", "secure", "train"]

app = ClientApp()
_LENDER = Lender()  # one per process: its models serve every client that this process plays


def _answer(message: Message, context: Context, work: Callable[[Client], RecordDict]) -> Message:
    """Do the work and reply; what goes wrong is a reply too."""
    name, rows, missed = f"node {context.node_id}", list[StepRow](), list[StepRow]()
    prices = list[PriceList]()
    try:
        settings = Settings.of(context.run_config)
        profile = settings.profile(context.node_config)
        name = profile.name
        settings.node(context.node_config)  # before anything is done with what it lacks
        if settings.scenario.threads is not None:
            torch.set_num_threads(settings.scenario.threads)
        client = Client(settings, profile, dict(context.node_config), rows, missed, prices)
        asked = message.content.config_records.get("config")
        if asked and "known-run" in asked:
            client.recall(str(asked["known-run"]))
        content = work(client)
    except Leaving as leaving:
        content = _notes(client=name, status=leaving.status, reason=str(leaving))
    except (TightbeamError, OSError, RuntimeError, ValueError) as error:  # torch raises the last two
        text = " ".join(str(error).split())
        reason = text if isinstance(error, TightbeamError) else f"{type(error).__name__}: {text}"
        code = error.code if isinstance(error, TightbeamError) else "internal"
        content = _notes(client=name, status="failed", reason=reason, code=code)
        if rows:  # what it moved before it failed was moved
            content.config_records["notes"]["run"] = rows[0].run
            content.metric_records["metrics"] = MetricRecord({**counted(rows)})
    if missed:
        content.metric_records["unheard"] = MetricRecord({**counted(missed)})
    for offer in prices:
        content.config_records["notes"]["prices"] = offer.model_dump_json()
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
    """Name the tensors that this client shares, with their shapes, layers below its cut, and its ladder."""

    def work(client: Client) -> RecordDict:
        with client.cloud(f"layers-{uuid.uuid4().hex[:8]}") as cloud:
            lent = _LENDER.lend(cloud, client.shape(), client.profile.options.codec)
            shared = lent.shared(client.profile.options.share)
            shapes = {name: shape for name, shape in lent.layers().items() if name in shared}
            below = sorted({name.partition(".lora_")[0] for name in lent.below & shared})
            side = lent.side.facts() if lent.side and client.profile.options.share == "all" else None
            facts = {"shapes": shapes, "below": below, "side": side, "backbone": backbone_facts(cloud)}
        return _notes(client=client.profile.name, status="ok", layers=json.dumps(facts))

    return _answer(message, context, work)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the asked steps from the global adapter and hand in the result."""
    return clipped_reply(
        message, context, _answer(message, context, lambda client: _train(client, context, message.content))
    )


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the global adapter on what this client held out."""
    return _answer(message, context, lambda client: _evaluate(client, context, message.content))


@app.evaluate(MESSAGE.partition(".")[2])
def exported(message: Message, context: Context) -> Message:
    """Evaluate the adapter that the server has written, all of it."""

    def work(client: Client) -> RecordDict:
        run = f"{client.profile.name}-x-{uuid.uuid4().hex[:8]}"
        metrics = exported_loss(client, _LENDER, run, message.content)
        reply = _notes(client=client.profile.name, status="ok", run=run)
        reply.metric_records["metrics"] = metrics
        return reply

    return _answer(message, context, work)


def _train(client: Client, context: Context, content: RecordDict) -> RecordDict:
    config, scenario = content.config_records["config"], client.scenario
    number = int(str(config["server-round"]))
    if client.draw("dropout", number).random() < scenario.faults.dropout:
        raise Leaving("dropped", "It vanished, as faults.dropout asks.")
    run = f"{client.profile.name}-r{number}-{uuid.uuid4().hex[:8]}"
    with client.cloud(run) as cloud:
        secure = _secure_task(client, context, content, "train", cloud)
        learn, held_out = client.examples(cloud, _LENDER)
        lent, task = _LENDER.lend(cloud, client.shape(), client.profile.options.codec), _task(client, number)
        require_memory(client, lent)
        arrays, folded = _received(content)
        lent.wear(client.complete(lent, arrays, number), folded)
        try:
            codec = affordable_codec(client, cloud, _LENDER, (learn, held_out), task, content)
            place = client.workplace(cloud, _LENDER, codec, frozen=client.frozen_after(number - 1))
            work = place.train(learn, task, client.rows)
            trained = lent.arrays(only_B=task.only_B)
            handed_in = arrays.keys() & trained.keys() - (lent.below if place.frozen else frozenset())
            # In the order that they came in: Flower's FedAvgM pairs arrays by position.
            update = to_record({name: trained[name] for name in arrays if name in handed_in})
            if own := {name: array for name, array in lent.arrays().items() if name not in arrays}:
                client.personal.save(number, own)
        finally:
            lent.undress()
        first = weight_bytes_of(cloud, client.profile.options.cut)
    slow = 1.0
    if client.draw("straggler", number).random() < scenario.faults.straggler:
        slow = scenario.faults.slowdown
    weight = {"tokens": work.learned_tokens, "examples": len(learn), "equal": 1}[scenario.strategy.weight]
    reply = _notes(client=client.profile.name, status="ok", run=run, codec=codec_text(codec))
    up_bytes = update.count_bytes()
    if secure is not None:
        masked = secure.masked(from_record(update), weight, work.loss)
        reply.config_records["notes"]["secure"], up_bytes = masked, len(masked)
    else:
        reply.array_records["arrays"] = update
    figures = figures_of(client, content, work, up_bytes, first, slow)
    metrics = {"weight": weight, "examples": len(learn), "adapter-up-bytes": up_bytes, **figures}
    reply.metric_records["metrics"] = shown(metrics, secure=scenario.strategy.secure)
    return reply


def _evaluate(client: Client, context: Context, content: RecordDict) -> RecordDict:
    number = int(str(content.config_records["config"]["server-round"]))
    run = f"{client.profile.name}-e{number}-{uuid.uuid4().hex[:8]}"
    with client.cloud(run) as cloud:
        secure = _secure_task(client, context, content, "evaluate", cloud)
        _, held_out = client.examples(cloud, _LENDER)
        options = client.profile.options
        place = client.workplace(cloud, _LENDER, options.codec, frozen=client.frozen_after(number))
        arrays, folded = _received(content)
        place.lent.wear(client.complete(place.lent, arrays, number + 1), folded)
        try:
            work = place.evaluate(held_out, client.scenario.train.batch_size, client.rows)
            if options.share != "all" or options.mode == "side":
                place.lent.save(client.folder / "adapter")
        finally:
            place.lent.undress()
        first = weight_bytes_of(cloud, options.cut)
    figures = figures_of(client, content, work, 0, first, 1.0)
    reply, weight = _notes(client=client.profile.name, status="ok", run=run), work.learned_tokens
    metrics = {"weight": weight, "examples": len(held_out), **figures}
    if secure is not None:
        reply.config_records["notes"]["secure"] = secure.masked({}, weight, work.loss)
    reply.metric_records["metrics"] = shown(metrics, secure=secure is not None)
    return reply


def _secure_task(
    client: Client, context: Context, content: RecordDict, purpose: Purpose, cloud: Cloud
) -> SecureTask | None:
    """What its cohort agreed on, where the strategy is secure; before anything is read or computed."""
    if not client.scenario.strategy.secure:
        return None
    return SecureTask.of(client, context, content, purpose, cloud.card.fingerprint)


def _received(content: RecordDict) -> tuple[dict[str, Any], LoraAdapter | None]:
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
