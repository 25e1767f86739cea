"""transpose: the code ordered by latent, against a list of its entries."""

import pytest
import torch

from fastsae.testing import assert_repeatable, poisoned_empty, random_code

pytestmark = pytest.mark.usefixtures("one_thread")


def transpose(code, backend):
    return torch.ops.fastsae.transpose(code.values, code.indices, code.offsets, code.n_latents, backend)


def by_hand(code):
    """[latent: [(token, place), ...]] of the entries that aren't 0, tokens ascending."""
    active = {}
    for n, (lo, hi) in enumerate(zip(code.offsets[:-1].tolist(), code.offsets[1:].tolist(), strict=True)):
        for place in range(lo, hi):
            if code.values[place] != 0:
                active.setdefault(int(code.indices[place]), []).append((n, place))
    return sorted(active.items())


@pytest.mark.parametrize("spare", [0, 5])
@pytest.mark.parametrize(("n", "m"), [(0, 50), (1, 1), (5, 50), (33, 7), (33, 257), (2, 1000)])
def test_against_a_list_of_entries(any_backend, n, m, spare):
    code = random_code(n, m, spare=spare)
    latents, starts, tokens, order = transpose(code, any_backend)
    active = by_hand(code)
    capacity, rows, live = (
        len(code.values),
        min(len(code.values), m),
        sum(len(entries) for _, entries in active),
    )
    assert [(len(t), t.dtype) for t in (latents, starts, tokens, order)] == [
        (length, torch.int64) for length in (rows, rows + 1, capacity, capacity)
    ]
    assert latents.tolist() == [latent for latent, _ in active] + [m] * (rows - len(active))
    for row, (_, entries) in enumerate(active):
        mine = slice(int(starts[row]), int(starts[row + 1]))
        assert list(zip(tokens[mine].tolist(), order[mine].tolist(), strict=True)) == entries
    assert starts[0] == 0
    assert starts[len(active) :].tolist() == [live] * (rows + 1 - len(active))
    assert not tokens[live:].any()
    assert not order[live:].any()


def test_a_code_of_zeros_has_no_active_latent(any_backend):
    code = random_code(5, 50)
    code.values.zero_()
    latents, starts, _, _ = transpose(code, any_backend)
    assert (latents == 50).all()
    assert not starts.any()


def test_nan_is_an_entry(any_backend):
    code = random_code(5, 50)
    code.values.fill_(torch.nan)
    assert transpose(code, any_backend)[1][-1] == len(code.values)


def test_two_runs_agree_and_no_place_is_left_unwritten(backend, two_threads):
    code = random_code(33, 257, spare=5)
    assert_repeatable(lambda: transpose(code, backend))
    expected = transpose(code, backend)
    with poisoned_empty():
        actual = transpose(code, backend)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
