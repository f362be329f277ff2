"""Packed words against a stream of bits in Python's integers, and every layer through the format and back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sqft.api import Grid, Quantized
from sqft.kernels.grids import dequantize, quantize
from sqft.kernels.packing import from_gptq, pack, pack_rows, to_gptq, unpack, unpack_rows

BITS = st.sampled_from([2, 3, 4, 8])


@settings(deadline=None, max_examples=40)
@given(BITS, st.integers(1, 20), st.integers(1, 3), st.integers(0, 99))
def test_a_column_is_one_stream_of_bits(bits: int, words: int, columns: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (32 * words, columns), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.shape == (words * bits, columns) and packed.dtype == torch.int32
    for column in range(columns):
        stream = sum(int(code) << (bits * place) for place, code in enumerate(codes[:, column].tolist()))
        found = sum((int(word) & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(packed[:, column].tolist()))
        assert found == stream
    assert unpack(packed, bits).equal(codes.to(torch.uint8))


def test_codes_that_do_not_fill_words() -> None:
    with pytest.raises(ValueError, match="5 codes of 4 bits do not fill words"):
        pack(torch.zeros(5, 2, dtype=torch.long), 4)


@settings(deadline=None, max_examples=60)
@given(BITS, st.sampled_from([-1, 32, 64]), st.booleans(), st.booleans(), st.integers(0, 99))
def test_a_layer_goes_through_the_format_and_back(
    bits: int, size: int, symmetric: bool, act_order: bool, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    out, inputs = 32, 128
    groups = 1 if size == -1 else inputs // size
    zero = torch.randint(0, 2**bits, (out, groups), generator=g, dtype=torch.int32)
    zero[0] = 0  # the one that must not borrow
    zero = torch.full_like(zero, 2 ** (bits - 1)) if symmetric else zero
    index = torch.randperm(inputs, generator=g).int() // (inputs // groups) if act_order and groups > 1 else None
    codes = torch.randint(0, 2**bits, (out, inputs), generator=g, dtype=torch.uint8)
    given_ = Quantized(codes, Grid(torch.rand(out, groups, generator=g).half() + 1, zero, size, bits, index))
    tensors = to_gptq(given_)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "qweight": (inputs * bits // 32, out),
        "qzeros": (groups, out * bits // 32),
        "scales": (groups, out),
        "g_idx": (inputs,),
    }
    back = from_gptq(tensors, bits, size)
    assert back.codes.equal(codes) and back.grid.zero.equal(zero) and back.grid.scale.equal(given_.grid.scale)
    assert (back.grid.group_index is None) == (index is None) and (index is None or index.equal(back.grid.group_index))  # type: ignore[arg-type]


def test_what_other_programs_write() -> None:
    """Scales in float32, a scale of 0 for a group of zeros; an index below 0 is refused."""
    codes = torch.randint(0, 16, (8, 64), dtype=torch.uint8)
    tensors = to_gptq(Quantized(codes, Grid(torch.rand(8, 2).half() + 1, torch.full((8, 2), 8), 32, 4)))
    tensors["scales"] = tensors["scales"].float()
    tensors["scales"][0, 3] = 0
    read = from_gptq(tensors, 4, 32)
    value = dequantize(read)
    assert read.grid.scale.dtype == torch.float16 and (read.grid.scale > 0).all()
    assert not value[3, :32].any() and value[3, 32:].any()
    assert quantize(value, read.grid).equal(read.codes)
    tensors["g_idx"][5] = -1
    with pytest.raises(ValueError, match="below 0"):
        from_gptq(tensors, 4, 32)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales", "g_idx"])
@pytest.mark.parametrize("wrong", [lambda t: t.flatten()[0], lambda t: t[None], lambda t: t[..., None, None]])
def test_a_wrong_number_of_dimensions_is_one_error(part: str, wrong: Callable[[Tensor], Tensor]) -> None:
    layer = Quantized(torch.zeros(8, 64, dtype=torch.uint8), Grid(torch.ones(8, 2).half(), torch.ones(8, 2), 32, 4))
    tensors = to_gptq(layer)
    tensors[part] = wrong(tensors[part])
    with pytest.raises(ValueError, match=f"^{part} is .*, expected {1 if part == 'g_idx' else 2} dimension"):
        from_gptq(tensors, 4, 32)


def test_a_zero_point_of_zero_leaves_its_neighbours_alone() -> None:
    zero = torch.full((8, 1), 5, dtype=torch.int32)
    zero[3] = 0
    layer = Quantized(torch.zeros(8, 32, dtype=torch.uint8), Grid(torch.ones(8, 1).half(), zero, 32, 4))
    (word,) = to_gptq(layer)["qzeros"].flatten().tolist()
    assert [(word >> (4 * place)) & 15 for place in range(8)] == [4, 4, 4, 15, 4, 4, 4, 4]


@settings(deadline=None, max_examples=40)
@given(BITS, st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_rows_in_memory(bits: int, rows: int, bytes_: int, seed: int) -> None:
    width = {2: 2, 3: 4, 4: 4, 8: 8}[bits]
    codes = torch.randint(0, 2**bits, (rows, 8 * bytes_), generator=torch.Generator().manual_seed(seed))
    packed = pack_rows(codes, bits)
    assert packed.shape == (rows, bytes_ * width) and packed.dtype == torch.uint8
    for row, held in zip(codes.tolist(), packed.tolist(), strict=True):
        assert row == [held[i % len(held)] >> width * (i // len(held)) & 2**width - 1 for i in range(len(row))]
    assert unpack_rows(packed, bits).equal(codes.to(torch.uint8))
    assert unpack_rows(packed[1:], bits).equal(codes[1:].to(torch.uint8))
    if width < 8:
        with pytest.raises(ValueError, match="do not fill bytes"):
            pack_rows(codes[:, 1:], bits)
