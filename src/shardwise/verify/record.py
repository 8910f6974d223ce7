"""Everything that modules give and get in one forward and backward, in the order of execution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Kind = Literal["input", "output", "gradient of input", "gradient of output", "gradient of parameter"]


class Key(NamedTuple):
    """Which tensor an event is about.

    Attributes:
        kind: what of the module.
        name: path of the module, or of the parameter.
        call: how often the module had been called before.
        position: which of its inputs or outputs.
    """

    kind: Kind
    name: str
    call: int = 0
    position: int = 0


class Recorder(AbstractContextManager["Recorder"]):
    """While it is on, keeps a copy of the floating-point outputs of all modules of a model, of some modules' inputs, and in
    backward of their gradients and those of the parameters: `events`, on the CPU, in float32, in the order in which they came.

    Args:
        model: the model.
        entered: paths of the modules whose inputs are kept too. Each gets a view of its own of what it is given, so that the
            gradient that goes into it can be told from that of its siblings.

    `raised_in` is the path of the innermost module in which an error was raised; None where none was.
    """

    def __init__(self, model: nn.Module, entered: Collection[str]) -> None:
        self.events: dict[Key, Tensor] = {}
        self.raised_in: str | None = None
        self._model, self._entered = model, frozenset(entered)
        self._calls: Counter[str] = Counter()
        self._running: list[tuple[str, int]] = []
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Recorder:
        for name, module in self._model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._after(name)))
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._accumulated(name)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and self._running:
            self.raised_in = self._running[-1][0]
        for handle in self._handles:
            handle.remove()
        for name, parameter in self._model.named_parameters():  # what hooks of others made of it, in the place of its event
            if (key := Key("gradient of parameter", name)) in self.events:
                self._keep(key, parameter.grad)

    def save(self, path: Path) -> None:
        """For `read`."""
        torch.save({"events": [(*key, value) for key, value in self.events.items()], "raised_in": self.raised_in}, path)

    def _before(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = self._calls[name]
            self._calls[name] += 1
            self._running.append((name, call))
            if name not in self._entered:
                return None
            index, seen = 0, []
            for value in (*args, *kwargs.values()):
                if isinstance(value, Tensor) and value.is_floating_point():
                    value = self._keep_input(Key("input", name, call, index), value)
                    index += 1
                seen.append(value)
            return tuple(seen[: len(args)]), dict(zip(kwargs, seen[len(args) :], strict=True))

        return hook

    def _keep_input(self, key: Key, value: Tensor) -> Tensor:
        self._keep(key, value)
        if not (value.requires_grad and torch.is_grad_enabled()):
            return value
        own = value.view_as(value)
        own.register_hook(lambda gradient: self._keep(key._replace(kind="gradient of input"), gradient))
        return own

    def _after(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: Any) -> None:
            _, call = self._running.pop()
            for index, value in enumerate(_tensors(output)):
                key = Key("output", name, call, index)
                self._keep(key, value)
                if value.requires_grad:
                    after = key._replace(kind="gradient of output")
                    value.register_hook(lambda gradient, after=after: self._keep(after, gradient))

        return hook

    def _accumulated(self, name: str) -> Callable[[Tensor], None]:
        return lambda parameter: self._keep(Key("gradient of parameter", name), parameter.grad)

    def _keep(self, key: Key, value: Tensor | None) -> None:
        if value is not None:
            self.events[key] = value.detach().to("cpu", torch.float32, copy=True)


class Recorded(NamedTuple):
    """What a recorder has saved."""

    events: dict[Key, Tensor]
    raised_in: str | None


def read(path: Path) -> Recorded:
    """What `Recorder.save` wrote; tensors are mapped, and read when they are looked at."""
    found = torch.load(path, mmap=True)
    return Recorded({Key(*key): value for *key, value in found["events"]}, found["raised_in"])


def _tensors(output: Any) -> list[Tensor]:
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else [output]
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
