"""Virtual time and budgets: by hand."""

import math

import pytest

from tightbeam.common.accounts.rows import StepBytes, StepRow
from tightbeam.edge.recipe import Codecs
from tightbeam.federation.contract.budgets import PlannedWork, Spent, choose_codec, codec_text
from tightbeam.federation.profiles import DEVICES, NETWORKS, Budget, NetworkProfile, steps_seconds
from tightbeam.federation.scenario import ClientSection

LINE = NetworkProfile(up_mbps=8, down_mbps=80, rtt_ms=100)


def test_seconds_of_a_line_without_loss() -> None:
    assert LINE.seconds(up_bytes=1_000_000, down_bytes=10_000_000, round_trips=3) == pytest.approx(2.3)
    assert LINE.seconds(up_bytes=0, down_bytes=0, round_trips=0) == 0


def test_loss_caps_the_rate_as_tcp_does() -> None:
    lossy = NetworkProfile(up_mbps=1000, down_mbps=1000, rtt_ms=100, loss=0.01)
    rate = 1460 / 0.1 * math.sqrt(1.5 / 0.01)
    assert lossy.seconds(up_bytes=1_000_000, down_bytes=0, round_trips=0) == pytest.approx(1e6 / rate)
    slow = lossy.model_copy(update={"up_mbps": 0.1})
    assert slow.seconds(up_bytes=1_000_000, down_bytes=0, round_trips=0) == pytest.approx(80.0)


def test_named_networks_are_in_their_natural_order() -> None:
    seconds = [
        NETWORKS[name].seconds(up_bytes=10**7, down_bytes=10**7, round_trips=10)
        for name in ("4g", "home", "fibre", "lan")
    ]
    assert seconds == sorted(seconds, reverse=True)
    assert DEVICES["laptop"].seconds(400 * 10**9) == 2


def test_a_step_pays_a_round_trip_its_bytes_and_the_clouds_work() -> None:
    moved = StepBytes(wire_up_bytes=500_000, wire_down_bytes=1_000_000)
    row = StepRow(run="r", step=0, kind="forward", tokens=1, segments=1, bytes=moved, cloud_flops=2 * 10**9)
    assert steps_seconds(LINE, [row, row], cloud_gflops=4) == pytest.approx(2 * (0.1 + 0.5 + 0.1 + 0.5))


def _plan(**changes: float) -> PlannedWork:
    base = {"tokens": 1000, "hidden_size": 100, "adapter_bytes": 0, "joules": 10.0, "cloud_flops": 0}
    return PlannedWork(**({"gradients": True} | base | changes), dtype="float32")  # type: ignore[arg-type]  # numbers


def test_the_first_codec_that_fits_is_taken() -> None:
    nothing = Spent(0, 0, 0)
    # fp32: 1000 tokens x 4 rows x 400 bytes = 1.6 MB; bf16 0.8 MB; int8 0.416 MB, and 2 % for framing
    for limit, expected in ((2.0, "auto"), (1.0, "bf16"), (0.5, "int8")):
        options = ClientSection(budget=Budget(mb=limit, degrade=["bf16", "int8"]))
        codecs, _ = choose_codec(options, lambda codecs: _plan(), nothing)
        assert codecs is not None
        assert codec_text(codecs) == expected
    codecs, refusal = choose_codec(ClientSection(budget=Budget(mb=0.4)), lambda codecs: _plan(), nothing)
    assert codecs is None
    assert refusal == "1.63 of 0.4 MB"


def test_what_was_spent_counts_and_so_do_joules_and_money() -> None:
    tight = ClientSection(budget=Budget(mb=2.0))
    assert choose_codec(tight, lambda codecs: _plan(), Spent(0.5, 0, 0))[0] is None
    joules = ClientSection(budget=Budget(joules=15))
    assert choose_codec(joules, lambda codecs: _plan(), Spent(0, 0, 0))[0] == Codecs()
    assert choose_codec(joules, lambda codecs: _plan(), Spent(0, 6, 0)) == (None, "16 of 15 J")
    money = ClientSection(budget=Budget(money=0.01))
    assert choose_codec(money, lambda codecs: _plan(cloud_flops=10**15), Spent(0, 0, 0))[0] == Codecs()
    assert choose_codec(money, lambda codecs: _plan(cloud_flops=3 * 10**15), Spent(0, 0, 0))[0] is None


def test_no_budget_is_no_limit() -> None:
    assert choose_codec(ClientSection(), lambda codecs: _plan(), Spent(1e9, 1e9, 1e9))[0] == Codecs()


def test_codecs_that_differ_are_all_named() -> None:
    assert codec_text(Codecs(activations_up="int8")) == "int8/auto/auto/auto"


def test_what_is_cached_in_the_own_codec_beats_a_smaller_one() -> None:
    """The cache holds everything in the client's own codec, so int8 would make all of it cross again."""
    options = ClientSection(budget=Budget(mb=0.1, degrade=["int8"]))
    held = Codecs()

    def plan_for(codecs: Codecs) -> PlannedWork:
        return _plan(tokens=0 if codecs == held else 1000)

    assert choose_codec(options, plan_for, Spent(0.05, 0, 0)) == (held, "")
    assert choose_codec(options, lambda codecs: _plan(), Spent(0.05, 0, 0))[0] is None


def test_taps_come_down_with_the_answer() -> None:
    """A forward of 1000 tokens: 100 elements up and down; with four taps of 10 elements 40 more down."""
    plain, tapped = (_plan(gradients=False, taps=taps, tap_size=10) for taps in (0, 4))
    assert plain.wire_bytes(Codecs()) == pytest.approx(1000 * 2 * 400 * 1.02)
    assert tapped.wire_bytes(Codecs()) - plain.wire_bytes(Codecs()) == pytest.approx(1000 * 4 * 40 * 1.02)
