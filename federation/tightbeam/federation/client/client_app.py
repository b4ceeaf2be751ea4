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
from tightbeam.federation.client.clipping import clipped_reply
from tightbeam.federation.client.exported import exported_loss
from tightbeam.federation.client.figures import backbone_facts, counted, figures_of, weight_bytes_of
from tightbeam.federation.client.limits import affordable_codec, require_memory
from tightbeam.federation.client.node_config import node_section
from tightbeam.federation.client.participant import Client, Leaving
from tightbeam.federation.client.secure import SecureTask, answer_step, certificate_of, shown
from tightbeam.federation.client.surroundings import RealSurroundings, Surroundings
from tightbeam.federation.contract.budgets import codec_text
from tightbeam.federation.contract.messages import EXPORTED
from tightbeam.federation.contract.records import from_record, to_record
from tightbeam.federation.contract.run_config import RunConfig
from tightbeam.federation.contract.terms import Purpose
from tightbeam.federation.math import LoraAdapter, parse_adapter

__all__ = ["app", "client_app"]


def client_app(surroundings: Surroundings) -> ClientApp:
    """The app of a client in these surroundings. Its models serve every client that its process plays."""
    app, lender = ClientApp(), Lender()

    def answer(message: Message, context: Context, work: Callable[[Client], RecordDict]) -> Message:
        return _answer(surroundings, message, context, work)

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        """Say which client this node is, and show its certificate in a secure federation."""
        return answer(message, context, _hello)

    @app.query("secure")
    def secure(message: Message, context: Context) -> Message:
        """Answer one exchange of a secure aggregation."""
        return answer(message, context, lambda client: _secure(client, context, message.content))

    @app.query("layers")
    def layers(message: Message, context: Context) -> Message:
        """Name the tensors that this client shares, with their shapes, and what lies below its cut."""
        return answer(message, context, lambda client: _layers(client, lender))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        """Train the asked steps from the global adapter and hand in the result."""
        reply = answer(message, context, lambda client: _train(client, lender, context, message.content))
        return clipped_reply(message, context, reply)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        """Evaluate the global adapter on what this client held out."""
        return answer(message, context, lambda client: _evaluate(client, lender, context, message.content))

    @app.evaluate(EXPORTED.partition(".")[2])
    def exported(message: Message, context: Context) -> Message:
        """Evaluate the adapter that the server has written, all of it."""
        return answer(message, context, lambda client: _exported(client, lender, message.content))

    return app


app = client_app(RealSurroundings())


def _answer(
    surroundings: Surroundings, message: Message, context: Context, work: Callable[[Client], RecordDict]
) -> Message:
    """Do the work and reply; what goes wrong is a reply too."""
    name, rows, missed = f"node {context.node_id}", list[StepRow](), list[StepRow]()
    prices = list[PriceList]()
    try:
        run = RunConfig.of(context.run_config)
        profile = run.profile(context.node_config)
        name = profile.name
        node_section(context.node_config, run)  # before anything is done with what it lacks
        surroundings.require(run)
        if run.scenario.threads is not None:
            torch.set_num_threads(run.scenario.threads)
        client = Client(run, profile, dict(context.node_config), rows, missed, prices, surroundings)
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


def _hello(client: Client) -> RecordDict:
    content = _notes(client=client.profile.name, status="ok")
    content.config_records["notes"]["certificate"] = certificate_of(client)
    return content


def _secure(client: Client, context: Context, content: RecordDict) -> RecordDict:
    reply = _notes(client=client.profile.name, status="ok")
    reply.config_records["notes"]["secure"] = answer_step(client, context, content)
    return reply


def _layers(client: Client, lender: Lender) -> RecordDict:
    options = client.profile.options
    with client.cloud(f"layers-{uuid.uuid4().hex[:8]}") as cloud:
        lent = lender.lend(cloud, client.adapter_shape(), options.codec)
        shared = lent.shared(options.share)
        shapes = {name: shape for name, shape in lent.layers().items() if name in shared}
        below = sorted({name.partition(".lora_")[0] for name in lent.below & shared})
        side = lent.side.facts() if lent.side and options.share == "all" else None
        facts = {"shapes": shapes, "below": below, "side": side, "backbone": backbone_facts(cloud)}
    return _notes(client=client.profile.name, status="ok", layers=json.dumps(facts))


def _exported(client: Client, lender: Lender, content: RecordDict) -> RecordDict:
    run = f"{client.profile.name}-x-{uuid.uuid4().hex[:8]}"
    metrics = exported_loss(client, lender, run, content)
    reply = _notes(client=client.profile.name, status="ok", run=run)
    reply.metric_records["metrics"] = metrics
    return reply


def _train(client: Client, lender: Lender, context: Context, content: RecordDict) -> RecordDict:
    config, scenario = content.config_records["config"], client.scenario
    number = int(str(config["server-round"]))
    if client.surroundings.vanishes(client, number):
        raise Leaving("dropped", "It vanished, as faults.dropout asks.")
    run = f"{client.profile.name}-r{number}-{uuid.uuid4().hex[:8]}"
    with client.cloud(run) as cloud:
        secure = _secure_task(client, context, content, "train", cloud)
        learn, held_out = client.examples(cloud, lender)
        lent, task = (
            lender.lend(cloud, client.adapter_shape(), client.profile.options.codec),
            _task(client, number),
        )
        require_memory(client, lent)
        arrays, folded = _received(content)
        lent.wear(client.complete(lent, arrays, number), folded)
        try:
            codec = affordable_codec(client, cloud, lender, (learn, held_out), task, content)
            place = client.workplace(cloud, lender, codec, frozen=client.frozen_after(number - 1))
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
    slow = client.surroundings.slowdown(client, number)
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


def _evaluate(client: Client, lender: Lender, context: Context, content: RecordDict) -> RecordDict:
    number = int(str(content.config_records["config"]["server-round"]))
    run = f"{client.profile.name}-e{number}-{uuid.uuid4().hex[:8]}"
    with client.cloud(run) as cloud:
        secure = _secure_task(client, context, content, "evaluate", cloud)
        _, held_out = client.examples(cloud, lender)
        options = client.profile.options
        place = client.workplace(cloud, lender, options.codec, frozen=client.frozen_after(number))
        arrays, folded = _received(content)
        place.lent.wear(client.complete(place.lent, arrays, number + 1), folded)
        try:
            work = place.evaluate(held_out, client.scenario.train.batch_size, client.rows)
            if options.keeps_own:
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
        gradient_accumulation=section.gradient_accumulation,
        schedule=section.schedule,
        warmup_steps=section.warmup_steps,
        scheduled_steps=client.scenario.rounds * section.steps,
        noise=0.0 if client.profile.options.own_side else section.noise,
    )
