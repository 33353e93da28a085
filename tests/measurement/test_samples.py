"""Which samples are the same, and which are kept aside."""

import torch

from alds_fast.measurement import Samples


def test_one_in_eight_is_kept_aside_one_at_least_of_two_and_two_of_six():
    x = torch.randn(40, 24)
    for count, aside in ((1, 0), (2, 1), (5, 1), (6, 2), (15, 2), (16, 2), (40, 5)):
        samples = Samples(1 / 8)
        assert int(samples.aside(x[:count]).sum()) == aside == samples.kept_aside
    samples = Samples(1 / 8)
    assert [bool(samples.aside(x[i : i + 1])) for i in range(17)] == [i in (1, 5) for i in range(17)]
    assert not Samples(0).aside(x).any()


def test_a_sample_that_comes_again_is_where_it_was():
    x = torch.randn(6, 24)
    samples = Samples(1 / 2)
    first = samples.aside(x)
    assert first.tolist() == [False] * 3 + [True] * 3
    assert torch.equal(samples.aside(x.flip(0)), first.flip(0)) and samples.distinct == 6 and samples.total == 12
    repeated = Samples(1 / 2)
    assert not repeated.aside(x[:1].repeat(8, 1)).any() and repeated.distinct == 1


def test_what_rows_are_worth():
    x = torch.randn(8, 24)
    for batches, worth in (([x], 1.0), ([x[:1]] * 8, 0.0), ([x[:3]], 0.0), ([x[:4]] * 2, 0.5)):
        samples = Samples(1 / 8)
        for batch in batches:
            samples.aside(batch)
        assert samples.worth == worth


def test_samples_of_mappings_and_of_tensors_without_a_common_size():
    ids = torch.arange(12).view(4, 3)
    batch = {"ids": ids, "positions": torch.arange(3)[None], "flag": True}
    samples = Samples(1 / 4)
    assert samples.aside(batch).tolist() == [False, False, False, True]
    masked = Samples(1 / 4)
    assert masked.aside((ids, torch.ones(3, 3))).tolist() == [False, False, False, True]
    alone = Samples(1 / 4)
    assert [alone.aside({"ids": ids[i : i + 1], "positions": ids[0]}).tolist() for i in range(2)] == [[False], [True]]
    half = torch.randn(4, 2).bfloat16()
    assert len(Samples(0.5).aside(half)) == 4 and len(Samples(0.5).aside((torch.ones(()),))) == 1


def test_samples_of_objects_and_of_mappings_of_other_kinds():
    from collections import UserDict
    from types import SimpleNamespace

    for wrap in (UserDict, lambda fields: SimpleNamespace(**fields), lambda fields: [fields]):
        samples = Samples(1 / 2)
        batches = [wrap({"x": torch.full((2, 3), float(i))}) for i in range(2)]
        assert [samples.aside(batch).tolist() for batch in batches] == [[False, False], [True, True]]
    assert Samples(0.5).aside([{"text": "a"}, {"text": "b"}]).tolist() == [False]


def test_samples_that_hardly_differ_are_one():
    samples, base = Samples(0.0), torch.randn(2, 3, 8, 8)
    samples.aside(base)
    samples.aside(base + 1e-4 * torch.randn(2, 3, 8, 8))
    samples.aside(torch.cat([base, base * 1.001, torch.randn(3, 3, 8, 8)]))
    assert (samples.distinct, samples.total) == (5, 11)
    samples.aside({"x": torch.randn(4, 10)})  # of another size
    assert samples.distinct == 9


def test_tokens_and_numbers_that_are_not_finite_are_compared_bit_by_bit():
    samples = Samples(0.0)
    samples.aside({"ids": torch.tensor([[1, 2, 3], [1, 2, 4]])})
    samples.aside({"x": torch.tensor([[torch.nan, 1.0], [torch.nan, 1.0001]])})
    assert samples.distinct == 4


def test_frames_of_a_few_scenes_are_as_many_samples_as_there_are_scenes():
    generator = torch.Generator().manual_seed(0)
    scenes = torch.randn(4, 64, generator=generator).repeat_interleave(8, 0)
    frames = scenes + 0.05 * torch.randn(32, 64, generator=generator)
    samples = Samples(1 / 8)
    for batch in frames.split(16):
        samples.aside(batch)
    assert samples.distinct == 4 and samples.total == 32
    apart = Samples(1 / 8)
    apart.aside(scenes + torch.randn(32, 64, generator=generator))
    assert apart.distinct == 32
    one = Samples(1 / 8)
    one.aside(frames[:8])  # within a tenth of their norm
    assert one.distinct == 1


def test_another_default_type_is_no_matter():
    x = torch.randn(12, 24, dtype=torch.float32)
    try:
        for kind in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(kind)
            assert int(Samples(1 / 8).aside(x).sum()) == 2
    finally:
        torch.set_default_dtype(torch.float32)
