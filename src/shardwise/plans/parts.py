"""The parts of a decoder layer as rules: attention, MLPs, and what stays whole. The families are put together from these."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from shardwise.plan import wildcard
from shardwise.spec import Rule

MISSING = "left whole by the model's plan"
WITHOUT = "the model has no plan of its own"
LATENT = "a latent that all heads read, too small to gather it in every layer"
_GATHERED = "a latent that all heads read, large enough to gather it in every layer"


def places(model: nn.Module, path: str, having: str = "", lacking: str = "") -> list[str]:
    """The modules at `path` ("layers.*.self_attn", relative to `model`) that have a child or parameter called `having` and
    none called `lacking`: the path itself where all of them do, else the name of each that does.
    """
    here = dict(modules_at(model, path))
    fitting = [
        name
        for name, module in here.items()
        if (not having or getattr(module, having, None) is not None) and (not lacking or not hasattr(module, lacking))
    ]
    return [path] if fitting and len(fitting) == len(here) else fitting


def modules_at(model: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """The modules at `path`, as of `places`, each with its name."""
    return [(name, module) for name, module in model.named_modules() if wildcard(name) == path]


def rule(pattern: str, style: str, reason: str = MISSING) -> Rule:
    """A rule of shardwise's own."""
    return Rule(pattern, style, "shardwise", reason=reason)


def attention(
    model: nn.Module,
    prefix: str,
    path: str = "layers.*.self_attn",
    also: Sequence[str] = (),
    output: str = "o_proj",
) -> list[Rule]:
    """Attention on local heads: q, k, v and `also` (a gate) column-wise, `output` row-wise, sinks by their heads.

    Linear attention has projections of the same names: where there is a convolution, no rule is made.
    """
    found: list[Rule] = []
    for place in places(model, path, having="k_proj", lacking="conv1d"):
        name = prefix + place
        found += [rule(f"{name}.{child}", "colwise") for child in ("q_proj", "k_proj", "v_proj", *also)]
        found.append(rule(f"{name}.{output}", "rowwise"))
    for place in places(model, path, having="sinks"):
        found += [rule(f"{prefix}{place}.sinks", "colwise"), rule(prefix + place, "local_params", "its sinks are local")]
    return found


def latent_attention(
    model: nn.Module, prefix: str, path: str = "layers.*.self_attn", also: Sequence[str] = (), gathered: bool = False
) -> list[Rule]:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): what expands the latents to heads is cut between heads.

    All heads read the latents. Their projections are small, and stay whole; or `gathered`: cut, and the latents gathered, for
    two more all-gathers in a layer's forward and two more all-reduces in its backward.
    """
    reason = _GATHERED if gathered else LATENT
    styles = dict.fromkeys(("q_proj", "q_b_proj", "kv_b_proj", *also), ("colwise", MISSING)) | {
        "q_a_proj": ("colwise_gather_output" if gathered else "replicate", reason),
        "kv_a_proj_with_mqa": ("mla_kv_a_proj_gather_output" if gathered else "mla_kv_a_proj", reason),
        "o_proj": ("rowwise", MISSING),
    }
    known = _modules(model)
    return [
        rule(f"{prefix}{place}.{child}", style, reason)
        for place in places(model, path, having="kv_b_proj")
        for child, (style, reason) in styles.items()
        if f"{place}.{child}" in known
    ]


def mlp(prefix: str, path: str, up: Sequence[str] = ("gate_proj", "up_proj"), down: str = "down_proj") -> list[Rule]:
    """An MLP: what leads into its width column-wise, what leads out row-wise. Its names decide, so it may be in some layers."""
    return [*(rule(f"{prefix}{path}.{child}", "colwise") for child in up), rule(f"{prefix}{path}.{down}", "rowwise")]


def packed_mlp(prefix: str, path: str, fused: str = "gate_up_proj", down: str = "down_proj") -> list[Rule]:
    """An MLP whose gate and up are one matrix, gate | up."""
    return [
        rule(f"{prefix}{path}.{fused}", "packed_colwise", "gate | up, each cut on its own"),
        rule(f"{prefix}{path}.{down}", "rowwise", "reads the local half of gate and up"),
    ]


def mixer(model: nn.Module, prefix: str, path: str, reason: str, gathered: Sequence[str] = (), having: str = "") -> list[Rule]:
    """A mixer that is computed whole on every rank: of its projections called `gathered` the weights are cut and the outputs
    gathered, every other parameter at and below `path` is kept whole on purpose.
    """
    cut = {f"{place}.{child}" for place in places(model, path, having) for child in gathered} & _modules(model)
    return [
        *(rule(prefix + name, "colwise_gather_output", reason) for name in sorted(cut)),
        *(found for found in whole(model, prefix, path, reason, having) if not _below(found.pattern, prefix, cut)),
    ]


def whole(model: nn.Module, prefix: str, path: str, reason: str, having: str = "") -> list[Rule]:
    """Every parameter at and below `path`, kept whole on purpose. Their modules stay as they are."""
    names = [name for name, _ in model.named_parameters()]
    found: list[str] = []
    for place in places(model, path, having):
        below = dict.fromkeys(map(wildcard, names) if "*" in place else names)
        found += [name for name in below if name.startswith(f"{place}.")]
    return [rule(prefix + name, "replicate", reason) for name in found]


def _modules(model: nn.Module) -> set[str]:
    """The names of all modules, and their families."""
    return {known for name, _ in model.named_modules() for known in (name, wildcard(name))}


def _below(pattern: str, prefix: str, modules: set[str]) -> bool:
    return pattern.removeprefix(prefix).rpartition(".")[0] in modules
