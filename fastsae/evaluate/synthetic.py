"""Data whose features are known, and how much of them a dictionary found."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsae.checks import BadType, check_choice, check_number, check_type, reject
from fastsae.evaluate.metrics import eval_mode, evaluate
from fastsae.sae import SAE
from fastsae.shards import Rows, StoredTensors, parse_json, write_shards

__all__ = ["Recovery", "SyntheticDictionary", "score", "write_activations"]

_BLOCK_TOKENS = 1024  # drawn from one generator
_MOST_FREQUENT = 0.9  # a feature that always fires would be an offset
_CHILD_SHARE = 0.5
_SQUARE = 13 / 12  # E[c^2] of c ~ U(0.5, 1.5)
_RECOVERED = 0.9
_FORMAT, _SUFFIX = "fastsae-synthetic/1", ".safetensors"


@dataclass(frozen=True)
class SyntheticDictionary:
    """Known features, and tokens that are sparse sums of them. All is a function of the arguments.

        x[n] = scale * sum_g c[n, g] directions[g],     c[n, g] ~ U(0.5, 1.5) where feature g fires, else 0

    with ``scale`` such that E||x||^2 = d_in: in closed form, or for correlated features with one integral for
    each pair by quadrature, to fp64. Tokens are independent.

    Which features fire. Features without a parent (without ``hierarchy``, all) fire by a Gaussian copula, so
    their frequencies hold exactly whatever the correlation:

        z[n, r] = sqrt(correlation) u[n, r // group_size] + sqrt(1 - correlation) e[n, r],    u, e ~ N(0, 1)
        r fires on token n iff z[n, r] < Phi^-1(p[r])

    With ``hierarchy`` h, features come in families of 1 + h in a row, a parent (its number a multiple of 1 +
    h) before its children. A child fires only where its parent does, and there on half of the tokens,
    independently of all else: p[child] = p[parent] / 2.

    Frequencies. The r-th feature without a parent has p[r] = min(0.9, a w[r]), with w[r] = 1 ("uniform") or
    (r + 1)^-exponent ("zipf"), and a such that sum_g p[g] = mean_active over all features.

    Args:
        d_in: width D of the tokens.
        n_features: number of features G.
        mean_active: features that fire on a token, on average.
        frequencies: "uniform" or "zipf".
        exponent: of "zipf".
        correlation: of z within a group, in [0, 0.99]; that of the firing itself is lower.
        group_size: consecutive features (with ``hierarchy``, families) in a correlated group.
        hierarchy: children of each parent; 0 for none.
        seed: of the directions.

    Attributes:
        directions: [G, D] fp32, Gaussian, of length 1.
        probabilities: [G] fp64, the share of tokens on which each feature fires.
        scale: the length in x of a coefficient of 1.

    Raises:
        ValueError, TypeError: an argument outside the ranges above; a mean_active that frequencies of at most
            0.9 can't reach.
    """

    d_in: int = 64
    n_features: int = 128
    mean_active: float = 3.0
    frequencies: str = "uniform"
    exponent: float = 1.0
    correlation: float = 0.0
    group_size: int = 2
    hierarchy: int = 0
    seed: int = 0
    directions: Tensor = field(init=False, repr=False, compare=False)
    probabilities: Tensor = field(init=False, repr=False, compare=False)
    scale: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_number("d_in", self.d_in, integer=True, low=1)
        check_number("n_features", self.n_features, integer=True, low=1)
        check_number("mean_active", self.mean_active, low=0, open_low=True)
        check_choice("frequencies", self.frequencies, ("uniform", "zipf"))
        check_number("exponent", self.exponent, low=0, high=8)
        check_number("correlation", self.correlation, low=0, high=0.99)
        check_number("group_size", self.group_size, integer=True, low=2)
        check_number("hierarchy", self.hierarchy, integer=True, low=0)
        check_number("seed", self.seed, integer=True)
        drawn = torch.randn(self.n_features, self.d_in, generator=_generator("directions", self.seed))
        for name, value in (
            ("directions", nn.functional.normalize(drawn, dim=1)),
            ("probabilities", self._solve_frequencies()[self._root()] * self._given()),
        ):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "scale", math.sqrt(self.d_in / self._power()))

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n tokens: x [n, D] fp32. See :meth:`sample_with_coefficients`."""
        return self.sample_with_coefficients(n, generator)[0]

    def sample_with_coefficients(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw n tokens x [n, D] and their true coefficients c [n, G], fp32, from a CPU generator.

        Memory: a few dense [n, G]; for more tokens than that allows, call it repeatedly.
        """
        check_number("n", n, integer=True, low=0)
        check_type("generator", generator, torch.Generator, "a torch.Generator")
        p, root = self._parents(), self._root()
        z = torch.randn(n, len(p), generator=generator)
        if self.correlation:
            shared = torch.randn(n, -(-len(p) // self.group_size), generator=generator)
            shared = shared.repeat_interleave(self.group_size, dim=1)[:, : len(p)]
            z = math.sqrt(self.correlation) * shared + math.sqrt(1 - self.correlation) * z
        fires = (z < torch.special.ndtri(p).float())[:, root]
        if self.hierarchy:
            fires &= torch.rand(n, self.n_features, generator=generator) < self._given()
        c = (torch.rand(n, self.n_features, generator=generator) + 0.5) * fires
        return (c @ self.directions).mul_(self.scale), c

    def to_dict(self) -> dict[str, Any]:
        """The arguments, as plain JSON types; ``SyntheticDictionary(**d)`` is the inverse."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}

    @classmethod
    def open(cls, path: str | Path) -> SyntheticDictionary:
        """Read the features behind a file that :func:`write_activations` wrote, from its metadata alone.

        Raises:
            ValueError: no whole safetensors file, or one without that metadata.
        """
        path, stem = _name(path)
        metadata = StoredTensors(path.parent, stem).metadata
        expected = "an activations file of fastsae.evaluate.write_activations"
        if metadata.get("format") != _FORMAT or "features" not in metadata:
            reject(str(path), "a file that doesn't say which features are behind it", expected)
        data = parse_json(path, metadata["features"], expected)
        try:
            return cls(**data)
        except TypeError as error:
            raise BadType(f"{path}: got features {data}, expected those of {expected}") from error

    def _root(self) -> Tensor:
        """[G]: the number of each feature's family, which without a hierarchy is its own."""
        return torch.arange(self.n_features) // (1 + self.hierarchy)

    def _given(self) -> Tensor:
        """[G] fp64: how often each feature fires where its family's parent does; of a parent, 1."""
        parent = torch.arange(self.n_features) % (1 + self.hierarchy) == 0
        return torch.where(parent, 1.0, _CHILD_SHARE).double()

    def _parents(self) -> Tensor:
        """[families] fp64: the frequency of each feature without a parent."""
        return self.probabilities[:: 1 + self.hierarchy]

    def _solve_frequencies(self) -> Tensor:
        """The same, before ``probabilities`` are there."""
        family = self._root()
        n = int(family[-1]) + 1
        size = torch.zeros(n, dtype=torch.float64).index_add_(0, family, self._given())
        rank = torch.arange(1, n + 1, dtype=torch.float64)
        weight = rank ** -(self.exponent if self.frequencies == "zipf" else 0.0)
        most = _MOST_FREQUENT * size.sum().item()
        if self.mean_active > most:
            reject("mean_active", self.mean_active, f"a number <= {most:g} with {self.n_features} features")
        capped = 0  # weights descend, so those at the cap come first
        while True:
            left = self.mean_active - _MOST_FREQUENT * size[:capped].sum()
            p = weight * left / (size * weight)[capped:].sum()
            if capped == n - 1 or p[capped] <= _MOST_FREQUENT:
                p[:capped] = _MOST_FREQUENT
                return p.clamp(max=_MOST_FREQUENT)
            capped += 1

    def _power(self) -> float:
        """E||x||^2 at scale 1.

            E||x||^2 = 13/12 sum_g p[g] + sum_{g != h} P(g and h fire) <directions[g], directions[h]>

        P(g and h) is that of their families' parents, times how often each fires where its own does.
        """
        family, given = self._root(), self._given()
        both = self._joint()[family][:, family] * torch.outer(given, given)
        directions = self.directions.double()
        cross = (both * (directions @ directions.T)).fill_diagonal_(0).sum()
        return (_SQUARE * self.probabilities.sum() + cross).item()

    def _joint(self) -> Tensor:
        """[families, families] fp64: on which share of tokens two parents fire; a parent's own p within."""
        p = self._parents()
        joint = torch.outer(p, p)
        if self.correlation:
            # The integral over u of what both do given u. Equal steps converge exponentially: the integrand
            # is analytic; at a correlation of 0.99 it turns within 0.1, which is 11 steps.
            u = torch.linspace(-9, 9, 2001, dtype=torch.float64)[:, None]
            density = u.square().mul(-0.5).exp()
            threshold = torch.special.ndtri(p) - math.sqrt(self.correlation) * u
            fires = torch.special.ndtr(threshold / math.sqrt(1 - self.correlation))
            weighted = fires * (density / density.sum())
            for lo in range(0, len(p), self.group_size):
                own = slice(lo, lo + self.group_size)
                joint[own, own] = weighted[:, own].T @ fires[:, own]
        joint.diagonal().copy_(p)
        return joint


def write_activations(path: str | Path, truth: SyntheticDictionary, n_tokens: int, *, seed: int = 0) -> None:
    """Write n_tokens tokens to a .safetensors file, as ``fastsae train --activations`` takes them.

    The file's metadata hold the arguments of ``truth``, so ``fastsae eval --synthetic`` finds the features
    behind it. Written in a stream, and renamed into place of a file that may be there. The first n tokens
    don't depend on n_tokens; they are others than :func:`score` draws, whatever the seeds.

    Args:
        path: a file named *.safetensors; its folder is made.
        truth: whose tokens.
        n_tokens: how many, fp32.
        seed: of the tokens.

    Raises:
        ValueError, TypeError: another kind of argument or file name.
    """
    check_type("truth", truth, SyntheticDictionary, "a SyntheticDictionary")
    check_number("n_tokens", n_tokens, integer=True, low=1)
    check_number("seed", seed, integer=True)
    path, stem = _name(path)
    path.parent.mkdir(parents=True, exist_ok=True)

    def read(lo: int, hi: int) -> Tensor:
        blocks = range(lo // _BLOCK_TOKENS, -(-hi // _BLOCK_TOKENS))
        x = torch.cat([_block(truth, "activations", seed, block)[0] for block in blocks])
        return x[lo - blocks[0] * _BLOCK_TOKENS :][: hi - lo]

    rows = Rows((n_tokens, truth.d_in), torch.float32, read)
    metadata = {"format": _FORMAT, "features": json.dumps(truth.to_dict()), "seed": str(seed)}
    write_shards(path.parent, stem, [{"activations": rows}], metadata)


@dataclass(frozen=True)
class Recovery:
    """How much of G known features a dictionary of M latents found, over T tokens.

    With cos[g, i] = <directions[g], W_dec[i]> / ||W_dec[i]|| (0 of a row of zeros), with m the one-to-one
    match of features and latents that has the largest sum of cos (by the Hungarian method; where M < G, some
    features have none), with c the true coefficients and f the latents' activations:

        mmcs      = mean_g max_i cos[g, i]
        mcc       = sum_{matched g} cos[g, m(g)] / G
        recovered = #{g: max_i cos[g, i] > 0.9} / G
        hits      = #{n, matched g: c[n, g] > 0 and f[n, m(g)] > 0}
        precision = hits / #{n, matched g: f[n, m(g)] > 0}
        recall    = hits / #{n, g: c[n, g] > 0}
        f1        = 2 hits / (the sum of both denominators)
        shrinkage = sum c[n, g] c_hat[n, g] / sum c[n, g]^2       over n and matched g with c[n, g] > 0
        c_hat[n, g] = f[n, m(g)] ||W_dec[m(g)]|| / scale

    W_dec and f are those of raw space, the dictionary's normalisation undone. Firing is averaged micro, over
    pairs and tokens alike; of latents without a match nothing is asked. ``shrinkage`` is the slope of
    recovered against true coefficients, by least squares through the origin: 1 is none; a miss counts as a
    recovered 0, and lowers it. ``fvu``, ``l0`` and ``dead_share`` (the share of latents silent on the T
    tokens) are those of :class:`fastsae.evaluate.Evaluation`.

    Attributes:
        tokens: T; 0 where a bare W_dec was scored, and what needs tokens is NaN.
        match: [G] int64, the latent m(g) of each feature, -1 for none.

    Source: mmcs: Sharkey et al. 2022, "Taking features out of superposition with sparse autoencoders".
    """

    mmcs: float
    mcc: float
    recovered: float
    n_features: int
    n_latents: int
    match: Tensor = field(repr=False, compare=False)
    precision: float = math.nan
    recall: float = math.nan
    f1: float = math.nan
    shrinkage: float = math.nan
    fvu: float = math.nan
    l0: float = math.nan
    dead_share: float = math.nan
    tokens: int = 0

    def to_dict(self) -> dict[str, float | int | None]:
        """The numbers for a JSON file; None where one isn't finite."""
        named = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "match"}
        return {name: number if math.isfinite(number) else None for name, number in named.items()}


def score(
    dictionary: SAE | Tensor, truth: SyntheticDictionary, *, n_tokens: int = 16_384, seed: int = 0
) -> Recovery:
    """Compare a dictionary with the features it should have found; see :class:`Recovery`.

    An SAE runs in ``eval()`` mode, which is undone afterwards, twice over the same tokens. The cosines are
    dense [G, M], activations dense in blocks, [1024, M] and [1024, G]: meant for a few thousand latents and
    features. The match takes O(G^2 M) time at worst.

    Args:
        dictionary: an SAE whose d_in and d_out are the truth's; or a bare W_dec [M, d_in], of which only
            directions are compared.
        truth: the features.
        n_tokens: tokens to draw, fresh ones: others than :func:`write_activations` writes.
        seed: of those tokens.

    Raises:
        ValueError, TypeError: another width or kind of argument; NaN or Inf in W_dec.
    """
    check_type("truth", truth, SyntheticDictionary, "a SyntheticDictionary")
    check_type("dictionary", dictionary, (SAE, Tensor), "an SAE or W_dec [n_latents, d_in]")
    check_number("n_tokens", n_tokens, integer=True, low=1)
    check_number("seed", seed, integer=True)
    if isinstance(dictionary, Tensor):
        return _compare_directions(dictionary, truth)
    sae, d = dictionary, truth.d_in
    if (widths := (sae.config.d_in, sae.config.d_out)) != (d, d):
        got = "a dictionary with d_in = {}, d_out = {}".format(*widths)
        reject("dictionary", got, f"{d} for both, the width of the synthetic features")
    result = _compare_directions(_raw_decoder(sae), truth)
    general = evaluate(sae, (x for x, _ in _blocks(truth, seed, n_tokens)))
    with eval_mode(sae), torch.inference_mode():
        firing = _compare_firing(sae, truth, result.match, _blocks(truth, seed, n_tokens))
    return dataclasses.replace(
        result,
        precision=_ratio(firing.hits, firing.latent_fires),
        recall=_ratio(firing.hits, firing.feature_fires),
        f1=_ratio(2 * firing.hits, firing.latent_fires + firing.feature_fires),
        shrinkage=_ratio(firing.product, firing.square),
        fvu=general.fvu,
        l0=general.l0,
        dead_share=general.dead_share,
        tokens=n_tokens,
    )


def _compare_directions(W_dec: Tensor, truth: SyntheticDictionary) -> Recovery:
    """What W_dec [M, D] by itself says."""
    from scipy.optimize import linear_sum_assignment

    if W_dec.ndim != 2 or W_dec.shape[1] != truth.d_in or not len(W_dec) or not W_dec.is_floating_point():
        got = f"{W_dec.dtype} {list(W_dec.shape)}"
        reject("W_dec", got, f"floating [n_latents, {truth.d_in}], the width of the synthetic features")
    if not W_dec.isfinite().all():
        reject("W_dec", "NaN or Inf", "finite rows")
    rows = nn.functional.normalize(W_dec.detach().cpu().double(), dim=1)
    cosine = nn.functional.normalize(truth.directions.double(), dim=1) @ rows.T  # [G, M]
    best = cosine.max(1).values
    features, latents = map(torch.from_numpy, linear_sum_assignment(cosine.numpy(), maximize=True))
    match = torch.full((truth.n_features,), -1).index_put_((features,), latents)
    return Recovery(
        mmcs=best.mean().item(),
        mcc=cosine[features, latents].sum().item() / truth.n_features,
        recovered=best.gt(_RECOVERED).double().mean().item(),
        n_features=truth.n_features,
        n_latents=len(W_dec),
        match=match,
    )


def _raw_decoder(sae: SAE) -> Tensor:
    """W_dec as it acts on raw x, fp64 on the CPU; layer norm, which differs by token, not undone."""
    W_dec = sae.full_precision("W_dec").cpu().double()
    scale = getattr(sae, "norm_scale", None)
    if scale is None:
        return W_dec
    scale = scale.cpu().double().reshape(-1)  # one number, or of a crosscoder one for each site
    return W_dec / scale.repeat_interleave(W_dec.shape[1] // len(scale))


class _Firing(NamedTuple):
    """Sums over tokens: firings of features, of matched latents, of both; and of c * c_hat and c^2."""

    hits: float
    latent_fires: float
    feature_fires: float
    product: float
    square: float


def _compare_firing(
    sae: SAE, truth: SyntheticDictionary, match: Tensor, blocks: Iterator[tuple[Tensor, Tensor]]
) -> _Firing:
    features = (match >= 0).nonzero().flatten()
    latents = match[features]
    lengths = _raw_decoder(sae).norm(dim=1)[latents]
    totals = torch.zeros(len(_Firing._fields), dtype=torch.float64)
    for x, c in blocks:
        code = sae.encode_sparse(x.to(sae.W_enc.device, sae.dtype))
        f = code.to_dense().cpu().double()[:, latents]
        c_hat = f * lengths / truth.scale
        if code.scale is not None:
            c_hat *= code.scale.double().cpu()
        true = c[:, features].double()
        hit = (true > 0) & (f > 0)
        totals += torch.stack([
            hit.sum(), (f > 0).sum(), (c > 0).sum(), (true * c_hat).sum(), true.square().sum(),
        ])  # fmt: skip
    return _Firing(*totals.tolist())


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


def _generator(purpose: str, *numbers: int) -> torch.Generator:
    """A generator of its own for each purpose: a seed that stands for two things gives unrelated numbers.

    Else a dictionary drawn from the seed of the features might start as the very solution.
    """
    digest = hashlib.sha256(f"{purpose} {numbers}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _block(truth: SyntheticDictionary, purpose: str, seed: int, block: int) -> tuple[Tensor, Tensor]:
    """x and c of one block of tokens, which can be asked for in any order."""
    return truth.sample_with_coefficients(_BLOCK_TOKENS, _generator(purpose, seed, block))


def _blocks(truth: SyntheticDictionary, seed: int, n_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The tokens to score on and their true coefficients, a block at a time."""
    for lo in range(0, n_tokens, _BLOCK_TOKENS):
        x, c = _block(truth, "score", seed, lo // _BLOCK_TOKENS)
        yield x[: n_tokens - lo], c[: n_tokens - lo]


def _name(path: str | Path) -> tuple[Path, str]:
    """The path and its name without .safetensors."""
    check_type("path", path, (str, Path), "a file name")
    path = Path(path).expanduser()
    if path.suffix != _SUFFIX:
        reject("path", f"'{path}'", f"a file named *{_SUFFIX}")
    return path, path.name.removesuffix(_SUFFIX)
