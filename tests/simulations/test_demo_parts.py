"""What the demo is made of: processes that never outlive it, the mean of adapters, the edges' recipes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tightbeam.common.errors import TightbeamError, UsageError
from tightbeam.edge.recipe import recipe_from_mapping
from tightbeam.federation.runtimes.processes import Children, signals_as_exit
from tightbeam.simulations.averaging import average_adapters, weighted_mean
from tightbeam.simulations.demo import CUT, demo_recipe, run_demo
from tightbeam.simulations.demo_inputs import EdgeTexts

SLEEP = "import time; time.sleep(60)"
DEAF = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print('deaf', flush=True); time.sleep(60)"
)
PARENT = """
import signal, sys, time
from pathlib import Path
from tightbeam.federation.runtimes.processes import Children, signals_as_exit
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests started in the background ignore it
with signals_as_exit(), Children(Path(sys.argv[1])) as children:
    child = children.start("child", [sys.executable, "-c", "import time; time.sleep(60)"])
    print(child.process.pid, flush=True)
    time.sleep(60)
"""


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def is_gone(pid: int) -> bool:
    for _ in range(50):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_children_end_with_the_context(tmp_path: Path) -> None:
    with Children(tmp_path) as children:
        child = children.start("sleeper", python(SLEEP))
        assert child.process.poll() is None
    assert child.process.poll() is not None


def test_a_failure_of_the_parent_stops_them_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    children = Children(tmp_path)

    def fail() -> None:
        with children:
            children.start("sleeper", python(SLEEP))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert children.started[0].process.poll() is not None
    assert str(tmp_path) in capsys.readouterr().err


def test_one_that_ignores_the_request_is_killed(tmp_path: Path) -> None:
    started_s = time.monotonic()
    with Children(tmp_path, grace_s=0.5) as children:
        child = children.start("deaf", python(DEAF))
        assert child.first_answer(30.0) == "deaf"
    assert child.process.poll() is not None
    assert time.monotonic() - started_s < 30


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals to send")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_whatever_ends_the_parent_ends_the_child(number: signal.Signals, tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [*python(PARENT), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.send_signal(number)
        assert parent.wait(30) != 0
    assert is_gone(pid)


def test_the_last_words_of_a_failed_child_are_told(tmp_path: Path) -> None:
    code = "import sys; print('chatter\\nerror: no such model', file=sys.stderr); sys.exit(2)"
    with Children(tmp_path) as children:
        child = children.start("cloud", python(code))
        with pytest.raises(TightbeamError, match="cloud ended with code 2: error: no such model") as caught:
            child.first_answer(30.0)
    assert str(tmp_path / "cloud.log") in caught.value.cure


def test_one_that_is_never_ready_is_given_up(tmp_path: Path) -> None:
    with Children(tmp_path) as children:
        child = children.start("cloud", python(SLEEP))
        with pytest.raises(TightbeamError, match="not ready within"):
            child.first_answer(0.3)


def test_a_failing_child_is_seen_while_another_still_works(tmp_path: Path) -> None:
    with Children(tmp_path) as children:
        edges = [
            children.start("slow", python(SLEEP)),
            children.start("broken", python("raise SystemExit(3)")),
        ]
        with pytest.raises(TightbeamError, match="broken ended with code 3"):
            list(children.wait(edges, 30.0))


def test_waiting_has_a_deadline_and_an_end(tmp_path: Path) -> None:
    with Children(tmp_path) as children:
        list(children.wait([children.start("quick", python("pass"))], 30.0))
        slow = children.start("slow", python(SLEEP))
        with pytest.raises(TightbeamError, match="slow took longer"):
            list(children.wait([slow], 0.3))


def test_signal_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with signals_as_exit():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_mean_is_weighted_by_tokens() -> None:
    states = [{"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([5.0, 6.0])}]
    assert weighted_mean(states, [3, 1])["a"].tolist() == [2.0, 3.0]


def test_mean_of_one_is_itself_and_order_does_not_matter() -> None:
    torch.manual_seed(0)
    states = [{"a": torch.randn(7, 3), "b": torch.randn(5)} for _ in range(3)]
    alone = weighted_mean(states[:1], [9])
    assert all(torch.equal(alone[name], states[0][name]) for name in alone)
    forth, back = weighted_mean(states, [1, 2, 3]), weighted_mean(states[::-1], [3, 2, 1])
    assert all(torch.equal(forth[name], back[name]) for name in forth)


def test_mean_keeps_the_dtype() -> None:
    state = {"a": torch.ones(2, dtype=torch.bfloat16)}
    assert weighted_mean([state, state], [1, 1])["a"].dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("states", "weights"),
    [
        ([], []),
        ([{"a": torch.ones(1)}], [0]),
        ([{"a": torch.ones(1)}], [1, 1]),
        ([{"a": torch.ones(1)}, {"a": torch.ones(1)}], [2, -1]),
        ([{"a": torch.ones(1)}, {"b": torch.ones(1)}], [1, 1]),
        ([{"a": torch.ones(1)}, {"a": torch.ones(2)}], [1, 1]),
    ],
)
def test_what_has_no_mean_is_refused(states: list[dict[str, torch.Tensor]], weights: list[float]) -> None:
    with pytest.raises(UsageError):
        weighted_mean(states, weights)


def test_averaged_folder_has_both_files_of_peft(tmp_path: Path) -> None:
    for name, value in (("one", 1.0), ("two", 3.0)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.full((2,), value)}, tmp_path / name / "adapter_model.safetensors")
        (tmp_path / name / "adapter_config.json").write_text(f'"{name}"', encoding="utf-8")
    target = average_adapters([tmp_path / "one", tmp_path / "two"], [1, 1], tmp_path / "mean")
    assert load_file(target / "adapter_model.safetensors")["w"].tolist() == [2.0, 2.0]
    assert (target / "adapter_config.json").read_text(encoding="utf-8") == '"one"'


@pytest.mark.parametrize("evaluation", [Path("eval.jsonl"), None])
def test_an_edges_recipe_is_right(evaluation: Path | None, tmp_path: Path) -> None:
    text = EdgeTexts("quiz", Path("train.jsonl"), evaluation, "Why?")
    recipe = recipe_from_mapping(demo_recipe(text, "127.0.0.1:1234", tmp_path, 24))
    assert (recipe.cut, recipe.adapter.r, recipe.train.steps) == (CUT, 16, 24)
    assert recipe.run_folder == tmp_path / "quiz"
    assert (recipe.data.eval is None) == (recipe.data.eval_fraction > 0)
    assert not recipe.model.insecure


def test_the_demo_wants_two_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two edges, not 1"):
        run_demo(model="x", data=[tmp_path / "one.jsonl"], steps=1, output=tmp_path)
