"""Public functions on tensors: check the arguments, choose a backend, run the differentiable operator."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from fastsae.autograd import Decode, Encode, Jump, Step
from fastsae.backends import Backend, resolve
from fastsae.checks import check_type, reject
from fastsae.code import SparseCode
from fastsae.ops import upcast, wide_dtype
from fastsae.policies import Activation, BatchTopK, Gated, JumpReLU

__all__ = ["decode", "encode", "gated", "jump"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    activation: Activation,
    *,
    threshold: Tensor | float | None = None,
    subset: Tensor | None = None,
    sparse_grad: bool = False,
    backend: Backend = "auto",
) -> SparseCode:
    """Score every latent and keep those that the activation's rule selects.

        pre[n, m] = <x[n], W_enc[m]> + b_enc[m];   f = relu(pre) at the selected m, 0 elsewhere

    TopK: the k largest of each token. BatchTopK: the N * k largest of the batch; with a scalar ``threshold``,
    all pre > threshold. GroupMax: the largest of each of k groups. JumpReLU: pre > threshold[m]. ReLU: pre >
    0. Ties go to the lowest index; a pre-activation of NaN ranks as +Inf and stays NaN. Never holds [N, M]
    (except ``reference``). Scores are summed in fp32. MultiTopK, HierarchicalTopK and Matryoshka select as
    after training.

    Args:
        x: [..., d_in]. Differentiable.
        W_enc: [M, d_in], contiguous, in x's dtype (or in bf16: fp32 tokens are then read as they are on a
            CPU, and rounded for a GPU's GEMM) and on its device. Differentiable.
        b_enc: [M] or None, in either dtype. Differentiable.
        activation: any of :mod:`fastsae.policies` but Gated, which has weights of its own (:func:`gated`).
        threshold: [M] for JumpReLU (its ``threshold`` where None); a scalar for BatchTopK; else None. No
            gradient, which :func:`jump` gives. Below 0 it lets entries pass that hold 0.
        subset: [S] int64, ascending: choose among these latents only (k becomes min(k, S)); not of GroupMax.
        sparse_grad: give W_enc a row-sparse COO gradient, as ``nn.Embedding(sparse=True)`` does.
        backend: see :mod:`fastsae.backends`.

    Returns:
        SparseCode over M latents in x's dtype. TopK: min(k, M) entries a token, largest first; where
        fewer are positive the rest hold 0 and get no gradient. Others: indices ascend within a token, of
        GroupMax k of them.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that don't fit; k > M; an unusable backend.

    Source: Gao et al. 2024, arXiv 2406.04093.
    """
    check_type("activation", activation, get_args(Activation), "one of fastsae.policies, such as TopK(32)")
    if isinstance(activation, Gated):
        reject("activation", activation, "ReLU() for its gate, then functional.gated")
    activation = activation.selection(training=False)
    x, W_enc, b_enc = _autocast(x, W_enc, b_enc)
    _check_weights("W_enc", W_enc, "b_enc", b_enc, W_enc.shape[:1] if isinstance(W_enc, Tensor) else None)
    check_input("x", x, W_enc)
    m = W_enc.shape[0]
    k = getattr(activation, "k", 0)
    if k > m:
        reject("k", k, f"an integer in 1..{m} (rows of W_enc)")
    rule, threshold = selection(activation, threshold, W_enc)
    if rule == "groupmax" and m % k:
        reject("k", k, f"a divisor of {m} (rows of W_enc)")
    if subset is not None:
        if rule == "groupmax":
            reject("subset", "latents", "None with GroupMax, whose groups are of all latents")
        check_subset(subset, W_enc)
        threshold = threshold[subset] if threshold is not None and threshold.ndim else threshold
        k = min(k, len(subset))
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    values, indices, offsets = Encode.apply(
        flat, W_enc, b_enc, threshold, subset, rule, k, resolve(backend, flat), sparse_grad
    )
    return SparseCode(
        values,
        indices,
        offsets,
        m,
        tuple(x.shape[:-1]),
        per_token=k if rule in ("topk", "groupmax") else None,
    )


def jump(code: SparseCode, log_threshold: Tensor, bandwidth: float) -> tuple[SparseCode, Tensor]:
    """JumpReLU on what passed the lower edge of its band, with a straight-through gradient for thresholds.

        f = pre * 1[pre > theta_m],   theta = exp(log_threshold)
        grad_pre = grad_f * 1[pre > theta_m];   grad_theta_m = -(theta_m / bandwidth) * sum grad_f in the band

    the band being |pre - theta_m| < bandwidth / 2. Entries below their threshold stay, at 0.

    Args:
        code: of :func:`encode` with JumpReLU and ``threshold = theta - bandwidth / 2``. Differentiable.
        log_threshold: [M]. Differentiable.
        bandwidth: width of the band.

    Returns:
        The code; and 1[f > 0] [capacity], whose gradient by theta is -1 / bandwidth in the band, for
        penalties on the number of active latents.

    Source: Rajamanoharan et al. 2024, arXiv 2407.14435, eq. 9-12.
    """
    stored, latents = _entries(code)
    theta = log_threshold.exp()[latents]
    values = torch.where(stored, code.values, 0)
    active = torch.where(stored, Step.apply(values, theta, bandwidth), 0)
    return code.with_values(torch.where(stored, Jump.apply(values, theta, bandwidth), 0)), active


def gated(code: SparseCode, b_enc: Tensor, r_mag: Tensor, b_mag: Tensor) -> SparseCode:
    """The magnitudes behind open gates.

        f = relu(exp(r_mag[m]) * (pi - b_enc[m]) + b_mag[m]),   pi = <x, W_enc[m]> + b_enc[m] > 0

    Args:
        code: of :func:`encode` with ReLU: the gates' pi. Differentiable.
        b_enc, r_mag, b_mag: [M]. Differentiable.

    Source: Rajamanoharan et al. 2024, arXiv 2404.16014, eq. 7.
    """
    stored, m = _entries(code)
    pi = torch.where(stored, upcast(code.values), 0)
    magnitude = upcast(r_mag).exp()[m] * (pi - upcast(b_enc)[m]) + upcast(b_mag)[m]
    return code.with_values(torch.where(stored, magnitude.relu(), 0).to(code.values.dtype))


def _entries(code: SparseCode) -> tuple[Tensor, Tensor]:
    """Which places of a code hold entries, [capacity] bool; their latents, 0 elsewhere, int64."""
    stored = code.rows() < code.n_tokens
    return stored, torch.where(stored, code.indices, 0).long()


def decode(
    code: SparseCode,
    W_dec: Tensor,
    b_dec: Tensor | None = None,
    *,
    sparse_grad: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Reconstruct tokens from their active latents.

        x_hat[n] = sum_j values[j] * W_dec[indices[j]] + b_dec    over the entries j of token n

    Reads nnz rows of ``W_dec`` and never forms the dense [N, M] code. Sums in fp32, then rounds.

    Args:
        code: activations of N tokens over M latents; values differentiable.
        W_dec: [M, d_out], contiguous, in the code's dtype or in bf16. Differentiable.
        b_dec: [d_out] or None, in either dtype. Differentiable.
        sparse_grad: give W_dec a row-sparse COO gradient.
        backend: see :mod:`fastsae.backends`.

    Returns:
        [*leading, d_out] in the dtype of the code.

    Raises:
        ValueError: an index outside [0, M), or shapes, dtypes or devices that don't fit.

    Source: Gao et al. 2024, arXiv 2406.04093, eq. 1.
    """
    check_type("code", code, SparseCode, "a SparseCode")
    values, W_dec, b_dec = _autocast(code.values, W_dec, b_dec)
    _check_weights("W_dec", W_dec, "b_dec", b_dec, W_dec.shape[1:] if isinstance(W_dec, Tensor) else None)
    if code.n_latents != W_dec.shape[0]:
        reject("code", f"a code over {code.n_latents} latents", f"{W_dec.shape[0]}, the rows of W_dec")
    if values.device != W_dec.device or not _fits(values.dtype, W_dec):
        reject("code", f"{values.dtype} on {values.device}", f"{W_dec.dtype} on {W_dec.device}, as W_dec")
    # elsewhere the check would make the host wait, and a graph has no values to check
    if code.indices.device.type == "cpu" and not torch.compiler.is_compiling():
        check_indices(code)
    chosen = resolve(backend, W_dec)
    x_hat = Decode.apply(values, code.indices, code.offsets, W_dec, b_dec, chosen, sparse_grad)
    return x_hat.view(*code.leading, W_dec.shape[1])


def check_input(name: str, x: Tensor, weight: Tensor, width: int | None = None) -> None:
    """Raise unless ``x`` is [..., width] on the device of ``weight`` [M, width], in a dtype that fits it."""
    check_type(name, x, Tensor, "a tensor")
    width = weight.shape[1] if width is None else width
    if x.ndim == 0 or x.shape[-1] != width:
        reject(name, f"shape {tuple(x.shape)}", f"[..., {width}]")
    if not _fits(x.dtype, weight) and not (_casts(weight.device.type) and x.is_floating_point()):
        reject(name, x.dtype, f"{weight.dtype}, the weights' dtype")
    if x.device != weight.device:
        reject(name, f"a tensor on {x.device}", f"one on {weight.device}, where the weights are")


def check_subset(subset: Tensor, weight: Tensor) -> None:
    """Raise unless ``subset`` [S] holds ascending rows of ``weight``, which is looked at on a CPU only."""
    check_type("subset", subset, Tensor, "a tensor of latents")
    if subset.dtype != torch.int64 or subset.ndim != 1:
        reject("subset", f"{subset.dtype} {tuple(subset.shape)}", "torch.int64 [S]")
    if subset.device != weight.device:
        reject("subset", f"a tensor on {subset.device}", f"one on {weight.device}, where the weights are")
    if subset.device.type != "cpu" or torch.compiler.is_compiling() or not len(subset):
        return
    if subset[0] < 0 or subset[-1] >= len(weight) or (subset.diff() <= 0).any():
        low, high = (int(t) for t in subset.aminmax())
        reject("subset", f"latents in {low}..{high}", f"ascending latents in 0..{len(weight) - 1}")


def check_indices(code: SparseCode) -> None:
    """Raise unless offsets ascend from 0 to at most the capacity and indices lie in [0, n_latents)."""
    capacity = len(code.indices)
    if code.offsets[0] != 0 or code.offsets[-1] > capacity or (code.offsets.diff() < 0).any():
        reject("code.offsets", code.offsets.tolist()[:8], f"offsets ascending from 0 to at most {capacity}")
    stored = code.indices[: int(code.offsets[-1])]
    if len(stored):
        low, high = (int(t) for t in stored.aminmax())
        if low < 0 or high >= code.n_latents:
            reject("code.indices", f"values in {low}..{high}", f"values in 0..{code.n_latents - 1}")


def selection(
    activation: Activation, threshold: Tensor | float | None, W: Tensor
) -> tuple[str, Tensor | None]:
    """The operator's rule and its threshold for ``W`` [M, D]: [M] or scalar, in fp32 (fp64 of fp64)."""
    m, dtype = W.shape[0], wide_dtype(W)
    if threshold is None:
        if activation.rule != "threshold":
            return activation.rule, None
        return "threshold", torch.tensor(getattr(activation, "threshold", 0.0), dtype=dtype, device=W.device)
    check_type("threshold", threshold, (Tensor, int, float), "a tensor or a number")
    threshold = torch.as_tensor(threshold, dtype=dtype, device=W.device)
    shape = () if isinstance(activation, BatchTopK) else (m,) if isinstance(activation, JumpReLU) else None
    if threshold.shape != shape:
        expected = "None" if shape is None else "a scalar" if shape == () else f"[{m}]"
        reject("threshold", f"shape {tuple(threshold.shape)}", f"{expected} for {type(activation).__name__}")
    return "threshold", threshold


def _check_weights(name: str, W: Tensor, bias_name: str, b: Tensor | None, bias_shape) -> None:
    check_type(name, W, Tensor, "a tensor")
    if W.ndim != 2 or not W.is_contiguous():
        reject(
            name, f"shape {tuple(W.shape)}, contiguous={W.is_contiguous()}", "a contiguous [n_latents, width]"
        )
    if W.dtype not in DTYPES:
        reject(name, W.dtype, "float32, bfloat16, float16 or float64")
    if b is not None:
        check_type(bias_name, b, Tensor, "a tensor or None")
        if b.shape != bias_shape or not _fits(b.dtype, W) or b.device != W.device:
            got = f"{tuple(b.shape)} {b.dtype} on {b.device}"
            reject(bias_name, got, f"{tuple(bias_shape)} {W.dtype} on {W.device}, as {name}")


def _fits(dtype: torch.dtype, W: Tensor) -> bool:
    """Whether ``dtype`` may stand beside the weight: its own, or over a bf16 weight also fp32 and fp16."""
    return dtype == W.dtype or (W.dtype == torch.bfloat16 and dtype in (torch.float32, torch.float16))


def _autocast(*tensors: Tensor | None) -> Any:
    kinds = {t.device.type for t in tensors if isinstance(t, Tensor)}
    if len(kinds) != 1 or not _casts(kind := kinds.pop()):
        return tensors
    dtype = torch.get_autocast_dtype(kind)

    def cast(t: Tensor | None) -> Tensor | None:
        # fp64 stays, as under torch's own autocast
        if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64:
            return t.to(dtype)
        return t

    return tuple(map(cast, tensors))


def _casts(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)
