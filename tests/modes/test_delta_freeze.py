"""A delta codec in a run that freezes: deltas while the bottom trains, then one pass coded alone."""

from pathlib import Path

import pytest

from support.edge_runs import byte_tokenizer, quiet, tiny_llama, write_jsonl
from support.in_process import InProcessCloud
from tightbeam.common.config import recipe_from_mapping
from tightbeam.common.costs.summary import summarise
from tightbeam.edge.deltas import EdgeDeltas
from tightbeam.edge.run import run_recipe


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_deltas_end_with_the_freeze(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIGHTBEAM_CACHE", str(tmp_path / "cache"))
    tiny_llama(num_hidden_layers=6).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{n} + 1 =", "completion": f"{n + 1}"} for n in range(8)]
    made: list[EdgeDeltas] = []
    before = EdgeDeltas.clear

    def cleared(deltas: EdgeDeltas) -> None:
        assert deltas.num_bytes > 0
        made.append(deltas)
        before(deltas)

    monkeypatch.setattr(EdgeDeltas, "clear", cleared)
    with InProcessCloud(tmp_path / "model", tmp_path / "cloud") as cloud:
        recipe = recipe_from_mapping(
            {
                "model": {"cloud": cloud.listen(), "insecure": True},
                "cut": "1:1",
                "codec": "delta-int4/int8",
                "adapter": {"r": 2},
                "data": {"train": str(write_jsonl(tmp_path / "a.jsonl", rows))},
                "train": {"epochs": 4, "batch_size": 4, "freeze_bottom_after": 2},
                "output": {"dir": str(tmp_path), "name": "run", "report": False},
            }
        )
        assert run_recipe(recipe, console=quiet()[0]).exit_code == 0
    (edge,) = summarise([tmp_path / "run"]).edges
    assert edge.step_counts["backward"] == 4
    assert edge.fill_tokens > 0
    assert edge.prediction is not None
    assert edge.prediction.predicted_payload_bytes == edge.prediction.measured_payload_bytes
    assert [deltas.num_bytes for deltas in made] == [0]
