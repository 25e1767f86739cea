"""A module of a model by its path: how it is found, what it returns, and that replaced."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fastsae.checks import check_type, reject

__all__ = ["StopForward", "find_module", "first_output", "replaced_output"]


class StopForward(Exception):
    """Raised in a hook to end a forward pass early, and caught around it; no error."""


def find_module(model: nn.Module, path: str) -> nn.Module:
    """Return the module of ``model`` at ``path``, as in ``model.named_modules()``.

    Raises:
        ValueError: there is none; the message names some that are like it.
    """
    check_type("hook", path, str, "one module path")
    modules = dict(model.named_modules())
    if path in modules and path:
        return modules[path]
    close = [name for name in modules if name.endswith(f".{path}")] if path else []
    close += [name for name in difflib.get_close_matches(path, modules, n=5, cutoff=0.5) if name not in close]
    names = ", ".join(map(repr, close[:5] or [name for name, _ in model.named_children()]))
    reject("hook", repr(path), f"a module path of {type(model).__name__}, such as {names}")


def first_output(output: Any) -> Any:
    """Return what a module's output stands for: itself, or the first of a tuple, list or mapping."""
    if isinstance(output, dict):
        output = tuple(output.values())
    return output[0] if isinstance(output, (tuple, list)) and output else output


@contextmanager
def replaced_output(model: nn.Module, hook: str, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block, let ``function(x)`` take the place of the output x of a module of ``model``.

    Of a module that returns a tuple, a list or a mapping, x is the first element, and the others stay. Every
    call of the module is replaced, so also each step of ``model.generate``. Gradients flow as through any
    other layer. Whatever happens in the block, the module is afterwards as it was.

    Args:
        model: any torch module.
        hook: a module path as in ``model.named_modules()``.
        function: takes x and returns a tensor of its shape, which is cast to x's dtype and device. It must
            not write into x, which layers may share.

    Raises:
        ValueError: no such module; inside the block, if it returns no floating tensor, or ``function`` one of
            another shape.
    """

    def replace(_module: nn.Module, _args: Any, output: Any) -> Any:
        x = first_output(output)
        if not (isinstance(x, Tensor) and x.is_floating_point()):
            got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            reject("hook", f"{hook!r}, which returns {got}", "a module that returns a floating tensor")
        new = function(x)
        if not isinstance(new, Tensor) or new.shape != x.shape:
            got = f"{list(new.shape)}" if isinstance(new, Tensor) else type(new).__name__
            reject("function", f"one that returns {got}", f"one that returns {list(x.shape)}, as its input")
        return _with_first(output, new.to(x))

    handle = find_module(model, hook).register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def _with_first(output: Any, new: Tensor) -> Any:
    """A copy of a module's output, of the same type, with ``new`` as its first element."""
    if isinstance(output, dict):
        copied = copy.copy(output)
        copied[next(iter(output))] = new
        return copied
    if isinstance(output, (tuple, list)):
        whole = [new, *output[1:]]
        return type(output)(*whole) if hasattr(output, "_fields") else type(output)(whole)
    return new
