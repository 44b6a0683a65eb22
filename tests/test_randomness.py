"""Random numbers: functions of where they are used, of nothing else."""

import pytest
import torch

from stepdistill.randomness import Draws, derive_seed

DRAWS = {
    "normal": lambda draws: draws.normal(2, 3),
    "normal_like": lambda draws: draws.normal_like(torch.zeros(draws.batch_size, 4)),
    "uniform": lambda draws: draws.uniform(-1, 2),
    "integers": lambda draws: draws.integers(3, 9),
}
every_draw = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())


@every_draw
def test_the_same_place_gives_the_same_numbers_whatever_happened_before(draw):
    first = draw(Draws(5, 8))
    torch.rand(17)
    assert torch.equal(draw(Draws(5, 8)), first)
    assert not torch.equal(draw(Draws(6, 8)), first)


@every_draw
def test_drawing_leaves_the_global_generator_alone(draw):
    before = torch.get_rng_state()
    draw(Draws(5, 8))
    assert torch.equal(torch.get_rng_state(), before)


@every_draw
def test_processes_together_see_what_one_process_sees(draw):
    one = draw(Draws(5, 12))
    several = [draw(Draws(5, 4, rank=rank, world=3)) for rank in range(3)]
    assert torch.equal(torch.cat(several), one)
    assert len(several[0]) == 4


def test_later_draws_stay_aligned_across_processes():
    def second(draws):
        draws.normal(3)
        return draws.integers(0, 1000)

    assert torch.equal(torch.cat([second(Draws(5, 4, rank=rank, world=2)) for rank in range(2)]), second(Draws(5, 8)))


def test_a_shared_integer_is_the_same_in_every_process():
    for seed in range(20):
        found = {Draws(seed, 4, rank=rank, world=3).shared_integer(0, 1000) for rank in range(3)}
        assert len(found) == 1
    assert {Draws(seed, 4).shared_integer(2, 5) for seed in range(100)} == {2, 3, 4}


def test_a_shared_integer_says_nothing_about_the_batch():
    """Two generators with one seed would give the group and the first sample's time the same number."""
    same = [Draws(seed, 4).shared_integer(0, 1000) == Draws(seed, 4).integers(0, 1000)[0].item() for seed in range(50)]
    assert sum(same) < 5


def test_ranges_and_types():
    draws = Draws(0, 20_000)
    uniform, integers, normal = draws.uniform(2, 3), draws.integers(-2, 2), draws.normal(1)
    assert uniform.dtype == torch.float64 and 2 <= uniform.min() < 2.01 and 2.99 < uniform.max() < 3
    assert integers.dtype == torch.int64 and integers.unique().tolist() == [-2, -1, 0, 1]
    assert normal.dtype == torch.float32 and normal.shape == (20_000, 1)
    assert abs(normal.mean().item()) < 0.03 and abs(normal.std().item() - 1) < 0.03
    assert draws.normal_like(torch.zeros(20_000, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_seeds_differ_in_every_part_and_fit_a_generator():
    places = [(seed, step, turn, micro) for seed in (0, 1) for step in (0, 1, 12) for turn in "ab" for micro in (0, 1)]
    seeds = [derive_seed(*place) for place in places]
    assert len(set(seeds)) == len(places)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 2) != derive_seed(12) and derive_seed(1, 2) != derive_seed(2, 1)
    assert derive_seed(0, "student") == derive_seed(0, "student")
