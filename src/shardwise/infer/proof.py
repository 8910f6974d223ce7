"""What was found of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Island:
    """What was found of a part of a plan that is cut by itself: of the layers between which activations are parts.

    Args:
        name: its modules, with `*` for the numbers of layers: "model.layers.*.self_attn".
        count: how many layers have it.
        styles: what becomes of its modules: "q_proj, k_proj, v_proj: colwise; o_proj: rowwise".
        yours: the rules in it that the user wrote, as "pattern: style".
        gradients: the largest error of a gradient in it, relative to that parameter's largest.
        worst: that parameter.
        problem: what is wrong; None of one that is right.
    """

    name: str
    count: int
    styles: str
    yours: tuple[str, ...]
    gradients: float
    worst: str
    problem: str | None = None


@dataclass(frozen=True)
class Proof:
    """What a plan was found to compute, beside the model as it is.

    Args:
        size: ranks that were simulated.
        outputs: the largest error of an output, relative to the largest value.
        gradients: the largest error of a parameter's gradient, relative to that parameter's largest.
        worst: that parameter.
        problem: what is wrong, in words; None of a plan that is right.
        tried: on what it was found, in words.
        place: the module or the parameter where what is wrong begins; "" where nobody knows.
        errors: of each parameter's gradient, as `gradients`.
        islands: the parts that are cut by themselves, each with what was found of it, where that was asked for.
        late: whether it was given up because it took too long.
    """

    size: int
    outputs: float
    gradients: float
    worst: str
    problem: str | None = None
    tried: str = ""
    place: str = ""
    errors: Mapping[str, float] = field(default_factory=dict, repr=False)
    islands: tuple[Island, ...] = ()
    late: bool = False

    def __bool__(self) -> bool:
        return self.problem is None

    @classmethod
    def failed(cls, size: int, problem: str, place: str = "", late: bool = False) -> Proof:
        """Of a plan that does not even run."""
        return cls(size, float("inf"), float("inf"), "", problem, place=place, late=late)
