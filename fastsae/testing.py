"""Inputs, tolerances and assertions that tests and benchmarks share.

A result is compared with an exact one, computed in fp64 from the same rounded inputs. How far it may be off
follows from what plain PyTorch in the same dtype is off (:func:`tolerance`); none is chosen by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from html.parser import HTMLParser
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastsae import ops
from fastsae.code import SparseCode
from fastsae.policies import Activation, BatchTopK, GroupMax, TopK

__all__ = [
    "ADVERSARIAL",
    "Allocations",
    "NeverWaits",
    "Page",
    "Problem",
    "adversarial",
    "assert_close",
    "assert_encodes",
    "assert_matches",
    "assert_repeatable",
    "assert_same",
    "assert_same_code",
    "assert_selected",
    "assert_unchanged",
    "code_at",
    "decode_at",
    "everything",
    "poisoned_empty",
    "pre_acts",
    "problem",
    "random_code",
    "tolerance",
]

Formula = Callable[..., Tensor]


class Problem(NamedTuple):
    """One set of operands: x [N, D], W_enc [M, D], b_enc [M], W_dec [M, d_out], b_dec [d_out]."""

    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor

    def to(self, *args, **kwargs) -> Problem:
        """Every operand moved or cast as by :meth:`torch.Tensor.to`."""
        return Problem(*(t.to(*args, **kwargs) for t in self))

    @property
    def encoder(self) -> tuple[Tensor, Tensor, Tensor]:
        """x, W_enc, b_enc."""
        return self[:3]


def problem(
    n: int, d: int, m: int, *, d_out: int | None = None, integers: bool = False, seed: int = 0
) -> Problem:
    """Draw operands for N tokens, width D and M latents in fp32, always the same for a seed.

    ``integers`` draws from -2..2: every sum is then exact in any order (in half precision too while D < 64),
    and ties are ties in every implementation.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        if integers:
            return torch.randint(-2, 3, shape, generator=generator).float()
        return torch.randn(shape, generator=generator) * scale

    d_out = d if d_out is None else d_out
    return Problem(
        x=draw(n, d),
        W_enc=draw(m, d, scale=d**-0.5),
        b_enc=draw(m, scale=0.1),
        W_dec=draw(m, d_out, scale=d_out**-0.5),
        b_dec=draw(d_out, scale=0.1),
    )


def random_code(n: int, m: int, *, spare: int = 0, seed: int = 0) -> SparseCode:
    """Draw a ragged fp32 code: rows from empty to full, some values 0, ``spare`` of rubbish last."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, min(m, 40) + 1, (n,), generator=generator)
    counts[::5] = 0
    counts[1:2] = m
    rows = [torch.randperm(m, generator=generator)[: int(count)].sort().values for count in counts]
    indices = torch.cat([*rows, torch.full((spare,), 2**30)]).int()
    values = torch.rand(indices.shape, generator=generator)
    values[::7] = 0.0
    values[len(values) - spare :] = torch.nan
    return SparseCode(values, indices, torch.cat([counts.new_zeros(1), counts.cumsum(0)]), m)


def adversarial(name: str, n: int, d: int, m: int, k: int, *, seed: int = 0) -> Problem:
    """The inputs of :data:`ADVERSARIAL` by that name, in fp32, meant for ``k`` entries a token.

    Their scores are exact in any order of summation: implementations must agree on them bit by bit.
    """
    return ADVERSARIAL[name](problem(n, d, m, integers=True, seed=seed), k)


def _scored(pattern: Callable[[int, int], Tensor]) -> Callable[[Problem, int], Problem]:
    """Every token gives latent m the score pattern(M, k)[m]."""

    def build(p: Problem, k: int) -> Problem:
        p.x.zero_()[:, 0] = 1
        p.W_enc[:, 0] = pattern(len(p.W_enc), k)
        p.b_enc.zero_()
        return p

    return build


def _duplicated(p: Problem, k: int) -> Problem:
    half = len(p.b_enc) // 2
    p.W_enc[half : 2 * half], p.b_enc[half : 2 * half] = p.W_enc[:half], p.b_enc[:half]
    return p


def _nan(p: Problem, k: int) -> Problem:
    p.x[:1] = torch.nan
    p.b_enc[len(p.b_enc) // 2] = torch.nan
    return p


def _inf(p: Problem, k: int) -> Problem:
    p.x[:1, 0] = torch.inf  # times 0 is NaN: this token's scores are +Inf, -Inf and NaN
    p.b_enc[-1] = torch.inf
    p.b_enc[0] = -torch.inf
    return p


def _mostly_minus_inf(p: Problem, k: int) -> Problem:
    p.b_enc[: len(p.b_enc) - k // 2] = -torch.inf
    return p


def _hot(p: Problem, k: int) -> Problem:
    p.b_enc[len(p.b_enc) // 3] = 128
    return p


ADVERSARIAL: dict[str, Callable[[Problem, int], Problem]] = {
    "equal": _scored(lambda m, k: torch.ones(m)),
    "zero": _scored(lambda m, k: torch.zeros(m)),
    "all negative": _scored(lambda m, k: -1.0 - torch.arange(m) % 7),
    "fewer than k positive": _scored(lambda m, k: torch.where(torch.arange(m) < m - k // 2, -1.0, 1.0)),
    "one giant, a flat tail": _scored(lambda m, k: torch.where(torch.arange(m) == m - 1, 1024.0, 1.0)),
    "ascending": _scored(lambda m, k: torch.arange(m) + 1.0),
    "descending": _scored(lambda m, k: m - 1.0 * torch.arange(m)),
    "near-ties": _scored(lambda m, k: 1 + (torch.arange(m) * 7919 % 4096) / 2**20),
    "duplicated latents": _duplicated,
    "NaN": _nan,
    "Inf": _inf,
    "mostly -Inf": _mostly_minus_inf,
    "a latent that always fires": _hot,
    "non-contiguous x": lambda p, k: p._replace(x=p.x.repeat_interleave(2, dim=1)[:, ::2]),
}
"""Inputs that break selections, by name: see :func:`adversarial`."""


# Plain formulas, differentiable, in the dtype of what they are given.


def pre_acts(x: Tensor, W_enc: Tensor, b_enc: Tensor | None = None) -> Tensor:
    """pre[n, m] = <x[n], W_enc[m]> + b_enc[m], dense."""
    scores = x @ W_enc.T
    return scores if b_enc is None else scores + b_enc


def code_at(code: SparseCode, x: Tensor, W_enc: Tensor, b_enc: Tensor | None = None) -> Tensor:
    """What the stored entries of ``code`` ought to be worth, given where they are: relu(pre) there."""
    rows, indices = _places(code)
    return pre_acts(x, W_enc, b_enc)[rows, indices].relu()


def decode_at(code: SparseCode, values: Tensor, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """The decode of ``values`` [capacity] at the places of ``code``, through the dense code."""
    rows, indices = _places(code)
    dense = values.new_zeros(code.n_tokens, code.n_latents).index_put((rows, indices), values[: len(rows)])
    x_hat = dense @ W_dec
    return x_hat if b_dec is None else x_hat + b_dec


def _places(code: SparseCode) -> tuple[Tensor, Tensor]:
    stored = int(code.offsets[-1])
    return code.rows()[:stored], code.indices[:stored].long()


# Assertions raise AssertionError with the numbers, under `python -O` too.


def tolerance(eager: Tensor, exact: Tensor) -> float:
    """How far from ``exact`` (fp64) a result in the dtype of ``eager``, plain PyTorch's answer, may be:

        2 * (max|eager - exact| + eps(eager.dtype) * max|exact|)    over the finite places of exact

    Raises ValueError where eager overflowed and exact didn't: such inputs can't judge anybody.
    """
    finite = exact.isfinite()
    if not finite.any():
        return 0.0
    error = (eager.double() - exact)[finite].abs().max().item()
    if not math.isfinite(error):
        raise ValueError(
            f"eager: got NaN or Inf in {eager.dtype} where exact is finite, expected smaller inputs"
        )
    return 2 * (error + torch.finfo(eager.dtype).eps * exact[finite].abs().max().item())


def assert_close(actual: Tensor, eager: Tensor, exact: Tensor, name: str = "result") -> None:
    """Assert ``exact`` within tolerance, NaN and Inf exactly where it has them, in the dtype of ``eager``."""
    _require(actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(exact.shape)}")
    _require(actual.dtype == eager.dtype, f"{name}: {actual.dtype}, not {eager.dtype}")
    finite = exact.isfinite()
    odd, expected = actual.double()[~finite], exact[~finite]
    _require(_equal(odd, expected), f"{name}: got {odd.tolist()[:8]}, not {expected.tolist()[:8]}")
    if not finite.any():
        return
    allowed = tolerance(eager, exact)
    error = (actual.double() - exact).abs().masked_fill(~finite, 0).nan_to_num(torch.inf, torch.inf).flatten()
    worst = int(error.argmax())
    place = [int(i) for i in torch.unravel_index(torch.tensor(worst), exact.shape)]
    _require(
        error[worst].item() <= allowed,
        f"{name}: off by {error[worst]:.3g} at {place}, allowed {allowed:.3g}; "
        f"got {actual.flatten()[worst]:.6g}, exact {exact.flatten()[worst]:.6g}",
    )


def assert_matches(
    kernel: Formula, formula: Formula, inputs: dict[str, Tensor], upstream: Tensor | None = None
) -> None:
    """Compare ``kernel(**inputs)`` and its gradient by every input with ``formula``, by :func:`assert_close`.

    ``formula`` runs in the dtype of the inputs and, exactly, in fp64. ``upstream`` is random unless given.
    """
    out = formula(**inputs).detach()
    if upstream is None:
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    exact_inputs = {name: t.double() for name, t in inputs.items()}
    results = (
        _differentiate(kernel, inputs, upstream),
        _differentiate(formula, inputs, upstream),
        _differentiate(formula, exact_inputs, upstream.double()),
    )
    for name, actual, eager, exact in zip(("result", *map("grad_{}".format, inputs)), *results, strict=True):
        assert_close(actual, eager, exact, name)


def _differentiate(formula: Formula, inputs: dict[str, Tensor], upstream: Tensor) -> list[Tensor]:
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    out = formula(**leaves)
    grads = torch.autograd.grad(out, list(leaves.values()), upstream, materialize_grads=True)
    return [out.detach(), *(g.to_dense() if g.is_sparse else g for g in grads)]


def assert_selected(places: Tensor, scores: Tensor, allowed: float) -> int:
    """Assert that ``places`` [R, k] are each row's k largest of ``scores`` [R, C] (exact and finite).

    They must be distinct, in range, and none below the row's k-th largest by more than ``allowed``. Where the
    next one is further below than that, this decides the very set; returns how many rows were so decided.
    """
    r, k = places.shape
    if k == 0 or r == 0:
        return 0
    last = scores.shape[1] - 1
    _require(bool(((places >= 0) & (places <= last)).all()), f"places outside 0..{last}")
    _require(not (places.sort(1).values.diff(dim=1) == 0).any(), "a place is selected twice in a row")
    best = scores.sort(dim=1, descending=True).values
    short = (best[:, k - 1 : k] - scores.gather(1, places)).max().item()
    _require(short <= allowed, f"selected a score {short:.3g} below the k-th largest, allowed {allowed:.3g}")
    if k > last:
        return r
    return int((best[:, k - 1] - best[:, k] > allowed).sum())


def assert_encodes(
    code: SparseCode, x: Tensor, W_enc: Tensor, b_enc: Tensor | None, activation: Activation,
    threshold: Tensor | float | None = None,
) -> int:  # fmt: skip
    """Assert that ``code`` is what :func:`fastsae.functional.encode` promises for finite inputs x [N, D].

    Scores are summed in fp32 or better, so the selection is judged by eager fp32, the values by eager in
    their own dtype. Returns how many rows (BatchTopK: batches; thresholds: scores) were decided.
    """
    exact, wide = (
        pre_acts(x.to(dtype), W_enc.to(dtype), None if b_enc is None else b_enc.to(dtype))
        for dtype in (torch.float64, torch.promote_types(x.dtype, torch.float32))
    )
    allowed = tolerance(wide, exact)
    (n, m), (rows, indices) = exact.shape, _places(code)
    _require(bool(((indices >= 0) & (indices < m)).all()), f"indices outside 0..{m - 1}")
    values = code.values[: len(rows)]
    assert_close(values, code_at(code, x, W_enc, b_enc), exact[rows, indices].relu(), "values")

    if isinstance(activation, TopK):
        k = min(activation.k, m)
        _require(bool((code.offsets == torch.arange(n + 1) * k).all()), f"not {k} entries a token")
        _require(not (values.view(n, k).diff(dim=1) > 0).any(), "values don't descend within a token")
        return assert_selected(indices.view(n, k), exact, allowed)
    _require(not (indices.diff()[rows.diff() == 0] <= 0).any(), "indices don't ascend within a token")
    if isinstance(activation, GroupMax):
        k, size = activation.k, m // activation.k
        _require(len(rows) == n * k, f"{len(rows)} entries, not {n * k}")
        groups = indices.view(n, k) // size
        _require(bool((groups == torch.arange(k)).all()), "not an entry of each group")
        return assert_selected((indices % size).view(n * k, 1), exact.view(n * k, size), allowed)
    if isinstance(activation, BatchTopK) and threshold is None:
        keep = n * min(activation.k, m)
        _require(len(rows) == keep, f"{len(rows)} entries, not {keep}")
        return assert_selected((rows * m + indices)[None], exact.view(1, -1), allowed)
    if threshold is None:
        threshold = getattr(activation, "threshold", 0.0)
    above = exact - torch.as_tensor(threshold, dtype=exact.dtype, device=exact.device)
    chosen = torch.zeros_like(exact, dtype=torch.bool)
    chosen[rows, indices] = True
    decided = above.abs() > allowed
    wrong = int(((chosen != (above > 0)) & decided).sum())
    _require(wrong == 0, f"{wrong} scores on the wrong side of the threshold")
    return int(decided.sum())


def assert_same_code(code: SparseCode, expected: SparseCode) -> None:
    """Assert equal offsets, indices and values; NaN equals NaN, and the dtypes of values may differ."""
    _require(_equal(code.offsets, expected.offsets), "offsets differ")
    stored = int(expected.offsets[-1])
    for name in ("indices", "values"):
        got, want = (getattr(c, name)[:stored].double() for c in (code, expected))
        _require(_equal(got, want), f"{name} differ: {got.tolist()[:12]}, not {want.tolist()[:12]}")


def assert_same(actual: Tensor, expected: Tensor, name: str = "result") -> None:
    """Assert the same shape, dtype and bits."""
    for what in ("shape", "dtype"):
        a, b = getattr(actual, what), getattr(expected, what)
        _require(a == b, f"{name}: {what} {a}, not {b}")
    a, b = (t.detach().contiguous().flatten().view(torch.uint8) for t in (actual, expected))
    _require(torch.equal(a, b), f"{name}: {int((a != b).sum())} bytes differ")


def everything(sae: Any, optimizer: Any = None) -> dict[str, Any]:
    """Copies of all that a training step may change, by name."""
    leaves = {name: t.clone() for name, t in sae.state_dict().items()}
    if optimizer is not None:
        for i, leaf in enumerate(tree_leaves(optimizer.state_dict())):
            leaves[f"optimizer {i}"] = leaf.clone() if isinstance(leaf, Tensor) else leaf
    return leaves


def assert_unchanged(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Assert that two results of :func:`everything` have the same names, numbers and bits."""
    _require(now.keys() == before.keys(), f"{sorted(now.keys() ^ before.keys())} are in one only")
    for name, t in now.items():
        if isinstance(t, Tensor):
            assert_same(t, before[name], name)
        else:
            _require(t == before[name], f"{name}: {t}, not {before[name]}")


class Page(HTMLParser):
    """A page's tags with their attributes, and its visible text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open = "", list[str]()
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def assert_repeatable(run: Callable[[], Iterable[Tensor]]) -> None:
    """Assert that two calls of ``run`` give the same bits."""
    for i, (first, second) in enumerate(zip(run(), run(), strict=True)):
        assert_same(second, first, f"result {i} of the second run")


# Instruments.


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill what torch.empty and its kin return with NaN, or the lowest integer: a place that an operator
    forgets to write then shows."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args, **kwargs) -> Tensor:
            t = make(*args, **kwargs)
            with torch.no_grad():
                return t.fill_(_rubbish(t.dtype))

        return made

    makers: list[tuple[Any, str]] = [(torch, name) for name in ("empty", "empty_like", "empty_strided")]
    makers += [(Tensor, name) for name in ("new_empty", "new_empty_strided")]
    with ExitStack() as stack:
        for home, name in makers:
            stack.enter_context(mock.patch.object(home, name, poisoned(getattr(home, name))))
        yield


def _rubbish(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point:
        return torch.nan
    return True if dtype == torch.bool else torch.iinfo(dtype).min


class Allocations(TorchDispatchMode):
    """While active, remember the largest tensor, in elements, that any operation made; views don't count.

    Looks inside this package's operators, not inside PyTorch's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.made_by = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, op = func.name().partition("::")
        if namespace == "fastsae":
            with self:
                return ops.implementation(op, args[-1])(*args[:-1])
        given = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and _storage(t) not in given and t.numel() > self.largest:
                self.largest, self.made_by = t.numel(), func.name()
        return out


class NeverWaits(TorchDispatchMode):
    """While active, an operation that would make the host wait for a GPU's results raises AssertionError.

    So do tensors made of Python numbers, which are copied from memory that a CUDA graph can't read again.
    Looks inside this package's operators, not inside PyTorch's.
    """

    WAITS = frozenset({
        "_local_scalar_dense", "_unique2", "bincount", "equal", "is_nonzero", "item", "lift_fresh",
        "masked_select", "nonzero", "unique_consecutive", "unique_dim",
    })  # fmt: skip

    def __enter__(self):
        def tolist(t: Tensor) -> None:  # of a tensor on a CPU it passes no dispatcher
            _require(False, "Tensor.tolist makes the host wait")

        self._patch = mock.patch.object(Tensor, "tolist", tolist)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *exception):
        self._patch.stop()
        return super().__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, op = func.name().partition("::")
        if namespace == "fastsae":
            return self._inside(ops.implementation(op, args[-1]), args[:-1])
        op = op.partition(".")[0]
        counted = op == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        places = args[1] if op in ("index", "index_put", "index_put_") else ()
        masked = any(isinstance(i, Tensor) and i.dtype == torch.bool for i in places)
        _require(not (op in self.WAITS or counted or masked), f"{func.name()} makes the host wait")
        return func(*args, **(kwargs or {}))

    def _inside(self, implementation: Callable, args: tuple) -> Any:
        super().__enter__()
        try:
            return implementation(*args)
        finally:
            super().__exit__(None, None, None)


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata if t.layout == torch.strided else id(t)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
