import pytest

from mmq_kernels.spec import BITS, QuantSpec


@pytest.mark.parametrize("bits", [1, 9, 0, 16, "four", 4.0, True, None])
def test_bits_outside_2_to_8_are_refused(bits) -> None:
    with pytest.raises(ValueError, match=r"bits must be an integer from 2 to 8, got "):
        QuantSpec(bits)


@pytest.mark.parametrize("group_size", [0, -2, 4, 12, 64.0, "64", True])
def test_group_size_must_be_row_or_multiple_of_8(group_size) -> None:
    with pytest.raises(ValueError, match=r"group_size must be -1 or a positive multiple of 8, got "):
        QuantSpec(4, group_size)


def test_symmetric_must_be_bool() -> None:
    with pytest.raises(ValueError, match="symmetric must be true or false, got 1"):
        QuantSpec(4, 64, 1)


@pytest.mark.parametrize("bits", BITS)
def test_planes_are_powers_of_two_that_add_up(bits) -> None:
    planes = QuantSpec(bits).planes
    assert sum(planes) == bits
    assert set(planes) <= {1, 2, 4, 8}
    assert sorted(planes, reverse=True) == list(planes)


@pytest.mark.parametrize(
    ("group_size", "k", "groups", "length"),
    [(-1, 4304, 1, 4304), (128, 4304, 34, 128), (128, 100, 1, 100), (8, 8, 1, 8), (64, 65, 2, 64)],
)
def test_ragged_groups_are_counted(group_size, k, groups, length) -> None:
    spec = QuantSpec(4, group_size)
    assert (spec.groups(k), spec.group_length(k)) == (groups, length)


def test_words_of_a_stream_and_of_planes() -> None:
    assert QuantSpec(3).words(33) == 4  # 99 bits
    assert QuantSpec(3).plane_words(33) == 3 + 2  # 66 bits and 33 bits, each plane whole words
    assert QuantSpec(8).plane_words(5) == 2
