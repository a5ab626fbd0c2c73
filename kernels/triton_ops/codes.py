"""Turns words of packed codes into float16 numbers without a table and without converting an integer.

`code_attention.pack` puts the codes of neighbouring dims side by side, so a 16-bit word w of a row holds dims w * SLOTS
to w * SLOTS + SLOTS - 1, one in each *slot*:

    4 bits   4 slots of 4 bits
    2 bits   8 slots of 2 bits
    3 bits   8 slots of 2 bits, and in byte w of the second part of the row the top bits of the same dims

A code is or-ed into the mantissa of 1024.0 where it stands, one `lop3` for two elements, which gives 1024 + factor *
code with a factor of 2^i by the place of the slot. Keys have the factor divided out of the query,
values out of the result, and the 1024 is subtracted once a row. Cubic levels are computed from it at once, in packed
float16. 16-bit words lie in registers as float16 does, so that codes reach the tensor cores without a dequantised tile
in shared memory; that takes one piece of assembly, and so there is a twin in plain Triton for the interpreter.
"""

import struct
from functools import lru_cache

import triton
import triton.language as tl


@triton.constexpr_function
def slots(bits):
    """Codes in a word."""
    return 4 if bits == 4 else 8


@triton.constexpr_function
def slot_shift(j, bits):
    """By how much a word is shifted right for slot j: as few shifts as there can be.

    With 3 bits the top bits must be shifted too, and with these words each shift of them serves several slots.
    """
    if bits == 3:
        return 0 if j < 3 else 3 if j < 6 else 7
    return 0 if j < (2 if bits == 4 else 4) else 8


@triton.constexpr_function
def slot_place(j, bits):
    """Where the lower bits of slot j begin in the shifted word."""
    return (4 if bits == 4 else 2) * j - slot_shift(j, bits)


@triton.constexpr_function
def slot_factor(j, bits):
    """By how much the code in slot j comes out too large."""
    return 2.0 ** slot_place(j, bits)


@triton.constexpr_function
def slot_step(j, bits):
    return 1 / slot_factor(j, bits)


@triton.constexpr_function
def slot_middle(j, bits):
    """What the middle of the codes in slot j comes out as, times `slot_step`."""
    return 1024 / slot_factor(j, bits) + (2**bits - 1) / 2


def packed_book(a: float, b: float) -> int:
    """a and b of cubic levels as two float16 numbers in one integer; 0 stands for equal steps."""
    high, low = (int.from_bytes(struct.pack("<e", number), "little") for number in (a, b))
    return high << 16 | low if b else 0


@lru_cache(maxsize=64)
def assembly(bits: int, book: int) -> str:
    """PTX for two words at once: outputs, then the words, and with 3 bits the top bits.

    a and b are constants in it: where they were arguments, the compiler moved whole tiles of levels through shared
    memory instead of the words.
    """
    count = slots(bits)
    lines: list[str] = []
    registers = ["low", "one", "two", "three"]

    def shifted(source: int, right: int) -> str:
        """The register of input `source` shifted by so much."""
        name = f"{'word' if source == count else 'top'}{'r' if right > 0 else 'l'}{abs(right)}"
        if right and name not in registers:
            registers.append(name)
            lines.append(f"{'shr' if right > 0 else 'shl'}.b32 {name}, ${source}, {abs(right)};")
        return name if right else f"${source}"

    for j in range(count):
        shift, place = slot_shift(j, bits), slot_place(j, bits)
        if book and shift == 8:
            # one bit higher, a cubic code needs one instruction less
            shift, place = shift - 1, place + 1
        middle = (2**bits - 1) / 2
        mask = _twice((15 if bits == 4 else 3) << place)
        lines.append(f"lop3.b32 low, {shifted(count, shift)}, {mask}, 0x64006400, 0xEA;")
        if bits == 3:
            # the top bit of slot j, moved to where it stands above the two others
            top = shifted(count + 1, j - place - 2)
            lines.append(f"lop3.b32 low, {top}, {_twice(4 << place)}, low, 0xEA;")
        if book:
            # t, exactly: the 11 bits of float16 do not hold 1024 and a half
            if place == 0:
                lines += [f"mov.b32 one, {_halves(-1024)};", f"mov.b32 two, {_halves(-middle)};"]
                lines += ["add.rn.f16x2 low, low, one;", "add.rn.f16x2 low, low, two;"]
            else:
                step = 2.0**-place
                lines += [f"mov.b32 one, {_halves(step)};", f"mov.b32 two, {_halves(-1024 * step - middle)};"]
                lines += ["fma.rn.f16x2 low, low, one, two;"]
            lines += [f"mov.b32 three, {_twice(book >> 16)};", f"mov.b32 two, {_twice(book & 0xFFFF)};"]
            lines += ["mul.rn.f16x2 one, low, low;", "fma.rn.f16x2 one, one, two, three;"]
            lines += ["mul.rn.f16x2 low, low, one;"]
        lines.append(f"mov.b32 ${j}, low;")
    return "\n".join(["{", f".reg .b32 {', '.join(registers)};", *lines, "}"])


def _twice(bits: int) -> str:
    """16 bits in both halves of a register."""
    return f"0x{bits * 0x10001:08x}"


def _halves(number: float) -> str:
    return _twice(int.from_bytes(struct.pack("<e", number), "little"))


@triton.constexpr_function
def constraints(bits):
    """Registers: those written, then those read."""
    return ",".join(["=r"] * slots(bits) + ["r"] * (1 + (bits == 3)))


@triton.jit
def numbers(words, tops, BITS: tl.constexpr, BOOK: tl.constexpr, ASM: tl.constexpr):
    """The slots of `words`: 1024 + factor * code; or with a BOOK the levels t (a + b t²), t = code - (2^BITS - 1) / 2.

    `tops` (16 bits wide, 8 of them used) are the top bits of 3-bit codes. ASM is `assembly(BITS, BOOK)`, or empty.
    """
    if ASM != "":
        return tl.inline_asm_elementwise(
            ASM,
            constraints(BITS),
            args=(words, tops) if BITS == 3 else (words,),
            dtype=(tl.float16,) * slots(BITS),
            is_pure=True,
            pack=2,
        )
    else:
        found = ()
        for j in tl.static_range(slots(BITS)):
            bits = (words >> slot_shift(j, BITS)) & ((15 if BITS == 4 else 3) << slot_place(j, BITS))
            if BITS == 3:
                bits = bits | ((tops >> j & 1) << (slot_place(j, BITS) + 2))
            number = (bits | 0x6400).to(tl.uint16).to(tl.float16, bitcast=True)
            if BOOK:
                if slot_place(j, BITS) == 0:
                    t = (number - 1024) - (2**BITS - 1) / 2
                else:
                    t = number * slot_step(j, BITS) - slot_middle(j, BITS)
                a = tl.full([], BOOK >> 16, tl.uint16).to(tl.float16, bitcast=True)
                b = tl.full([], BOOK & 0xFFFF, tl.uint16).to(tl.float16, bitcast=True)
                number = t * (t * t * b + a)
            found = found + (number,)
        return found
