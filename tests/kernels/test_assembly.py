"""The assembly that decodes words, executed instruction by instruction in NumPy, for every word that there is.

Triton's interpreter cannot run it, and runs a twin in its place; so this is what stands between it and a GPU.
"""

import re

import numpy as np
import pytest
import torch

from hf_kvcache.codecs.codebooks import cubic
from hf_kvcache.kernels.code_attention import pack

pytest.importorskip("triton", reason="Triton is not installed")

from hf_kvcache.kernels.triton_ops.code_attention import codebook
from hf_kvcache.kernels.triton_ops.codes import assembly, constraints, packed_book, slot_factor, slots

WORDS = np.arange(1 << 16, dtype=np.uint32)


def halves(register: np.ndarray) -> np.ndarray:
    """The two float16 numbers of every register, in float64, where their products and sums are exact."""
    return register.view(np.float16).astype(np.float64).reshape(-1, 2)


def registers(numbers: np.ndarray) -> np.ndarray:
    """Rounded to float16 once, as the hardware does."""
    return np.ascontiguousarray(numbers.astype(np.float16)).view(np.uint32).reshape(-1)


def run(text: str, outputs: int, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """Executes PTX on arrays of 32-bit registers."""
    held = {f"${outputs + place}": value for place, value in enumerate(inputs)}

    def read(operand: str) -> np.ndarray:
        if operand[0].isdigit():
            return np.full_like(inputs[0], int(operand, 0))
        return held[operand]

    for line in text.strip("{}\n").split("\n"):
        opcode, operands = re.fullmatch(r"\s*(\S+) (.*);", line).groups()
        target, *sources = (operand.strip() for operand in operands.split(","))
        if opcode == ".reg":
            continue
        if opcode == "lop3.b32":
            a, b, c = (read(source) for source in sources[:3])
            assert sources[3] == "0xEA", "only a & b | c is known here"
            held[target] = a & b | c
        elif opcode == "shr.b32":
            held[target] = read(sources[0]) >> read(sources[1])
        elif opcode == "shl.b32":
            held[target] = read(sources[0]) << read(sources[1])
        elif opcode == "mov.b32":
            held[target] = read(sources[0])
        else:
            a, b, *c = (halves(read(source)) for source in sources)
            held[target] = registers(a + b if opcode.startswith("add") else a * b + (c[0] if c else 0))
            assert opcode in ("add.rn.f16x2", "mul.rn.f16x2", "fma.rn.f16x2")
    return [held[f"${place}"] for place in range(outputs)]


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("kind", ["equal steps", "cubic"])
@pytest.mark.parametrize("dim", [64, 128])
def test_every_word(bits, kind, dim):
    count = slots(bits)
    levels = cubic(dim, bits)
    book = packed_book(*codebook(levels)[1:]) if kind == "cubic" else 0
    # another word in the other half of the register, so that a bit that strays is seen
    other = WORDS[::-1].copy()
    both = WORDS | other << 16
    inputs = [both]
    if bits == 3:
        tops = np.random.default_rng(0).integers(0, 256, WORDS.size, dtype=np.uint32)
        inputs.append(tops | (tops ^ 0x5A) << 16)
    text = assembly(bits, book)
    assert constraints(bits) == ",".join(["=r"] * count + ["r"] * len(inputs))
    found = run(text, count, inputs)
    for half, words in enumerate((WORDS, other)):
        codes = np.stack([words >> (16 // count * j) & (15 if bits == 4 else 3) for j in range(count)])
        if bits == 3:
            top = tops if half == 0 else tops ^ 0x5A
            codes |= np.stack([(top >> j & 1) << 2 for j in range(count)])
        for j in range(count):
            number = halves(found[j])[:, half]
            if book:
                exact = levels.numpy()[codes[j]]
                # a and b, t², and two products are rounded
                assert np.abs(number - exact).max() <= 4 * 2.0**-11 * np.abs(exact).max()
            else:
                assert (number == 1024 + slot_factor(j, bits) * codes[j]).all()


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_slots_are_those_of_packed_codes(bits):
    """Slot j of word w of a row is its dim w * slots + j."""
    codes = torch.randint(0, 2**bits, (5, 64), dtype=torch.uint8)
    packed, count = pack(codes, bits), slots(bits)
    words = packed[:, : 2 * (64 // count)].contiguous().view(torch.int16).int()
    lower = torch.stack([words >> (16 // count * j) & (15 if bits == 4 else 3) for j in range(count)], 2).flatten(1)
    if bits == 3:
        tops = packed[:, 16:].int()
        lower += torch.stack([(tops >> j & 1) << 2 for j in range(count)], 2).flatten(1)
    assert torch.equal(lower, codes.int())
