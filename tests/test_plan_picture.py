"""The picture of a layer: what is drawn is what the table and the simulated step say."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from functools import cache
from math import isclose

import pytest
from rich.console import Console
from transformers import PreTrainedConfig

import shardwise
from models import config
from shardwise import Estimate, tiny
from shardwise.estimate import show
from shardwise.estimate.flow import INPUT
from shardwise.estimate.picture import Box, Scene, to_svg, to_text

SVG = "{http://www.w3.org/2000/svg}"
TYPES = ("llama", "mixtral", "deepseek_v3", "gpt2", "phi3", "qwen3_next")


def config_of(name: str) -> PreTrainedConfig:
    """Of a test model, or of a tiny one."""
    return tiny.config(name) if name in ("gpt2", "qwen3_next") else config(name)


@cache
def found(name: str, size: int = 4, **options: object) -> Estimate:
    """An estimate of it, made once."""
    return shardwise.estimate(config_of(name), size, batch=2, sequence=16, **options)


def pictures(estimate: Estimate) -> list[tuple[Scene, ET.Element]]:
    """The scenes of it, and what is drawn, read as XML."""
    return [(one, ET.fromstring(to_svg(one))) for one in show.scenes(estimate)]


def shape_of(part: ET.Element) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of a rectangle."""
    x, y, width, height = (float(part.attrib[key]) for key in ("x", "y", "width", "height"))
    return x, y, x + width, y + height


@pytest.mark.parametrize("name", TYPES)
def test_pieces_add_up_to_the_matrix(name):
    """Guards: a piece that is missing, drawn twice or over another one; a rank whose pieces are not its share of the table."""
    estimate = found(name)
    for picture, svg in pictures(estimate):
        prefix = re.sub(r"  x \d+$", "", picture.title).replace("*", "{}")
        layer = next(kind.layers[0] for kind in estimate.kinds if kind.title == picture.title)
        assert prefix.split(".")[0] == layer.split(".")[0]
        drawn = svg.findall(f".//{SVG}g[@class='matrix']")
        assert drawn
        for matrix in drawn:
            row = estimate.plan[f"{layer}.{matrix.attrib['data-name']}"]
            parts = [shape_of(part) for part in matrix.findall(f"{SVG}rect[@class='part']")]
            areas = [(right - left) * (bottom - top) for left, top, right, bottom in parts]
            outer = [edge(values) for edge, values in zip((min, min, max, max), zip(*parts, strict=True), strict=True)]
            assert isclose(sum(areas), (outer[2] - outer[0]) * (outer[3] - outer[1]), rel_tol=0.02)
            if matrix.attrib["data-dealt"] != "0":
                continue
            of_rank: defaultdict[str | None, float] = defaultdict(float)
            for part, area in zip(matrix.findall(f"{SVG}rect[@class='part']"), areas, strict=True):
                of_rank[part.attrib.get("data-rank")] += area
            if row.sharded and row.layout.copies(row.shape, 4) == 1:
                for rank in range(4):
                    lengths = row.layout.lengths(row.shape, 4)
                    assert isclose(of_rank[str(rank)] / sum(areas), lengths[rank] / sum(lengths), abs_tol=0.03)
            elif not row.sharded:
                assert set(of_rank) == {None}


@pytest.mark.parametrize("name", TYPES)
def test_all_collectives_are_there(name):
    """Guards: a collective of the simulated layer that is not drawn, or drawn twice, or with the bytes of another."""
    estimate = found(name)
    for picture, svg in pictures(estimate):
        kind = next(kind for kind in estimate.kinds if kind.title == picture.title)
        assert Counter(record for box in picture.boxes for record in box.collectives) == Counter(kind.collectives)
        bars = [group.attrib for group in svg.findall(f".//{SVG}g[@class='collective']")]
        words = "".join(svg.itertext())
        on_parameters = words.count("of its gradient")
        assert len(bars) + on_parameters == len(kind.collectives)
        assert {int(bar["data-bytes"]) for bar in bars} <= {record.bytes for record in kind.collectives}


@pytest.mark.parametrize("options", [{}, {"checkpointing": True}], ids=["plain", "checkpointing"])
def test_collectives_stand_in_order(options):
    """Guards: a forward collective above one that comes before it, or a backward one below one that comes after it."""
    estimate = found("llama", **options)
    picture, svg = pictures(estimate)[0]
    bars = [
        (float(group[0].attrib["y"]), group.attrib["data-phase"], group.attrib["data-op"])
        for group in svg.findall(f".//{SVG}g[@class='collective']")
    ]
    kind = estimate.kinds[0]
    order = [box.module for box in picture.boxes if box.kind == "collective"]
    assert order == ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
    ordered = [(phase, op) for _, phase, op in sorted(bars)]
    assert [one for one in ordered if one[0] == "forward"] == [
        (r.phase, r.op) for r in kind.collectives if r.phase == "forward"
    ]
    assert [one[0] for one in ordered if one[0] != "recompute"] == ["backward", "forward", "backward", "forward"]


def box_of(picture: Scene, module: str, kind: str = "parameters") -> Box:
    """The first box of a module."""
    return next(box for box in picture.boxes if box.module == module and box.kind == kind)


def test_what_depends_on_what():
    """Guards: edges that are not those of the computation: values that skip attention, a residual from the wrong place, the
    three readers of one sum drawn with a sum each.
    """
    picture, _ = pictures(found("llama"))[0]
    summed = box_of(picture, "self_attn.q_proj", "collective")
    heads = [box_of(picture, f"self_attn.{name}_proj") for name in "qkv"]
    assert [box.inputs for box in heads] == [frozenset({summed.number})] * 3
    mix = box_of(picture, "self_attn", "mix")
    assert mix.inputs == {box.number for box in heads}
    assert mix.title == "attention"
    after, end = [box for box in picture.boxes if box.kind == "sum"]
    assert after.inputs == {INPUT, box_of(picture, "self_attn.o_proj", "collective").number}
    assert end.inputs == {after.number, box_of(picture, "mlp.down_proj", "collective").number}
    assert picture.last == end.number
    assert [len(row) for row in picture.rows] == [1, 1, 3, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1]


def test_experts_are_a_deck():
    """Guards: experts drawn as one matrix, or dealt ones as if each were cut."""
    picture, svg = pictures(found("mixtral"))[0]
    decks = [m for m in svg.findall(f".//{SVG}g[@class='matrix']") if "experts" in m.attrib["data-name"]]
    assert [(deck.attrib["data-deck"], deck.attrib["data-dealt"]) for deck in decks] == [("4", "0")] * 2
    assert all(len(deck.findall(f"{SVG}rect[@class='card']")) == 3 for deck in decks)
    packed = decks[0] if "gate_up" in decks[0].attrib["data-name"] else decks[1]
    assert [part.attrib["data-rank"] for part in packed.findall(f"{SVG}rect[@class='part']")] == [*"00112233"]
    dealt = shardwise.estimate(config("mixtral"), 4, ep_size=4, batch=2, sequence=16)
    _, svg = pictures(dealt)[0]
    for deck in svg.findall(f".//{SVG}g[@class='matrix']"):
        if "experts" in deck.attrib["data-name"]:
            ranks = {rect.attrib["data-rank"] for rect in deck.findall(f"{SVG}rect")}
            assert (deck.attrib["data-dealt"], ranks) == ("4", {*"0123"})
    assert picture.ranks == 4


def test_colwise_stands_and_rowwise_lies():
    """Guards: cuts drawn along the other side, also where a module keeps its weight transposed."""
    for name, colwise, rowwise in (("llama", "q_proj", "o_proj"), ("gpt2", "c_fc", "mlp.c_proj")):
        _, svg = pictures(found(name))[0]
        for matrix in svg.findall(f".//{SVG}g[@class='matrix']"):
            parts = [shape_of(part) for part in matrix.findall(f"{SVG}rect[@class='part']")]
            if f"{colwise}.weight" in matrix.attrib["data-name"]:
                assert len({top for _, top, _, _ in parts}) == 1 < len({left for left, _, _, _ in parts})
            if f"{rowwise}.weight" in matrix.attrib["data-name"]:
                assert len({left for left, _, _, _ in parts}) == 1 < len({top for _, top, _, _ in parts})


@pytest.mark.parametrize("name", TYPES)
def test_nothing_overlaps_or_is_cut_off(name):
    """Guards: boxes drawn over each other, and words that leave the picture."""
    for _, svg in pictures(found(name)):
        width, height = (float(one) for one in svg.attrib["viewBox"].split()[2:])
        boxes = [
            shape_of(rect) for group in svg.findall(f".//{SVG}g[@class='matrix']") for rect in group if rect.tag == f"{SVG}rect"
        ]
        for left, top, right, bottom in boxes:
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
        bars = [shape_of(rect) for rect in svg.findall(f"{SVG}rect[@rx='6']")]
        for bar in bars:
            for other in [*boxes, *(one for one in bars if one != bar)]:
                assert bar[2] <= other[0] or other[2] <= bar[0] or bar[3] <= other[1] or other[3] <= bar[1]
        for text in svg.findall(f".//{SVG}text[@text-anchor='middle']"):
            if "x" in text.attrib:
                half = len("".join(text.itertext())) * 7.4 / 2
                assert half <= float(text.attrib["x"]) <= width - half


def test_kinds_of_layers_have_their_own_picture():
    """Guards: layers of another kind shown by the picture of the first."""
    dense, experts = [picture for picture, _ in pictures(found("deepseek_v3"))]
    assert not any("experts" in box.module for box in dense.boxes)
    assert any("experts" in box.module for box in experts.boxes)
    assert len(pictures(found("qwen3_next"))) == 2


def test_sequence_parallel():
    """Guards: gathers in front of attention drawn behind it, and their duals in backward as bars of their own."""
    picture, _ = pictures(found("llama", sequence_parallel=True))[0]
    gather = box_of(picture, "self_attn", "collective")
    assert [record.op for record in gather.collectives] == ["all_gather", "reduce_scatter"]
    assert box_of(picture, "self_attn.q_proj").inputs == {gather.number}


def test_in_a_terminal():
    """Guards: a picture wider than a terminal of 100 columns, or one that leaves out a matrix, a rank or a collective."""
    picture = show.scenes(found("llama"))[0]
    console = Console(width=100, record=True, file=io.StringIO(), color_system="truecolor", force_terminal=True)
    console.print(to_text(picture))
    text = console.export_text(clear=False)
    assert max(map(len, text.splitlines())) <= 100
    for box in picture.boxes:
        assert box.kind in ("sum", "collective") or box.title in text
    assert text.count("▼ all-reduce") == 2
    assert text.count("▲ all-reduce") == 2
    page = console.export_html(inline_styles=True)
    assert all(colour in page for colour in ("#4c78a8", "#f58518", "#54a24b", "#e45756"))
