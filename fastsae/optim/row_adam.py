"""RowAdam: Adam whose work is proportional to the rows a batch touched."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from fastsae.backends import Backend, resolve
from fastsae.checks import check_choice, check_number, check_type, reject
from fastsae.formats import STATE_DTYPES, join, new_state
from fastsae.ops import wide_dtype
from fastsae.sae import SAE

__all__ = ["RowAdam"]

BLOCK_ELEMENTS = 2**18
"""Weights updated at a time: the block, its gradient and its moments stay in a CPU's caches."""

GRAPH_STEPS = 2**20
"""Steps for which a coast table on a GPU has room, 8 MiB: replays of a CUDA graph can't make it longer."""

_STATE = ("exp_avg", "exp_avg_sq", "last_step", "exp_avg_scale", "exp_avg_sq_scale")
"""What is kept of a parameter, in the order of operators; the scales only of codes."""

_EPSILON = 1e-8  # terms of the coast below this share of the first are left out


class _Plain:
    """torch.optim.Optimizer's methods without a wrapper that imports torch._dynamo when one is first called:
    170 MiB and seconds, for a tracer to pass them by."""

    add_param_group, state_dict, load_state_dict = (
        inspect.unwrap(getattr(torch.optim.Optimizer, name))
        for name in ("add_param_group", "state_dict", "load_state_dict")
    )


class RowAdam(torch.optim.Optimizer):
    """Adam over the rows of [M, D] parameters, in one of three modes.

    ``dense``: torch.optim.Adam's result; every row moves at every step.

    ``lazy``: rows move only when touched, as under torch.optim.SparseAdam. A latent that fires with
    probability p then learns about 1 / sqrt(p) more slowly than under dense Adam.

    ``deferred``: a touched row first makes up, in closed form, for the steps it missed, then takes its step.
    With m, v as they were at its last touch t, and T the steps done since then:

        w -= C m / (sqrt v + eps sqrt(1 - b2^t));   m *= b1^(T-t);   v *= b2^(T-t)
        C = sum_{u = t+1..T} lr_u r^(u-t) sqrt(1 - b2^u) / (1 - b1^u),   r = b1 / sqrt b2

    which is where dense Adam with zero gradients would have taken it, whatever the learning-rate schedule, as
    long as sqrt v stays well above eps (where b1 > sqrt b2 it may sink to it; the sum ends there).
    Until then the row is read up to C m / sqrt v stale; :meth:`flush_` brings all rows up to date.

    Args:
        params: an :class:`fastsae.SAE`; or what torch's optimizers take, where parameters of two dimensions
            are updated by rows (a group may say otherwise with ``row_sparse``) and all others as one.
        lr, betas, eps: as in torch.optim.Adam. ``lr`` may be changed by torch's schedulers.
        mode: "dense", "lazy" or "deferred".
        state_dtype: how the moments of [M, D] parameters are held, see :mod:`fastsae.formats`: "float32",
            "bfloat16", "int8", or "int8_row" (one second moment for a row): 8, 4, 2 or 1 bytes a weight.
            Those of all other parameters stay fp32.
        backend: which backend updates (see :mod:`fastsae.backends`); of an SAE "auto" takes its own.
        seed: of the stochastic rounding of bf16 weights and narrow moments, which is a function of (seed,
            parameter, step, row, column): a resumed run rounds as an uninterrupted one.
        host_states: keep the moments that are by rows in (pinned) host memory: a GPU then holds weights
            alone. The kernel that updates a row reads its moments over the bus and writes them back; its
            programs keep both directions busy, so a copy ahead of it could hide no more than the time of
            the encode. Not for "dense".

    bf16 parameters are rounded stochastically; of a split32 :class:`fastsae.SAE` all bits are updated.

    Gradients are read from ``.grad``, dense or row-sparse COO, by :meth:`step`; a row is touched if any entry
    of its gradient isn't 0. :func:`fastsae.training.train_step` feeds rows directly, without gradient
    tensors. Steps are counted for a group, where torch.optim.Adam counts each parameter's own.

    Source: Kingma & Ba 2015, arXiv 1412.6980; the coast by summing its update with zero gradients.
    """

    def __init__(
        self,
        params: SAE | Iterable,
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        mode: str = "deferred",
        state_dtype: str = "float32",
        backend: Backend = "auto",
        seed: int = 0,
        host_states: bool = False,
    ) -> None:
        resolve(backend)
        self.backend = params.backend if backend == "auto" and isinstance(params, SAE) else backend
        self._sae = params if isinstance(params, SAE) else None
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "mode": mode,
            "state_dtype": state_dtype,
            "seed": seed,
            "host_states": host_states,
            "row_sparse": None,
            "unit_norm": False,
        }
        _check_group(defaults)
        self._most_steps = 0  # at least the steps of any group: what the host knows without asking
        super().__init__(_groups(params), defaults | {"steps": 0, "coast": None})
        if isinstance(params, SAE):
            params.export_from(self)

    def add_param_group(self, param_group: dict) -> None:
        """Add a group; what it sets for itself is checked like the arguments of the constructor."""
        _check_group(self.defaults | param_group)
        _Plain.add_param_group(self, param_group)

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """Update from every parameter's ``.grad``. Raises ValueError at a gradient with NaN or Inf."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    _check_grad(param.grad)
        self.begin_step_()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    rows, grad = _touched(param.grad, dense=not self._by_rows(param))
                    self.update_rows_(param, rows, grad)
        self.end_step_()
        return loss

    @torch.no_grad()
    def flush_(self) -> None:
        """Deferred: bring every row up to date, as dense Adam would have it. Nothing in the other modes."""
        for group in self.param_groups:
            for param in group["params"]:
                if self._owes(group, param):
                    for lo, hi in self._blocks(param):
                        self._catch_up(param, lo, *self._tensors(param, lo, hi))

    @torch.no_grad()
    def flushed(self, param: Tensor, lo: int = 0, hi: int | None = None) -> Tensor:
        """A copy of rows lo..hi of ``param`` as :meth:`flush_` would leave them, of split32 with all bits."""
        weight, remainder = self._weights(param, lo, hi)
        weight, remainder = weight.clone(), None if remainder is None else remainder.clone()
        if self._group(param)["mode"] == "deferred" and param in self.state:
            state = [t.clone() for t in self._tensors(param, lo, hi)[2]]
            self._catch_up(param, lo, weight, remainder, state)
        rows = weight if remainder is None else join(weight, remainder)
        return rows.view(-1, *param.shape[1:]) if param.ndim else rows.view(param.shape)

    @torch.no_grad()
    def reset_rows_(self, param: Tensor, rows: Tensor) -> None:
        """Forget the moments of some rows [R] int64 of ``param``, as if they had never been touched."""
        state = self._state(param)
        for name, t in state.items():
            rows_of = t if name == "last_step" else t.view(param.shape[0], -1)
            rows_of[rows.to(t.device)] = 0
        if self._group(param)["mode"] == "deferred":  # nothing is owed for the steps before
            state["last_step"][rows.to(state["last_step"].device)] = int(self._group(param)["steps"])

    def row_steps(self, param: Tensor) -> Tensor:
        """The step up to which each row of ``param`` is up to date, [M] int32."""
        return self._state(param)["last_step"]

    def state_dict(self) -> dict:
        """Every tensor of the state, and the groups; see torch.optim.Optimizer."""
        return _Plain.state_dict(self)

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore what ``state_dict()`` gave, every tensor in the dtype it was saved in.

        Copied into states that are here already, so that loading takes no more memory than they do. Raises
        ValueError at states of other shapes, before anything is changed.
        """
        params = [param for group in self.param_groups for param in group["params"]]
        groups = [self.defaults | group for group in state_dict["param_groups"] for _ in group["params"]]
        for index, state in state_dict["state"].items():
            if index < len(params):
                _check_state(index, state, params[index], self._kind(groups[index], params[index]))
        # torch would cast all states to their parameter's dtype, which ruins counters and codes
        held = self.state
        _Plain.load_state_dict(self, state_dict | {"state": {}})
        for group in self.param_groups:
            group |= self.defaults | group
        for index, state in state_dict["state"].items():
            mine = held.get(params[index], {})
            if _layout(mine) == _layout(state):
                self.state[params[index]] = mine
            for name, t in self._state(params[index]).items():
                t.copy_(state[name])
        self._most_steps = max((int(group["steps"]) for group in self.param_groups), default=0)

    def __getstate__(self) -> dict:
        # torch copies no attributes
        own = {name: getattr(self, name) for name in ("backend", "_most_steps", "_sae")}
        return super().__getstate__() | own

    def begin_step_(self, proceed: Tensor | None = None) -> None:
        """Count the step that the updates up to :meth:`end_step_` belong to.

        Where the 0-dim ``proceed`` is 0 or False, nothing is counted and those updates change nothing, which
        the host needn't know.
        """
        self._most_steps += 1
        # what row_update must know of the step under way, by the id of the group
        self._clocks: dict[int, Tensor] = {}
        for group in self.param_groups:
            if not group["params"]:
                continue
            # on the device, where a graph can count it; a number at first, and where an older state had one
            steps = torch.as_tensor(group["steps"], dtype=torch.int64, device=group["params"][0].device)
            group["steps"], (beta1, beta2) = steps, group["betas"]
            if group["coast"] is not None:
                group["coast"] = group["coast"].to(steps.device)
            go = steps.new_ones(()) if proceed is None else proceed.to(steps)
            steps += go
            t = steps.clamp_min(1).double()
            correction = (1 - beta2**t).sqrt()
            size = (group["lr"] * correction / (1 - beta1**t)).reshape(())
            self._clocks[id(group)] = torch.stack(
                [steps.double(), size, group["eps"] * correction, go.double()]
            )

    @torch.no_grad()
    def update_rows_(
        self,
        param: Tensor,
        rows: Tensor | None,
        grad: Tensor | Callable[[int, int], Tensor],
        span: tuple[int, int] | None = None,
    ) -> None:
        """Step the given rows of ``param`` (ascending int64; None: all) by their gradients [rows, ...].

        ``grad(lo, hi)`` in place of a tensor makes those of rows[lo:hi]: never more of them exist than are
        updated at a time. With ``span`` the call is about the rows lo..hi alone, of which mode "dense" moves
        every one.
        """
        dense = self._group(param)["mode"] == "dense"
        clock = self._clocks[id(self._group(param))]
        made = grad if callable(grad) else lambda lo, hi: grad[lo:hi]
        first, last = (0, param.shape[0] if param.ndim else 1) if span is None else span
        if rows is None or dense:
            for lo, hi in self._blocks(param, last - first):
                lo, hi = lo + first, hi + first
                part = made(lo - first, hi - first) if rows is None else _block_of(param, rows, made, lo, hi)
                self._update(param, clock, *self._tensors(param, lo, hi), None, part, lo)
        else:
            for lo, hi in self._blocks(param, len(rows)):
                self._update(param, clock, *self._tensors(param), rows[lo:hi], made(lo, hi))

    def end_step_(self) -> None:
        """Add this step's learning rate to what idle rows owe."""
        self._opt_called = True  # what torch's schedulers look for, that warn of an optimizer not yet stepped
        for group in self.param_groups:
            if group["mode"] == "deferred" and (clock := self._clocks.get(id(group))) is not None:
                coast, (beta1, beta2) = _room(group["coast"], clock, self._most_steps), group["betas"]
                group["coast"] = _add_coast(coast, clock, beta1, beta2, group["eps"])

    def row_arguments(self, params: Iterable[Tensor]) -> tuple[list, ...]:
        """What ``torch.ops.fastsae.row_step`` must know of three parameters, of which some may be frozen.

        Returns their states (empty for a frozen one), then ``coasts``, ``clocks``, ``betas``, ``eps``,
        ``seeds`` and ``every_row``.
        """
        found: list[tuple] = []
        for param in params:
            if not param.requires_grad:
                unused = torch.zeros(4, dtype=torch.float64, device=param.device)
                found.append(([], None, unused, (0.0, 0.0), 0.0, 0, False))
                continue
            group, state = self._group(param), self._tensors(param)[2]
            clock, dense = self._clocks[id(group)], group["mode"] == "dense"
            seed = self._seed(param)
            found.append((state, _coast_of(group), clock, group["betas"], group["eps"], seed, dense))
        states, coasts, clocks, betas, eps, seeds, every_row = map(list, zip(*found, strict=True))
        return *states, coasts, clocks, [beta for pair in betas for beta in pair], eps, seeds, every_row

    def _group(self, param: Tensor) -> dict:
        for group in self.param_groups:
            if any(p is param for p in group["params"]):
                return group
        reject("param", "a tensor of another optimizer", "a parameter of this one")

    def _by_rows(self, param: Tensor) -> bool:
        by_rows = self._group(param)["row_sparse"]
        return param.ndim == 2 if by_rows is None else by_rows

    def _owes(self, group: dict, param: Tensor) -> bool:
        if group["mode"] != "deferred" or param not in self.state:
            return False
        return bool((self.row_steps(param) < int(group["steps"])).any())

    def _kind(self, group: dict, param: Tensor) -> str:
        """How the moments of ``param`` are held: narrow only where they are many."""
        return group["state_dtype"] if param.ndim == 2 and self._by_rows(param) else "float32"

    def _seed(self, param: Tensor) -> int:
        """Of the stochastic rounding of ``param``: another one for each parameter."""
        params = [id(p) for group in self.param_groups for p in group["params"]]
        return (self._group(param)["seed"] * 0x10001 + params.index(id(param))) % 2**31

    def _state(self, param: Tensor) -> dict[str, Tensor]:
        group = self._group(param)
        state = self.state[param]
        if not state:
            if param.is_cuda and torch.cuda.is_current_stream_capturing():
                reject("opt", "no states yet, in a CUDA graph's capture", "a step taken before the capture")
            on_host = group["host_states"] and self._by_rows(param)
            state.update(_new_state(param, self._kind(group, param), on_host))
        return state

    def _blocks(self, param: Tensor, n_rows: int | None = None) -> list[tuple[int, int]]:
        n_rows = (param.shape[0] if param.ndim else 1) if n_rows is None else n_rows
        size = max(1, BLOCK_ELEMENTS // max(1, math.prod(param.shape[1:])))
        return [(lo, min(lo + size, n_rows)) for lo in range(0, n_rows, size)]

    def _tensors(
        self, param: Tensor, lo: int = 0, hi: int | None = None
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Rows lo..hi of weight, remainder and state, as row_update takes them."""
        state = self._state(param)
        n_rows = param.shape[0] if param.ndim else 1
        tensors = [state[name] for name in _STATE if name in state]
        tensors = [t if i == 2 else t.view(n_rows, -1) for i, t in enumerate(tensors)]
        return *self._weights(param, lo, hi), [t[lo:hi] for t in tensors]

    def _weights(self, param: Tensor, lo: int, hi: int | None) -> tuple[Tensor, Tensor | None]:
        remainder = None if self._sae is None else self._sae.remainder(param)
        return _as_rows(param)[lo:hi], None if remainder is None else remainder[lo:hi]

    def _catch_up(
        self, param: Tensor, first: int, weight: Tensor, remainder: Tensor | None, state: list[Tensor]
    ) -> None:
        steps = int(self._group(param)["steps"])
        behind = (state[2] < steps).nonzero().flatten()
        if len(behind):  # where all rows are, views need no gather
            clock = torch.tensor([steps, 0, 0, 1], dtype=torch.float64, device=behind.device)
            rows = None if len(behind) == len(state[2]) else behind
            self._update(param, clock, weight, remainder, state, rows, None, first)

    def _update(
        self,
        param: Tensor,
        clock: Tensor,
        weight: Tensor,
        remainder: Tensor | None,
        state: list[Tensor],
        rows: Tensor | None,
        grad: Tensor | None,
        first: int = 0,
    ) -> None:
        group = self._group(param)
        torch.ops.fastsae.row_update(
            weight,
            remainder,
            state,
            rows,
            None if grad is None else grad.reshape(grad.shape[0], -1),
            _coast_of(group),
            clock,
            *group["betas"],
            group["eps"],
            group["unit_norm"],
            self._seed(param),
            first,
            resolve(self.backend, weight),
        )


def _check_group(group: dict) -> None:
    check_number("lr", float(group["lr"]) if isinstance(group["lr"], Tensor) else group["lr"], low=0.0)
    check_type("betas", group["betas"], (tuple, list), "two numbers in [0, 1)")
    if len(group["betas"]) != 2:
        reject("betas", group["betas"], "two numbers in [0, 1)")
    for i, beta in enumerate(group["betas"]):
        check_number(f"betas[{i}]", beta, low=0.0)
        if beta >= 1:
            reject(f"betas[{i}]", beta, "a number in [0, 1)")
    check_number("eps", group["eps"], low=0.0)
    check_choice("mode", group["mode"], ("dense", "lazy", "deferred"))
    check_choice("state_dtype", group["state_dtype"], STATE_DTYPES)
    check_number("seed", group["seed"], integer=True, low=0)
    check_type("host_states", group["host_states"], bool, "True or False")
    if group["host_states"] and group["mode"] == "dense":
        reject("host_states", True, "False in mode 'dense', where every row is needed at every step")


def _groups(params: nn.Module | Iterable) -> Iterable:
    if isinstance(params, SAE):
        by_rows = {id(p) for p in (params.W_enc, params.b_enc, params.W_dec)}
        rest = [p for p in params.parameters() if id(p) not in by_rows]
        thresholds = [p for n, p in params.named_parameters() if n == "log_threshold"]
        rest = [p for p in rest if not any(p is t for t in thresholds)]
        return [
            {"params": [params.W_enc, params.b_enc], "row_sparse": True},
            {"params": [params.W_dec], "row_sparse": True, "unit_norm": params.config.unit_norm_decoder},
            {"params": rest, "row_sparse": False},
            *({"params": [t], "row_sparse": False} for t in thresholds),  # whose rate may be another
        ]
    return params.parameters() if isinstance(params, nn.Module) else params


def _coast_of(group: dict) -> Tensor | None:
    """The coast table of a deferred group; none before its second step, when no row owes anything."""
    return group["coast"] if group["mode"] == "deferred" else None


def _as_rows(param: Tensor) -> Tensor:
    """``param`` as [rows, width], cut along its first axis; a scalar as one row."""
    return param.detach().view(param.shape[0] if param.ndim else 1, -1)


def _new_state(param: Tensor, kind: str, on_host: bool = False) -> dict[str, Tensor]:
    """Moments of 0 by name: in the shape of ``param``, as torch has them, where each weight has its own."""
    made = new_state(_as_rows(param), kind, on_host)
    by_weight = [t.ndim == 2 and t.numel() == param.numel() for t in made]
    return {n: t.view(param.shape) if b else t for n, t, b in zip(_STATE, made, by_weight, strict=False)}


def _layout(state: dict[str, Tensor]) -> dict[str, tuple]:
    return {name: (t.shape, t.dtype) for name, t in state.items()}


def _check_state(index: int, state: dict[str, Tensor], param: Tensor, kind: str) -> None:
    expected = _new_state(param.detach().to("meta"), kind)
    for name in expected | state:
        got, want = (
            f"{tuple(found[name].shape)} in {found[name].dtype}" if name in found else "nothing"
            for found in (state, expected)
        )
        if got != want:
            reject("state_dict", f"{name} of parameter {index}: {got}", want)


def _block_of(param: Tensor, rows: Tensor, grad: Callable[[int, int], Tensor], lo: int, hi: int) -> Tensor:
    """The gradients of rows lo..hi, 0 for those that ``rows`` doesn't name."""
    first, last = torch.searchsorted(rows, torch.tensor([lo, hi], device=rows.device)).tolist()
    block = torch.zeros(hi - lo, *param.shape[1:], dtype=wide_dtype(param), device=param.device)
    if last > first:
        block[rows[first:last] - lo] = grad(first, last).to(block.dtype).view(-1, *param.shape[1:])
    return block


def _check_grad(grad: Tensor) -> None:
    if grad.is_sparse and grad.sparse_dim() != 1:
        reject("grad", f"a COO tensor sparse in {grad.sparse_dim()} dimensions", "one sparse by rows")
    if not (grad._values() if grad.is_sparse else grad).isfinite().all():
        reject("grad", "a gradient with NaN or Inf", "finite numbers; no parameter was changed")


def _touched(grad: Tensor, dense: bool) -> tuple[Tensor | None, Tensor]:
    """The rows a gradient touches, ascending, and their gradients; rows None where all are meant."""
    if dense:
        grad = grad.to_dense()
        return None, grad.reshape(grad.shape or 1)
    if grad.is_sparse:
        grad = grad.coalesce()
        rows, values = grad.indices()[0], grad.values()
    else:
        rows, values = torch.arange(len(grad), device=grad.device), grad
    live = values[..., None].flatten(1).ne(0).any(1).nonzero().flatten()
    return rows[live], values[live]


def _room(coast: Tensor | None, clock: Tensor, n_steps: int) -> Tensor:
    """The coast table with room for ``n_steps``: the same one if it has it."""
    if coast is None:
        coast = clock.new_zeros(0)
    least = 256 if _on_host(clock) else GRAPH_STEPS
    if len(coast) > n_steps and len(coast) >= least:
        return coast
    return torch.nn.functional.pad(coast, (0, max(least, 2 * n_steps) - len(coast)))


def _add_coast(coast: Tensor, clock: Tensor, beta1: float, beta2: float, eps: float) -> Tensor:
    """Add to coast[t], for each t before the step of ``clock``,

        lr r^(step - t) sqrt(1 - beta2^step) / (1 - beta1^step)

    Only its first step + 1 places mean something. Kept for every t, not as a window of recent learning rates:
    a row long idle moved mostly right after its last touch. Sums end where the terms have vanished, or the
    decayed sqrt v has sunk to eps, which then holds the row still.
    """
    r = beta1 / math.sqrt(beta2) if beta2 else 0.0
    reach: float = math.inf if r else 0
    if 0 < r < 1:
        reach = min(reach, math.ceil(math.log(_EPSILON) / math.log(r)))
    if r and 0 < eps < 1:
        reach = min(reach, math.ceil(2 * math.log(eps) / math.log(beta2)))
    first, last = 0, len(coast)
    if _on_host(clock):  # elsewhere all places are gone through, rather than ask for the step
        last = int(clock[0])
        first = last - int(min(reach, last))
    age = clock[0] - torch.arange(first, last, dtype=torch.float64, device=clock.device)
    owed = torch.where((age >= 1) & (age <= reach), r**age, 0)
    coast[first:last] += clock[1] * clock[3] * owed
    return coast


def _on_host(t: Tensor) -> bool:
    """Whether reading ``t`` costs the host no wait."""
    return t.device.type == "cpu"
