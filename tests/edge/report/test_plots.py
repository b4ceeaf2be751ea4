"""The pictures themselves: what they show, and that they can share a page."""

import re
from pathlib import Path

import pytest

from support.fake_run import fake_run
from tightbeam.edge.report.plots import NUM_COLOURS, bars_svg, bytes_svg, loss_svg
from tightbeam.edge.report.schema import Edge
from tightbeam.edge.report.summary import summarise


@pytest.fixture(scope="module")
def edges(tmp_path_factory: pytest.TempPathFactory) -> list[Edge]:
    base = tmp_path_factory.mktemp("runs")
    return summarise([fake_run(base / name, steps=8, seed=seed) for seed, name in enumerate("ab")]).edges


def _texts(svg: str) -> list[str]:
    return [text.strip() for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]


def test_loss_names_every_edge_and_its_axes(edges: list[Edge]) -> None:
    texts = _texts(loss_svg(edges))
    assert {"a, evaluation", "b, evaluation", "optimizer step", "loss, nats per token"} <= set(texts)


def test_loss_without_evaluations_has_no_legend(edges: list[Edge]) -> None:
    bare = [edge.model_copy(update={"eval_loss": []}) for edge in edges]
    assert not any("evaluation" in text for text in _texts(loss_svg(bare)))


def test_names_are_escaped(edges: list[Edge]) -> None:
    svg = loss_svg([edges[0].model_copy(update={"name": "<b>&"})])
    assert "<b>" not in svg
    assert "&lt;b&gt;&amp;, evaluation" in svg


def test_bytes_has_a_bar_per_slice_kind_and_way(edges: list[Edge]) -> None:
    slices = {part.start_s for edge in edges for part in edge.timeline}
    svg = bytes_svg(edges)
    for colour in ("--c1", "--c4"):
        # One more patch of each colour is the legend's.
        assert len(re.findall(rf"fill: var\({colour}\)", svg)) == 2 * len(slices) + 1
    assert {"forward", "backward", "seconds since the start"} <= set(_texts(svg))


def test_bars_are_as_long_as_their_values() -> None:
    svg = bars_svg("test", {"one": {"x": 3.0, "y": 1.0}}, "units")
    widths = []
    for colour in ("--c1", "--c2"):
        (path,) = re.findall(rf'<path d="([^"]*)"[^>]*style="fill: var\({colour}\)', svg)
        horizontal = [float(x) for x in re.findall(r"[ML] ([\d.]+) ", path)]
        widths.append(max(horizontal) - min(horizontal))
    assert widths[0] / widths[1] == pytest.approx(3.0, rel=1e-3)


def test_there_are_colours_for_every_phase() -> None:
    many = {f"part {index}": 1.0 for index in range(NUM_COLOURS)}
    svg = bars_svg("many", {"row": many}, "units")
    assert {f"--c{index}" for index in range(1, NUM_COLOURS + 1)} <= set(re.findall(r"var\((--c\d)\)", svg))


def test_pictures_scale_and_keep_their_ids_apart(edges: list[Edge]) -> None:
    pictures = {"loss": loss_svg(edges), "bytes": bytes_svg(edges)}
    for name, svg in pictures.items():
        head = svg[: svg.index(">")]
        assert 'width="100%"' in head
        assert " height=" not in head
        ids = re.findall(r'\bid="([^"]*)"', svg)
        assert all(identifier.startswith(f"{name}-") for identifier in ids)
        references = re.findall(r'(?:url\(#|href="#)([^)"]*)', svg)
        assert set(references) <= set(ids)


def test_text_takes_the_font_of_the_page(edges: list[Edge]) -> None:
    svg = loss_svg(edges)
    assert "DejaVu" not in svg
    assert "system-ui" in svg
    assert str(Path.home()) not in svg
