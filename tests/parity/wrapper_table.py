"""The results of the wrappers, as the second table of `docs/architectures.md`."""

from __future__ import annotations

from collections.abc import Mapping

from parity.sizes import RANKS, RealSize, real_size
from parity.table import RANK_COUNTS, Result, Results, cells
from parity.wrappers import WRAPPERS, at_default_size, filled

TITLE = "Wrappers"
COLUMNS = (
    "type",
    "Auto class",
    "text model",
    "reads",
    *(f"tp={size}" for size in RANK_COUNTS),
    "logits",
    "gradients",
    f"bytes, tp={RANKS}",
    "beyond an even part",
)
_HEAD = """\
Models with vision or audio towers around a text model that has a plan. The plan's rules find the text model wherever the
wrapper has it; what is outside and no rule names (the towers, and what joins them to the text model) every rank keeps and
computes whole. *exact* means what it means above, loaded through the wrapper's own Auto class. Of the two micro-batches the
first has what the tower *reads*, the second is text alone (BLIP-2 always has an image); the eight tokens follow the first. The
last column has the towers' share.

"""

_TIMM = "a tower of timm's, which is not installed"
_UNTRIED = "not tried: more than a text model with towers"
ELSEWHERE = {
    "deepseek_ocr2": "not tried: towers with a text model inside",
    "diffusion_gemma": _UNTRIED,
    "fast_vlm": _TIMM,
    "gemma3n": "above, with a small tower in the place of timm's",
    "instructblip": "refused: its Q-Former reads text too, and has no plan",
    "muse_spark": "refused: transformers' plan leaves most of its text model out",
    "nemo_speechlm": _UNTRIED,
    "perception_lm": _TIMM,
    "phi4_multimodal": "above, with text alone",
    "pi0": _UNTRIED,
    "qwen2_5_omni": "not tried: a talker; its thinker is `qwen2_5_omni_thinker`",
    "qwen3_omni_moe": "not tried: a talker; its thinker is `qwen3_omni_moe_thinker`",
    "shieldgemma2": "transformers does not read back what it saves as an image-text-to-text model",
    "t5gemma2": _UNTRIED,
    "unlimited_ocr": "not tried: towers inside of towers",
    "vibevoice_asr": _UNTRIED,
    "voxtral_realtime": _UNTRIED,
}


def size_of(name: str) -> RealSize:
    """The default sizes of a wrapper on many ranks."""
    return real_size(name, at_default_size)


def wrapper_cells(name: str, results: Mapping[int, Result]) -> tuple[str, ...]:
    """A wrapper's row, as text."""
    wrapper, count = WRAPPERS[name], len(RANK_COUNTS) + 2
    row = cells(name, results, size_of)
    return (name, wrapper.auto, wrapper.text, wrapper.reads, *row[2 : 2 + count], *row[-2:])


def render_wrappers(results: Results) -> str:
    """What follows the first table."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(wrapper_cells(name, result) for name, result in results.items())]
    open_fields = ", ".join(f"`{name}`" for name in results if filled(name))
    elsewhere = "; ".join(f"`{name}`: {where}" for name, where in ELSEWHERE.items())
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    return (
        f"\n## {TITLE}\n\n{_HEAD}{table}" + f"\nSizes filled in, as above: {open_fields}.\n\nNot in the table: {elsewhere}.\n"
    )
