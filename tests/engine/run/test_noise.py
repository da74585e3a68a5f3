"""The noise is Philox4x32-10, and a pure function of its documented arguments."""

import pytest
import torch

from engine.run.noise import philox4x32, seed_bits, uniform

# Random123 1.14, tests/kat_vectors, "philox4x32 10": counter, key, answer.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([int(word, 16)]) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, answer):
    assert philox4x32(words(counter), words(key)) == words(answer)


def philox_in_plain_integers(counter: list[int], key: list[int]) -> list[int]:
    """The reference: Python's integers do not overflow."""
    c, k = list(counter), list(key)
    for round_ in range(10):
        if round_:
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
    return c


def test_many_counters_at_once_agree_with_plain_integers():
    generator = torch.Generator().manual_seed(0)
    table = torch.randint(0, 2**32, (6, 200), generator=generator)
    answer = torch.stack(philox4x32(tuple(table[:4]), tuple(table[4:])), dim=1).tolist()
    assert answer == [philox_in_plain_integers(column[:4], column[4:]) for column in table.T.tolist()]


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, -1])
def test_a_uniform_is_the_first_52_bits_of_its_counter(seed):
    value = uniform(torch.tensor([seed_bits(seed)]), torch.tensor([3]), torch.tensor([7]), stream=2).item()
    first, second, _, _ = philox_in_plain_integers([7, 3, 2, 0], [seed % 2**32, seed % 2**64 // 2**32])
    assert value == ((first * 2**32 + second >> 12) + 0.5) / 2**52
    assert 0 < value < 1


def test_every_argument_matters():
    one = torch.tensor([1])
    values = {
        uniform(one, one, one).item(),
        uniform(one * 2, one, one).item(),
        uniform(one * 2**32, one, one).item(),
        uniform(one, one * 2, one).item(),
        uniform(one, one, one * 2).item(),
        uniform(one, one, one, stream=1).item(),
    }
    assert len(values) == 6


def test_uniforms_over_positions_choices_and_seeds_fill_the_interval_evenly():
    count = 40_000
    steps, one = torch.arange(count), torch.ones(count, dtype=torch.int64)
    for values in (uniform(one, one, steps), uniform(one, steps, one), uniform(steps, one, one)):
        observed = torch.histc(values, bins=100, min=0, max=1)
        chi_square = ((observed - count / 100) ** 2 / (count / 100)).sum().item()
        assert 50 < chi_square < 160  # 99 degrees of freedom: both bounds are beyond 1 in 10,000
        assert values.unique().numel() == count


def test_a_seed_of_more_than_64_bits_is_refused():
    with pytest.raises(ValueError, match="64 bits"):
        seed_bits(2**64)
