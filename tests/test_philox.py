"""The generator against its published vectors, an oracle in Python integers, and the layouts it promises."""

import math

import pytest
import torch

from d2vkern.reference import philox as px

WORD = 0xFFFFFFFF


def oracle(counter, key):
    """Philox 4x32-10 on Python integers, as printed in the paper."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & WORD, (p0 >> 32) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def words(text):
    return tuple(int(word, 16) for word in text.split())


# Random123, examples/kat_vectors: counter, key, output.
VECTORS = {
    "zeros": ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
}


@pytest.mark.parametrize("name", VECTORS)
def test_known_answers(name):
    counter, key, expected = map(words, VECTORS[name])
    out = px.philox(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in out) == expected
    assert oracle(counter, key) == expected


def test_matches_the_oracle_on_any_words():
    counters = torch.randint(0, 1 << 32, (200, 4))
    counters[:16] = torch.cartesian_prod(*[torch.tensor([0, WORD])] * 4)
    key = (0x80000000, WORD)
    out = torch.stack(px.philox(tuple(counters.T), key), -1)
    assert out.tolist() == [list(oracle(counter, key)) for counter in counters.tolist()]


def test_broadcasting_and_tensor_keys_change_no_bit():
    a, b = torch.arange(5)[:, None], torch.randint(0, 1 << 32, (7,))
    full = [word.expand(5, 7).contiguous() for word in (a, b, torch.tensor(3), torch.tensor(9))]
    expected = px.philox(tuple(full), (11, 12))
    for counter in ((a, b, 3, 9), (a, b, torch.tensor([3]), 9)):
        for key in ((11, 12), (torch.tensor(11), torch.tensor(12))):
            assert all(map(torch.equal, px.philox(counter, key), expected))
    for place in range(4):  # each place may be the only tensor
        counter = [1, 2, 3, 4]
        counter[place] = b
        out = torch.stack(px.philox(tuple(counter), (11, 12)), -1)
        for row, word in zip(out.tolist(), b.tolist(), strict=True):
            counter[place] = word
            assert row == list(oracle(counter, (11, 12)))


def test_inputs_are_left_alone():
    counter = [torch.randint(0, 1 << 32, (4,)) for _ in range(4)]
    before = [word.clone() for word in counter]
    px.philox(tuple(counter), (1, 2))
    assert all(map(torch.equal, counter, before))


@pytest.mark.parametrize("seed", [0, 7, -1, 2**63 - 1, -(2**63), 2**40 + 5])
def test_split64_is_twos_complement(seed):
    low, high = px.split64(seed)
    assert (high << 32 | low) == seed & (1 << 64) - 1
    assert tuple(int(word) for word in px.split64(torch.tensor(seed))) == (low, high)


def test_row_draws_layout():
    ids, seed, epoch, clones, draws = torch.tensor([5, -3, 2**40 + 1]), 2**35 + 9, 4, 3, 10
    out = px.row_draws(ids, clones, draws, px.PRIORITIES, seed=seed, epoch=epoch)
    assert out.shape == (9, draws)
    for b, sample in enumerate(ids.tolist()):
        for m in range(clones):
            for j in range(draws):
                c3 = px.PRIORITIES << 30 | m << 18 | j // 4
                expected = oracle((sample & WORD, sample >> 32 & WORD, epoch, c3), (seed & WORD, seed >> 32))
                assert out[b * clones + m, j] == expected[j % 4]


def test_element_normals_layout():
    rows, tokens, width, seed = torch.tensor([0, 3]), torch.tensor([6, 2]), 7, -5
    out = px.element_normals(rows, tokens, width, seed=seed)
    assert out.shape == (2, width) and out.dtype == torch.float32
    for i in range(2):
        for d in range(width):
            counter = (d // 4, tokens[i].item(), rows[i].item(), px.NOISE << 30)
            four = oracle(counter, (seed & WORD, seed >> 32 & WORD))
            a, b = four[d % 4 // 2 * 2 : d % 4 // 2 * 2 + 2]
            radius = math.sqrt(-2.0 * math.log(((a >> 8) + 1) * 2.0**-24))
            angle = 2.0 * math.pi * (b >> 8) * 2.0**-24
            expected = radius * (math.sin(angle) if d % 2 else math.cos(angle))
            assert out[i, d].item() == pytest.approx(expected, rel=1e-5, abs=2e-6)


def test_purposes_and_seeds_give_unrelated_draws():
    ids = torch.arange(4)
    draws = [
        px.row_draws(ids, 2, 8, purpose, seed=seed, epoch=epoch)
        for purpose, seed, epoch in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 1 << 32, 0), (0, 0, 1))
    ]
    together = torch.stack(draws).flatten()
    assert together.unique().numel() == together.numel()  # a shared word has a probability of 1e-5


@pytest.mark.parametrize("bound", [1, 7, 196, 1560, 2**31])
def test_below_covers_its_range(bound):
    edge = torch.tensor([0, WORD])
    assert px.below(edge, bound).tolist() == [0, bound - 1]
    drawn = px.below(px.row_draws(torch.arange(50), 1, 4000, px.CENTRES, seed=3, epoch=0), bound).flatten()
    assert drawn.min() >= 0 and drawn.max() < bound
    if bound <= 1560:
        # Chi-square goodness of fit at level 1e-4.
        expected = drawn.numel() / bound
        statistic = ((drawn.bincount(minlength=bound) - expected) ** 2 / expected).sum().double()
        freedom = torch.tensor((bound - 1) / 2, dtype=torch.float64)
        assert bound == 1 or torch.special.gammaincc(freedom, statistic / 2) > 1e-4


def test_below_bias_is_within_the_documented_bound():
    # On an 8-bit copy of the rule every word can be counted: shares differ from 1 / L by less than 2^-8.
    for bound in (3, 7, 100, 255):
        shares = (torch.arange(256) * bound >> 8).bincount(minlength=bound) / 256
        assert (shares - 1 / bound).abs().max() < 1 / 256


def test_normals_are_finite_at_the_extremes_and_standard():
    edge = torch.tensor([0, WORD]).repeat(2)
    out = px.normal((edge, edge, edge, edge))
    assert out.isfinite().all() and out.abs().max() <= 5.78
    values = px.element_normals(
        torch.arange(1000), torch.zeros(1000, dtype=torch.int64), 400, seed=1
    ).double()
    count = values.numel()
    # Moments of 400,000 normals, each within 4 standard errors.
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        error = values.pow(power).mean().item() - moment
        assert abs(error) < 4 * math.sqrt(variance / count), power
    neighbours = (values[:, :-1] * values[:, 1:]).mean().item()
    assert abs(neighbours) < 4 / math.sqrt(count)


def test_normals_do_not_depend_on_what_is_drawn_with_them():
    rows, tokens = torch.arange(64), torch.arange(64) * 3
    together = px.element_normals(rows, tokens, 96, seed=1)
    for i in (0, 31, 63):
        alone = px.element_normals(rows[i : i + 1], tokens[i : i + 1], 96, seed=1)
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-6)
    narrow = px.element_normals(rows, tokens, 33, seed=1)
    torch.testing.assert_close(narrow, together[:, :33], rtol=0, atol=1e-6)


def test_no_draws():
    assert px.row_draws(torch.arange(0), 3, 5, 0, seed=0, epoch=0).shape == (0, 5)
    assert px.row_draws(torch.arange(2), 3, 0, 0, seed=0, epoch=0).shape == (6, 0)
    empty = torch.arange(0)
    assert px.element_normals(empty, empty, 4, seed=0).shape == (0, 4)
