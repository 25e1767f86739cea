"""The module: parameters, encode, decode, forward, and the training loss of a dictionary."""

from __future__ import annotations

import dataclasses
import os
import weakref
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsae import functional as F
from fastsae import losses
from fastsae.backends import Backend, resolve
from fastsae.checks import check_choice, check_type, reject
from fastsae.code import SparseCode
from fastsae.config import SAEConfig
from fastsae.counted import Counted
from fastsae.files import open_dictionary, write_dictionary
from fastsae.formats import WEIGHT_FORMATS
from fastsae.initial import INITIAL_ROWS, geometric_median, initial_rows
from fastsae.nested import first_parts
from fastsae.normalised import Normalised
from fastsae.ops import upcast, wide_dtype
from fastsae.policies import (
    L0,
    L1,
    AuxK,
    DecoderNormL1,
    Gated,
    JumpReLU,
    Nested,
    PreActivation,
    Tanh,
)
from fastsae.shards import Rows
from fastsae.weights import Weights

__all__ = ["SAE", "TrainingOutput", "load"]


class TrainingOutput(NamedTuple):
    """What a training forward gives: raw x_hat, its code, and the loss in normalised space."""

    x_hat: Tensor
    code: SparseCode
    loss: Tensor
    losses: dict[str, Tensor]


class Encoded(NamedTuple):
    """What encoding gives: the code, and what W_enc multiplied.

    active: JumpReLU while thresholds learn: see :func:`fastsae.functional.jump`.
    gates: of Gated, the code of pi.
    """

    code: SparseCode
    x: Tensor
    active: Tensor | None = None
    gates: SparseCode | None = None


class SAE(Normalised, Counted, Weights):
    """A sparse autoencoder (or transcoder, with a target) of ``config.n_latents`` features.

        code  = activation((normalise(x) - b_dec) W_enc^T + b_enc)      b_dec only if subtract_b_dec
        x_hat = denormalise(sum_i f_i W_dec[i] + b_dec)                 and a skip transcoder's skip

    A drop-in module: any leading shape in, the same out; inputs are raw, normalisation is inside. Decoder
    rows start as random directions (length 1, or 0.1 where the rows aren't kept at unit length), W_enc =
    W_dec, biases 0. A transcoder's W_dec starts at 0 (at random directions if kept at length 1).

    Attributes:
        W_enc, b_enc, W_dec, b_dec: [M, d_in], [M], [M, d_out], [d_out]; one row per latent.
        log_threshold: [M], at least fp32; JumpReLU: log theta. ``threshold`` is then its exponential.
        r_mag, b_mag: [M]; Gated: log scale and bias of magnitudes, beside the gates' b_enc.
        W_skip: [d_out, d_in]; of a skip transcoder, which adds normalised x W_skip^T; starts at 0.
        weight_format: how W_enc and W_dec are held. "float32": in ``dtype``. "split32": as bf16 planes, which
            is what is multiplied, beside int16 buffers W_enc_remainder and W_dec_remainder that make each
            weight an exact fp32 number for the optimizer. "bfloat16": in bf16, where RowAdam rounds
            stochastically. In the latter two biases are fp32, and any floating input is taken.
        dtype: of the inputs that training casts to.
        threshold: fp32 0-dim buffer of BatchTopK, -1 while unset.
        norm_scale: fp32 buffer of normalisation by a number, 0-dim, of a crosscoder [n_sites]; -1 while
            unset.
        tokens_seen: int64 0-dim buffer: tokens seen in training.
        silent_tokens: int32 [M] buffer: how many of them since each latent last fired, at most 2^31 - 1.
        backend: which backend runs the operators (see :mod:`fastsae.backends`).
        sparse_grad: give W_enc and W_dec row-sparse COO gradients.
    """

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    threshold: Tensor
    silent_tokens: Tensor
    tokens_seen: Tensor

    def __init__(
        self,
        config: SAEConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        weight_format: str = "float32",
        sparse_grad: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        check_type("config", config, SAEConfig, "an SAEConfig")
        check_type("dtype", dtype, torch.dtype, "a torch dtype")
        if dtype not in F.DTYPES:
            reject("dtype", dtype, "float32, bfloat16, float16 or float64")
        check_choice("weight_format", weight_format, WEIGHT_FORMATS)
        if weight_format != "float32" and dtype == torch.float64:
            reject("dtype", dtype, f"float32, bfloat16 or float16 with weight_format {weight_format!r}")
        resolve(backend)
        self.config, self.weight_format, self._dtype = config, weight_format, dtype
        self.sparse_grad, self.backend = sparse_grad, backend
        self._optimizer: weakref.ref | None = None
        m = config.n_latents
        matrix, bias = (dtype, dtype) if weight_format == "float32" else (torch.bfloat16, torch.float32)
        self.W_enc = nn.Parameter(torch.empty(m, config.d_in, device=device, dtype=matrix))
        self.b_enc = nn.Parameter(torch.empty(m, device=device, dtype=bias))
        self.W_dec = nn.Parameter(torch.empty(m, config.d_out, device=device, dtype=matrix))
        self.b_dec = nn.Parameter(torch.empty(config.d_out, device=device, dtype=bias))
        if weight_format == "split32":
            for name, width in (("W_enc", config.d_in), ("W_dec", config.d_out)):
                rest = torch.empty(m, width, device=device, dtype=torch.int16)
                self.register_buffer(f"{name}_remainder", rest)
        if config.activation.rule == "batchtopk":
            self.register_buffer("threshold", torch.empty((), device=device))
        elif isinstance(config.activation, JumpReLU):
            self.log_threshold = nn.Parameter(torch.empty(m, device=device, dtype=wide_dtype(self.b_enc)))
        elif isinstance(config.activation, Gated):
            self.r_mag = nn.Parameter(torch.empty(m, device=device, dtype=bias))
            self.b_mag = nn.Parameter(torch.empty(m, device=device, dtype=bias))
        if config.skip:
            self.W_skip = nn.Parameter(torch.empty(config.d_out, config.d_in, device=device, dtype=bias))
        if self.scales_inputs:
            shape = (config.n_sites,) if config.n_sites > 1 else ()
            self.register_buffer("norm_scale", torch.empty(shape, device=device))
        self.register_buffer("silent_tokens", torch.empty(m, dtype=torch.int32, device=device))
        self.register_buffer("tokens_seen", torch.empty((), dtype=torch.int64, device=device))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, seed: int | None = None) -> None:
        """Draw new initial weights from ``seed`` (None: of torch's global generator); forget all counts.

        A block of rows at a time, each from a generator of its own, without a second copy of any matrix. Of a
        dictionary built on "meta" and moved by ``to_empty`` this makes a new one.
        """
        if self.W_enc.is_meta:
            return
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        for name, tensor in self.state_dict().items():
            if name not in ("W_enc", "W_dec"):
                tensor.zero_()
        if self.config.activation.rule == "batchtopk":
            self.threshold.fill_(-1)
        if isinstance(self.config.activation, JumpReLU):
            self.log_threshold.fill_(self.config.activation.threshold).log_()
        if self.scales_inputs:
            self.unset_norm_scale_()
        for lo in range(0, self.config.n_latents, INITIAL_ROWS):
            hi = min(lo + INITIAL_ROWS, self.config.n_latents)
            enc, dec = initial_rows(self.config, lo, hi, seed, self.W_enc.device)
            self.put_rows_("W_enc", lo, enc)
            self.put_rows_("W_dec", lo, dec)

    def extra_repr(self) -> str:
        c = self.config
        return f"d_in={c.d_in}, n_latents={c.n_latents}, d_out={c.d_out}, activation={c.activation}"

    def __getattr__(self, name: str) -> Any:
        if name == "threshold" and "log_threshold" in self._parameters:
            return self.log_threshold.detach().exp()
        return super().__getattr__(name)

    @property
    def dtype(self) -> torch.dtype:
        return self.W_enc.dtype if self.weight_format == "float32" else self._dtype

    def _apply(self, fn, recurse=True):
        # thresholds and the normalisation scalar stay fp32 when the module is cast, and all weights that are
        # in a format of their own; then only the dtype of inputs changes
        kept = [self._buffers.get(name) for name in ("threshold", "norm_scale")]
        log_threshold = self._parameters.get("log_threshold")
        if self.weight_format != "float32":
            kept += self._parameters.values()
            self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype

        def move(t: Tensor) -> Tensor:
            moved = fn(t)
            if t is log_threshold and moved.dtype != wide_dtype(moved):
                return t.to(moved.device, wide_dtype(moved))
            stays = moved.dtype != t.dtype and any(t is other for other in kept)
            return t.to(moved.device) if stays else moved

        return super()._apply(move, recurse)

    def encode_sparse(self, x: Tensor) -> SparseCode:
        """The sparse code of raw inputs [..., d_in].

        BatchTopK uses its threshold in ``eval()`` (the batch's own rule while unset), the batch in
        ``train()``. In ``train()`` a JumpReLU code also holds, at 0, the entries through which thresholds
        learn.
        """
        return self.encode_normalised(*self.normalise(x)).code

    def encode_normalised(
        self, x: Tensor, mean: Tensor | None, scale: Tensor | None, *, whole: bool = False
    ) -> Encoded:
        """The sparse code of what :meth:`normalise` gave; ``whole``: all entries that the loss looks at."""
        encoder_input = self.encoder_input(x)
        rule, threshold = self.selection(whole)
        code = F.encode(encoder_input, self.W_enc, self.b_enc, rule, threshold=threshold, **self._options())
        code.mean, code.scale = mean, scale
        return self.activate(code, encoder_input)

    def encoder_input(self, x: Tensor) -> Tensor:
        """What W_enc multiplies, of normalised x."""
        return (x - self.b_dec).to(x.dtype) if self.config.subtract_b_dec else x

    def activate(self, code: SparseCode, encoder_input: Tensor) -> Encoded:
        """What the activation makes of the operator's code."""
        if (bandwidth := self.band()) is not None:
            code, active = F.jump(code, self.log_threshold, bandwidth)
            return Encoded(code, encoder_input, active=active)
        if isinstance(self.config.activation, Gated):
            return Encoded(F.gated(code, self.b_enc, self.r_mag, self.b_mag), encoder_input, gates=code)
        return Encoded(code, encoder_input)

    def selection(self, whole: bool = False) -> tuple[Any, Tensor | None]:
        """The activation that the encode operator runs now, and what it compares with.

        BatchTopK's threshold only in ``eval()`` and once set; JumpReLU's always, less half a bandwidth where
        thresholds learn.
        """
        activation = self.config.activation.selection(whole and self.training)
        if isinstance(activation, JumpReLU):
            theta = self.log_threshold.detach().exp()
            return activation, theta - (self.band() or 0) / 2
        if activation.rule == "batchtopk" and not self.training and self.threshold >= 0:
            return activation, self.threshold
        return activation, None

    def band(self) -> float | None:
        """JumpReLU's bandwidth where codes carry what thresholds learn by: in ``train()``, unless frozen."""
        activation = self.config.activation
        if isinstance(activation, JumpReLU) and self.training and self.log_threshold.requires_grad:
            return activation.bandwidth
        return None

    def encode(self, x: Tensor) -> Tensor:
        """The dense code [..., n_latents] of raw inputs [..., d_in]; see :meth:`encode_sparse`."""
        return self.encode_sparse(x).to_dense()

    def decode(self, code: SparseCode | Tensor) -> Tensor:
        """Raw reconstructions [..., d_out] of a SparseCode or of a dense code [..., n_latents].

        Of a skip transcoder without the skip, which needs x: :meth:`forward` adds it.
        """
        if isinstance(code, SparseCode):
            return self._restore(F.decode(code, self.W_dec, self.b_dec, **self._options()), code)
        F.check_input("code", code, self.W_dec, self.config.n_latents)
        if self.config.normalization == "layer_norm":
            reject(
                "code",
                "a dense tensor",
                "a SparseCode, which carries the mean and scale that layer_norm removed",
            )
        return self._restore((code @ self.W_dec.to(code.dtype) + self.b_dec).to(code.dtype), None)

    def forward(
        self, x: Tensor, target: Tensor | None = None, return_loss: bool = False
    ) -> Tensor | TrainingOutput:
        """x_hat [..., d_out] of raw inputs; with ``return_loss``, what :meth:`training_forward` returns."""
        if return_loss:
            return self.training_forward(x, target)
        return self.reconstruct(x)[0]

    def reconstruct(self, x: Tensor) -> tuple[Tensor, SparseCode]:
        """x_hat [..., d_out] of raw inputs, and the code it is made of."""
        normalised = self.normalise(x)
        code = self.encode_normalised(*normalised).code
        return self._restore(self._reconstruct(code, normalised[0]), code), code

    def _reconstruct(self, code: SparseCode, x: Tensor) -> Tensor:
        """x_hat in normalised space, with the skip of normalised x."""
        x_hat = F.decode(code, self.W_dec, self.b_dec, **self._options())
        return x_hat + self.skip(x) if self.config.skip else x_hat

    def skip(self, x: Tensor) -> Tensor:
        """x W_skip^T, of normalised x."""
        return nn.functional.linear(x, self.W_skip.to(x.dtype))

    def training_forward(self, x: Tensor, target: Tensor | None = None) -> TrainingOutput:
        """Reconstruct ``target`` (x where None) and compute the loss of ``config`` in normalised space, in
        fp32.

            loss = reconstruction + sum of config.losses;  the terms by name in ``losses``, coefficients
            included

        Where the loss is taken at several partial reconstructions, ``reconstruction`` is their weighted sum.
        AuxK works on the latents that were dead before this batch. In ``train()`` mode also counts which
        latents fired and moves BatchTopK's threshold. A scalar of the normalisation that is still unset is
        estimated from ``x`` (see :meth:`calibrate_`, which takes a better sample).
        """
        self.check_batch(x, target)
        if self.training:
            self.estimate_norm_scale_(x)
        normalised = self.normalise(x)
        found = self.encode_normalised(*normalised, whole=True)
        x_hat = self._reconstruct(found.code, normalised[0])
        goal = self.normalise_target(target, *normalised).reshape(-1, self.config.d_out)
        main = self.main_part(found.code)
        main_hat = x_hat if main is found.code else self._reconstruct(main, normalised[0])
        dead, short = self.dead_mask(), self.short_mask()
        if self.training:
            self.count_firing_(main)
        terms = self._terms(found, x_hat.reshape(goal.shape), main_hat.reshape(goal.shape), goal, dead, short)
        return TrainingOutput(
            self._restore(main_hat, main), main, torch.stack([*terms.values()]).sum(), terms
        )

    def _terms(
        self,
        found: Encoded,
        x_hat: Tensor,
        main_hat: Tensor,
        goal: Tensor,
        dead: Tensor,
        short: Tensor | None,
    ) -> dict[str, Tensor]:
        """Every term of the loss by name, in the order of ``config.losses``.

        x_hat, main_hat: the decode of all entries, and of those that :meth:`decode` would see.
        dead, short: the latents that AuxK, and PreActivation, is about before this batch.
        """
        config, options, terms = self.config, self._options(), {}
        scale = losses.error_scale(goal, config.reconstruction)
        if (nested := self._nested()) is None:
            terms["reconstruction"] = losses.reconstruction(x_hat, goal, config.reconstruction)
        else:
            error = upcast(x_hat) - upcast(goal)
            terms["reconstruction"] = losses.nested_reconstruction(
                found.code, self.W_dec, error, nested, scale, **options
            )
        if found.gates is not None and isinstance(config.activation, Gated):
            frozen = F.decode(found.gates, self.W_dec.detach(), self.b_dec.detach(), backend=self.backend)
            missed = upcast(frozen.reshape(goal.shape)) - upcast(goal)
            if config.skip:
                missed = missed + upcast(self.skip(found.x.detach()).detach()).reshape(goal.shape)
            terms["gated_aux"] = config.activation.aux_coefficient * scale * missed.square().sum()
        x = found.x.reshape(-1, config.d_in)
        for term in config.losses:
            if isinstance(term, AuxK):
                missed = upcast(goal) - upcast(main_hat.detach())
                weights = self.W_enc, self.b_enc, self.W_dec
                terms[term.name] = losses.auxk(
                    missed, x, dead.nonzero().flatten(), *weights, term, scale, **options
                )
            elif isinstance(term, L1 | DecoderNormL1 | Tanh):
                charged = found.code if found.gates is None else found.gates
                terms[term.name] = losses.sparsity(term, charged, self.W_dec, config.n_sites)
            elif isinstance(term, PreActivation):
                missing = losses.pre_activation(
                    x, self.W_enc, self.b_enc, self.log_threshold.exp(),
                    losses.row_norms(self.W_dec, config.n_sites), short,
                )  # fmt: skip
                terms[term.name] = term.coefficient * missing
            else:
                counted = found.code.values > 0 if found.active is None else found.active
                l0 = counted.sum() / max(found.code.n_tokens, 1)
                terms[term.name] = term.coefficient * (
                    l0 if isinstance(term, L0) else (l0 / term.target - 1).square()
                )
        return terms

    def _nested(self) -> Nested | None:
        return self.config.activation.nested(self.config.n_latents)

    def main_part(self, code: SparseCode) -> SparseCode:
        """Of a code with all entries that the loss looks at, those that :meth:`decode` is to see."""
        nested = self._nested()
        if nested is None or nested.main == len(nested.ends) - 1:
            return code
        kept = first_parts(code.indices, code.offsets, nested)
        k = nested.ends[nested.main]
        offsets = torch.arange(code.n_tokens + 1, device=code.offsets.device) * k
        return SparseCode(
            code.values[kept], code.indices[kept], offsets, code.n_latents, code.leading, per_token=k,
            mean=code.mean, scale=code.scale,
        )  # fmt: skip

    def check_batch(self, x: Tensor, target: Tensor | None) -> None:
        """Raise unless ``x`` can be encoded and ``target`` be what its reconstruction is compared with."""
        F.check_input("x", x, self.W_enc)
        if target is None:
            if self.config.transcoder:
                reject("target", None, f"a tensor [..., {self.config.d_out}], as for any transcoder")
            return
        F.check_input("target", target, self.W_dec)
        if target.shape[:-1] != x.shape[:-1]:
            reject("target", f"shape {tuple(target.shape)}", f"{(*x.shape[:-1], self.config.d_out)}, as x")

    @torch.no_grad()
    def calibrate_(self, x: Tensor) -> SAE:
        """Set what is estimated from data once, before training, from a sample ``x`` [n, d_in].

        norm_scale, as ``config.normalization`` says. With ``subtract_b_dec``: b_dec = the geometric median of
        the normalised sample (Weiszfeld's iteration).
        """
        F.check_input("x", x, self.W_enc)
        flat = x.reshape(-1, x.shape[-1])
        if not flat.numel() or not flat.isfinite().all():
            reject("x", "a sample that is empty or holds NaN or Inf", "finite activations [n, d_in]")
        self.estimate_norm_scale_(flat, again=True)
        if self.config.subtract_b_dec:
            self.b_dec.copy_(geometric_median(upcast(self.normalise(flat)[0])))
        return self

    @torch.no_grad()
    def fold_(self) -> SAE:
        """Move the scale of inputs into the weights, so that ``normalization="none"`` gives the same numbers.

            W_enc' = s W_enc;  W_dec' = W_dec / s;  b_dec' = b_dec / s;  codes and thresholds stay

        Decoder rows are then no longer of length 1, and penalties on f ||W_dec|| mean something else: a
        folded dictionary is for use. Rows that a RowAdam over it has yet to bring up to date are brought up
        first.

        Raises:
            ValueError: the scale isn't set; "layer_norm", which depends on the token.
        """
        if self.config.normalization == "layer_norm":
            reject(
                "normalization", "'layer_norm'", "one that multiplies inputs by a number: it can't be folded"
            )
        if not self.scales_inputs:
            return self
        into, out = (self._scale(d).double() for d in (self.config.d_in, self.config.d_out))
        if (optimizer := None if self._optimizer is None else self._optimizer()) is not None:
            optimizer.flush_()
        for lo in range(0, self.config.n_latents, INITIAL_ROWS):
            for name, factor in (("W_enc", into), ("W_dec", 1 / out)):
                rows = self.full_precision(name, lo, lo + INITIAL_ROWS)
                self.put_rows_(name, lo, (rows * factor).to(rows.dtype))
        self.b_dec.copy_(self.b_dec / out)
        if self.config.skip:
            self.W_skip.copy_(self.W_skip * into / out.expand(self.config.d_out)[:, None])
        del self.norm_scale
        self.config = dataclasses.replace(self.config, normalization="none", unit_norm_decoder=False)
        return self

    @torch.no_grad()
    def as_jump_relu(self) -> SAE:
        """A BatchTopK dictionary as the JumpReLU one that it is at inference; the weights are shared.

        Every latent's threshold is the one that training found, to rounding (log and exponential). Loss terms
        are left out.

        Raises:
            ValueError: another activation; no threshold found yet.
        """
        if self.config.activation.rule != "batchtopk":
            reject("activation", self.config.activation, "BatchTopK, or Matryoshka over it")
        if self.threshold < 0:
            reject("threshold", "none yet", "a training step first")
        jump = JumpReLU(threshold=float(self.threshold))
        config = dataclasses.replace(self.config, activation=jump, losses=())
        found = SAE(
            config,
            device="meta",
            dtype=self.dtype,
            weight_format=self.weight_format,
            backend=self.backend,
        )
        state = dict(self.state_dict())
        logs = state.pop("threshold").log().to(wide_dtype(self.b_enc)).expand(config.n_latents)
        found.load_state_dict(state | {"log_threshold": logs.clone()}, assign=True)
        return found.train(self.training)

    def save(self, directory: str | os.PathLike) -> None:
        """Write the dictionary to a folder, in place of the one that may be there, a block of rows at a time.

        config.json and model.safetensors; above 5 GiB shards and model.safetensors.index.json instead of the
        latter. Whatever fails or crashes, the old dictionary or the new one is there, whole. split32 is
        written as the fp32 numbers it stands for.

        Rows that a deferred :class:`fastsae.optim.RowAdam` over this module has yet to bring up to date are
        written up to date; the module itself stays as it is.
        """
        tensors = {n: Rows.of(t) for n, t in self.state_dict().items() if not n.endswith("_remainder")}
        optimizer = None if self._optimizer is None else self._optimizer()
        for name, param in self.named_parameters():
            whole = torch.float32 if self.remainder(param) is not None else param.dtype
            read = partial(self._stored, name) if optimizer is None else partial(optimizer.flushed, param)
            tensors[name] = Rows(tuple(param.shape), whole, read)
        write_dictionary(Path(directory), self.config, tensors, self.weight_format)

    def export_from(self, optimizer: Any) -> None:
        """Let :meth:`save` write weights as ``optimizer.flushed(param)`` gives them (RowAdam calls this)."""
        self._optimizer = weakref.ref(optimizer)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_optimizer": None}  # a copy has no optimizer

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        weight_format: str | None = None,
    ) -> SAE:
        """Read what :meth:`save` wrote, in ``dtype`` and ``weight_format`` (the file's where None).

        A block of rows at a time: no memory but the dictionary's own is taken.

        Raises:
            ValueError: no such files; a truncated or foreign file; missing, extra, misshapen or mistyped
                tensors; NaN or Inf.
        """
        config, stored, tensors = open_dictionary(Path(directory))
        # buffers have dtypes of their own; of the parameters only a format can give W_enc and W_dec others
        shared = tensors.rows("b_dec").dtype if "b_dec" in tensors.pieces else torch.float32
        shared = shared if stored == "float32" and shared in F.DTYPES else torch.float32
        held = cls(config, device="meta", dtype=shared, weight_format=stored)
        state = held.state_dict()
        matrices = {"W_enc", "W_dec"}
        expected = {
            name: (tuple(t.shape), torch.float32 if stored == "split32" and name in matrices else t.dtype)
            for name, t in state.items()
            if not name.endswith("_remainder")
        }
        tensors.check(expected)
        wanted = stored if weight_format is None else weight_format
        sae = cls(config, device="meta", dtype=shared if dtype is None else dtype, weight_format=wanted)
        sae.to_empty(device="cpu" if device is None else device)
        for name in tensors.pieces:
            if name in matrices:
                for lo, rows in tensors.blocks(name):
                    sae.put_rows_(name, lo, rows)
            else:
                tensors.copy_into(name, getattr(sae, name).detach())
        return sae

    def _options(self) -> dict:
        return {"sparse_grad": self.sparse_grad, "backend": self.backend}


def load(
    path: str | os.PathLike,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    weight_format: str | None = None,
) -> SAE:
    """Load a dictionary from a folder that :meth:`SAE.save` or a training run wrote."""
    return SAE.load(path, device=device, dtype=dtype, weight_format=weight_format)
