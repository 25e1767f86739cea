"""Whole training steps as contestants: ours, dense torch's, and those of the libraries people use now.

A library is imported from its own package and takes its own recommended step: its loss, optimizer, decoder
constraint and first-batch initialisation. What depends on the length of a run is set alike for all: warm-up
over 5 % of the steps, decay over the last 20 % where a library leaves the choice, a latent is dead after 1/28
of the tokens. Given a sample, inputs are normalised as the library recommends.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial, wraps
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as nnf
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR

from fastsae import SAE, AuxK, SAEConfig, TopK
from fastsae.benchmarks.cases import Shape
from fastsae.benchmarks.measure import now
from fastsae.checks import FastSAEError, check_choice, check_number
from fastsae.optim import RowAdam
from fastsae.training import train_step

__all__ = ["LONG", "TRAINERS", "Run", "Trainer", "Unavailable", "build", "check", "dense", "phases"]

AUXK = 1 / 8
"""Coefficient of AuxK in our step: the demo's."""
LONG = 10_000
"""Steps of the run that a timed step pretends to be of: so many that nothing is dead in it."""
CHECK_STEPS = 8
"""Steps in which a contestant must have learnt something."""


class Unavailable(FastSAEError):
    """A contestant whose package isn't installed, or can't be imported here."""


@dataclass
class Trainer:
    """A dictionary in training.

    Args:
        step: takes one training step on raw x [N, D], whether or not gradients are enabled around it.
        encode: raw x [n, D] to the dense code [n, M], in inference mode.
        reconstruct: raw x to raw x_hat, in inference mode.
        optimizer: whose ``step()`` the step calls; None where backward and update are one.
        note: version, loss, optimizer, normalisation.
    """

    step: Callable[[Tensor], Any]
    encode: Callable[[Tensor], Tensor]
    reconstruct: Callable[[Tensor], Tensor]
    optimizer: Any = None
    note: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        self.step = torch.enable_grad()(self.step)
        self.encode, self.reconstruct = (torch.no_grad()(f) for f in (self.encode, self.reconstruct))


@dataclass(frozen=True)
class Run:
    """Steps in all; the learning rate and raw activations [n, D] from which normalisation is estimated, None
    for the library's defaults."""

    steps: int
    lr: float | None = None
    sample: Tensor | None = None

    @property
    def warmup(self) -> int:
        """Steps over which the learning rate rises."""
        return max(1, round(0.05 * self.steps))

    @property
    def decay(self) -> int:
        """Steps, at the end, over which it falls."""
        return max(1, round(0.2 * self.steps))

    def share(self, done: int) -> float:
        """What the learning rate is multiplied by after ``done`` steps, as in fastsae.training.Trainer."""
        return max(0.0, min(1.0, (done + 1) / self.warmup, (self.steps - done) / self.decay))

    def dead_after(self, batch: int) -> int:
        """Tokens without firing that make a latent dead."""
        return max(1, self.steps * batch // 28)

    def lr_for(self, latents: int, base: float = 2e-4) -> float:
        """The learning rate; by default by the rule of Gao et al. 2024, arXiv 2406.04093."""
        return base / (latents / 2**14) ** 0.5 if self.lr is None else self.lr


def build(
    name: str, shape: Shape, device: str = "cpu", *, steps: int, lr: float | None = None,
    sample: Tensor | None = None, seed: int = 0,
) -> Trainer:  # fmt: skip
    """Make the contestant ``name`` of TRAINERS for a run of ``steps`` batches; see :class:`Run`.

    Raises:
        Unavailable: its package isn't installed, or can't be imported.
        ValueError: an unknown name, or fewer than 10 steps, too few for a schedule.
    """
    check_choice("name", name, TRAINERS)
    check_number("steps", steps, integer=True, low=10)
    torch.manual_seed(seed)
    trainer = TRAINERS[name](shape, device, Run(steps, lr, None if sample is None else sample.to(device)))
    trainer.name = name
    return trainer


def _fastsae(s: Shape, device: str, run: Run, weights: str = "float32", states: str = "float32") -> Trainer:
    auxk = AuxK(AUXK, dead_after=run.dead_after(s.N))
    config = SAEConfig(s.D, s.M, TopK(s.k), losses=(auxk,), normalization="scalar")
    sae = SAE(config, device=device, weight_format=weights)
    if run.sample is not None:
        sae.calibrate_(run.sample)
    opt = RowAdam(sae, run.lr_for(s.M), state_dtype=states)
    schedule = LambdaLR(opt, run.share)

    def step(x: Tensor) -> None:
        train_step(sae, opt, x)
        schedule.step()

    def up_to_date(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        opt.flush_()  # idle rows too, as SAE.save writes them
        return call(x)

    note = f"TopK + AuxK {AUXK:g}, RowAdam, E||x||^2 = D, {weights}/{states}"
    return Trainer(step, partial(up_to_date, sae.encode), partial(up_to_date, sae), note=note)


def dense(
    s: Shape, device: str, run: Run, compiled: bool = False, weights: Sequence[Tensor] | None = None
) -> Trainer:
    """A TopK dictionary as one writes it in torch: autograd over [N, M], torch.topk, a dense Adam.

    ``weights``: W_enc, b_enc, W_dec, b_dec, trained in place; None: new ones.
    """
    if weights is None:
        rows = nnf.normalize(torch.randn(s.M, s.D, device=device), dim=1)
        weights = rows.clone(), rows.new_zeros(s.M), rows, rows.new_zeros(s.D)
    W_enc, b_enc, W_dec, b_dec = (t.requires_grad_() for t in weights)
    adam = Adam([W_enc, b_enc, W_dec, b_dec], run.lr_for(s.M), fused=True)
    schedule, scale = LambdaLR(adam, run.share), torch.zeros_like(b_dec[0])

    def encode(x: Tensor) -> Tensor:
        values, indices = nnf.linear(x - b_dec, W_enc, b_enc).topk(s.k)
        return values.new_zeros(len(x), s.M).scatter(1, indices, values.relu())

    def loss(x: Tensor) -> Tensor:
        error = torch.addmm(b_dec, encode(x), W_dec) - x
        return error.square().sum() / (x - x.mean(0)).square().sum()

    @torch.no_grad()
    def calibrate(x: Tensor) -> None:
        scale.copy_((s.D / x.square().sum(1).mean()).sqrt())
        b_dec.copy_(scale * x.mean(0))

    if run.sample is not None:
        calibrate(run.sample)
    first, minimised = count(int(run.sample is not None)), torch.compile(loss) if compiled else loss

    def step(x: Tensor) -> None:
        if not next(first):
            calibrate(x)
        minimised(scale * x).backward()
        with torch.no_grad():
            W_dec.grad -= W_dec * (W_dec.grad * W_dec).sum(1, keepdim=True)
        adam.step()
        adam.zero_grad()
        schedule.step()
        with torch.no_grad():
            W_dec.copy_(nnf.normalize(W_dec, dim=1))

    note = "TopK, autograd, Adam(fused=True), E||x||^2 = D" + compiled * "; the first step compiles the loss"
    return Trainer(
        step,
        lambda x: encode(scale * x),
        lambda x: torch.addmm(b_dec, encode(scale * x), W_dec) / scale,
        adam,
        note,
    )


def _sparsify(s: Shape, device: str, run: Run, kind: str = "signum") -> Trainer:
    """What a hook in its Trainer.fit does on each batch: the trainer itself needs a language model."""
    with mock.patch.dict("os.environ", {} if device == "cuda" else {"SPARSIFY_DISABLE_TRITON": "1"}):
        found, lib, signs, free = _load("eai-sparsify", "sparsify", "sparsify.sign_sgd", "schedulefree")
    coder = lib.SparseCoder(s.D, lib.SparseCoderConfig(num_latents=s.M, k=s.k), device, torch.float32)
    schedule, averages = None, kind == "signum"
    if averages:
        sgd = signs.SignSGD(coder.parameters(), run.lr_for(s.M, 5e-3))
        optimizer = free.ScheduleFreeWrapper(sgd, momentum=0.95)
        optimizer.train()
    else:
        optimizer = Adam(coder.parameters(), run.lr_for(s.M))
        linear = import_module("transformers").get_linear_schedule_with_warmup
        schedule = linear(optimizer, run.warmup, run.steps)
    silent, done = torch.zeros(s.M, dtype=torch.long, device=device), count()

    def step(x: Tensor) -> None:
        if not next(done):
            coder.b_dec.data = x.mean(0)
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x, total_variance=(x - x.mean(0)).pow(2).sum())
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
        silent.add_(len(x))
        silent[out.latent_indices.flatten()] = 0

    def inference(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if averages:  # what it saves
            optimizer.eval()
        result = call(x)
        if averages:
            optimizer.train()
        return result

    def encode(x: Tensor) -> Tensor:
        code = coder.encode(x)
        return torch.zeros_like(code.pre_acts).scatter_(1, code.top_indices, code.top_acts)

    how = "signum under schedulefree" if averages else "torch.optim.Adam, linear decay"
    note = f"eai-sparsify {found}: FVU, no AuxK (its default), {how}, raw inputs"
    reconstruct = partial(inference, lambda x: coder(x).sae_out)
    return Trainer(step, partial(inference, encode), reconstruct, optimizer, note)


def _sae_lens(s: Shape, device: str, run: Run) -> Trainer:
    found, lib, training = _load("sae-lens", "sae_lens", "sae_lens.training.sae_trainer")
    config = lib.TopKTrainingSAEConfig(d_in=s.D, d_sae=s.M, k=s.k, device=device)
    config.normalize_activations = "none" if run.sample is None else "expected_average_only_in"
    sae, lr = lib.TopKTrainingSAE(config), run.lr or 3e-4
    schedule = training.SAETrainerConfig(
        total_training_samples=run.steps * s.N, train_batch_size_samples=s.N, device=device, lr=lr,
        lr_end=lr / 10, lr_warm_up_steps=run.warmup, lr_decay_steps=run.decay,
        dead_feature_window=max(1, run.steps // 28),
    )  # fmt: skip
    trainer = training.SAETrainer(schedule, sae, iter(()))
    scaler = trainer.activation_scaler
    if run.sample is not None:
        with redirect_stderr(io.StringIO()):  # a progress bar
            scaler.estimate_scaling_factor(s.D, iter([run.sample]), 1)

    def step(x: Tensor) -> None:
        trainer.maybe_reset_sparsity()
        trainer.step(x)
        trainer.n_training_steps += 1

    inputs = f"normalize_activations {config.normalize_activations!r}"
    return Trainer(
        step,
        lambda x: sae.encode(scaler(x)),
        lambda x: scaler.unscale(sae(scaler(x))),
        trainer.optimizer,
        f"sae-lens {found}: MSE + AuxK, Adam, clipped, {inputs}, use_sparse_activations off (its default)",
    )


def _dictionary_learning(s: Shape, device: str, run: Run) -> Trainer:
    modules = ("nnsight", "dictionary_learning.trainers.top_k", "dictionary_learning.training")
    found, nnsight, top_k, training = _load("dictionary-learning", *modules)
    nnsight.DEFAULT_PATCHER.__exit__(None, None, None)  # it changes torch and breaks torch.compile for others
    trainer = top_k.TopKTrainer(
        steps=run.steps, activation_dim=s.D, dict_size=s.M, k=s.k, layer=0, lm_name="", lr=run.lr,
        warmup_steps=run.warmup, decay_start=run.steps - run.decay, device=device,
    )  # fmt: skip
    trainer.dead_feature_threshold = run.dead_after(s.N)
    norm, done = 1.0, count()
    if run.sample is not None:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            norm = training.get_norm_factor([run.sample], steps=1)
    inputs, ae = "raw inputs" if run.sample is None else "E||x||^2 = 1", trainer.ae
    return Trainer(
        lambda x: trainer.update(next(done), x / norm),
        lambda x: ae.encode(x / norm),
        lambda x: norm * ae(x / norm),
        trainer.optimizer,
        f"dictionary-learning {found}: MSE + AuxK 1/32, Adam, clipped, {inputs}",
    )


def _overcomplete(s: Shape, device: str, run: Run) -> Trainer:
    found, lib = _load("overcomplete", "overcomplete.sae")
    sae = lib.TopKSAE(s.D, s.M, top_k=s.k, device=device)
    adam = Adam(sae.parameters(), run.lr or 5e-4)
    options = {"scheduler": LambdaLR(adam, run.share), "nb_epochs": 1, "monitoring": 0, "device": device}
    return Trainer(
        lambda x: lib.train_sae(sae, [x], lambda x, x_hat, *_: (x - x_hat).square().mean(), adam, **options),
        lambda x: sae.eval().encode(x)[1],
        lambda x: sae.eval()(x)[2],
        adam,
        f"overcomplete {found}: its README's MSE and Adam, clipped, no bias, raw inputs",
    )


TRAINERS: dict[str, Callable[[Shape, str, Run], Trainer]] = {
    "fastsae": _fastsae,
    "fastsae split32/int8": partial(_fastsae, weights="split32", states="int8"),
    "dense": dense,
    "dense compiled": partial(dense, compiled=True),
    "sparsify": _sparsify,
    "sparsify adam": partial(_sparsify, kind="adam"),
    "sae_lens": _sae_lens,
    "dictionary_learning": _dictionary_learning,
    "overcomplete": _overcomplete,
}
"""How each contestant is made."""


def _load(distribution: str, *modules: str) -> tuple[Any, ...]:
    """The installed version and the named modules; what they print when imported stays off the terminal."""
    try:
        found = version(distribution)
    except PackageNotFoundError:
        raise Unavailable(f"{distribution} isn't installed (pip install -e .[peers])") from None
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return found, *map(import_module, modules)
    except Exception as error:  # whatever the import of another package may raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise Unavailable(f"{distribution} {found} can't be imported: {reason}") from error


def check(trainer: Trainer, shape: Shape, x: Tensor) -> None:
    """Raise AssertionError unless the contestant is what it says: a dictionary of ``shape`` that learns.

    Trains it for a few steps on the raw x [n, D], which must have structure, as randn(n, 16) @ mixing has.
    The first isn't counted, since it sets biases.
    """
    trainer.step(x)
    code, x_hat = trainer.encode(x), trainer.reconstruct(x)
    most = int((code != 0).sum(1).max())
    _require(code.shape == (len(x), shape.M), f"a code of shape {tuple(code.shape)}")
    _require(0 < most <= shape.k, f"{most} active latents on a token, k = {shape.k}")
    _require(x_hat.shape == x.shape, f"a reconstruction of shape {tuple(x_hat.shape)}")
    for _ in range(CHECK_STEPS):
        trainer.step(x)
    before, after = (float((y - x).double().square().sum()) for y in (x_hat, trainer.reconstruct(x)))
    _require(after < before, f"a squared error of {after:.6g} after {CHECK_STEPS} steps, {before:.6g} before")


def _require(condition: bool, found: str) -> None:
    if not condition:
        raise AssertionError(found)


def phases(trainer: Trainer, x: Tensor, device: str = "cpu", repeats: int = 3) -> dict[str, float | None]:
    """Milliseconds of the parts of a step on raw x, medians over ``repeats`` steps.

    ``forward_ms``: until the first backward; ``backward_ms``: inside Tensor.backward; ``optimizer_ms``:
    inside the optimizer's step; ``other_ms``: the rest, as clipping and projections. Ours has backward and
    update in one, ``backward_ms``, and ``optimizer_ms`` None. Every part waits for the GPU.
    """
    taken = [_parts(trainer, x, device) for _ in range(repeats)]
    result: dict[str, float | None] = {name: 1e3 * median(t[name] for t in taken) for name in taken[0]}
    return result if trainer.optimizer is not None else result | {"optimizer_ms": None}


def _parts(trainer: Trainer, x: Tensor, device: str) -> dict[str, float]:
    """Seconds of each part of one step."""
    spent, starts = {"backward_ms": 0.0, "optimizer_ms": 0.0}, []

    def timed(part: str, call: Callable) -> Callable:
        @wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            starts.append(begun := now(device))
            try:
                return call(*args, **kwargs)
            finally:
                spent[part] += now(device) - begun

        return run

    operators = torch.ops.fastsae
    boundaries = [(operators, "row_step", "backward_ms"), (operators, "row_update", "backward_ms")]
    if trainer.optimizer is not None:
        boundaries = [(Tensor, "backward", "backward_ms"), (trainer.optimizer, "step", "optimizer_ms")]
    with ExitStack() as patches:
        for owner, name, part in boundaries:
            patches.enter_context(mock.patch.object(owner, name, timed(part, getattr(owner, name))))
        start = now(device)
        trainer.step(x)
        end = now(device)
    forward = (starts or [end])[0] - start
    return {"forward_ms": forward, **spent, "other_ms": end - start - forward - sum(spent.values())}
