"""How codes of encoded rows become numbers that tensor cores multiply.

Codes of 4 bits lie two to a byte, of dimension `i` below and of `i + D / 2` above. Keys are
multiplied as whole numbers of 8 bits, as they are or after one shift. Values are weighted, so they
become float16: the bits of a code in the mantissa of 1024 are a number, less what stands above it.
Two neighbouring bytes are read as one number of 16 bits, which is how tensor cores want rows laid
out that are summed over.
"""

import triton
import triton.language as tl

KEY_NIBBLES = tl.constexpr("""{
    .reg .b32 above;
    shr.u32 above, $2, 4;
    and.b32 $0, $2, 0x0F0F0F0F;
    and.b32 $1, above, 0x0F0F0F0F;
}""")
VALUE_NIBBLES = tl.constexpr("""{
    .reg .b32 a, b, c, less;
    mov.b32 less, 0xE478E478;
    shl.b32 a, $4, 4;
    shr.u32 b, $4, 4;
    shr.u32 c, $4, 8;
    lop3.b32 a, a, 0x00F000F0, 0x64006400, 0xEA;
    lop3.b32 $1, $4, 0x00F000F0, 0x64006400, 0xEA;
    lop3.b32 b, b, 0x00F000F0, 0x64006400, 0xEA;
    lop3.b32 c, c, 0x00F000F0, 0x64006400, 0xEA;
    add.f16x2 $0, a, less;
    add.f16x2 $1, $1, less;
    add.f16x2 $2, b, less;
    add.f16x2 $3, c, less;
}""")
VALUE_BYTES = tl.constexpr("""{
    .reg .b32 a, b, less;
    mov.b32 less, 0xE480E480;
    shr.u32 b, $2, 8;
    lop3.b32 a, $2, 0x00FF00FF, 0x64806480, 0x6A;
    lop3.b32 b, b, 0x00FF00FF, 0x64806480, 0x6A;
    add.f16x2 $0, a, less;
    add.f16x2 $1, b, less;
}""")
"""The same as below in instructions for two numbers at once, which the compiler does not find."""


@triton.jit
def key_parts(codes, BITS: tl.constexpr, PTX: tl.constexpr):
    """Codes `[N, D * BITS / 8]` of keys as int8: those of the lower dimensions, and of the upper.

    Of 8 bits there is one part.
    """
    if BITS == 8:
        return (codes,)
    elif PTX:
        return tl.inline_asm_elementwise(
            KEY_NIBBLES, "=&r,=&r,r", [codes], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    else:
        return (codes & 15).to(tl.int8), (codes >> 4).to(tl.int8)


@triton.jit
def value_part(codes, shift: tl.constexpr, BITS: tl.constexpr):
    """float16 of the codes whose bits begin at `shift` of int16 pairs or quadruples of codes."""
    if BITS == 8:
        bits = ((codes.to(tl.int32) >> shift) & 0xFF) ^ 0x6480
        return bits.to(tl.int16).to(tl.float16, bitcast=True) - 1152.0
    else:
        bits = ((codes.to(tl.int32) << 4 >> shift) & 0xF0) | 0x6400
        return bits.to(tl.int16).to(tl.float16, bitcast=True) - 1144.0


@triton.jit
def value_parts(codes, BITS: tl.constexpr, PTX: tl.constexpr):
    """Codes `[N, D * BITS / 16]` of values as float16 levels, those of 4 bits 16 times too large.

    Part `p` of 4 has the dimensions `2 i + p // 2`, in the upper half if `p` is odd; part `p` of 2
    has `2 i + p`.
    """
    if BITS == 8 and PTX:
        return tl.inline_asm_elementwise(
            VALUE_BYTES, "=&r,=&r,r", [codes], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    elif BITS == 8:
        return value_part(codes, 0, 8), value_part(codes, 8, 8)
    elif PTX:
        return tl.inline_asm_elementwise(
            VALUE_NIBBLES, "=&r,=&r,=&r,=&r,r", [codes],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return (
            value_part(codes, 0, 4),
            value_part(codes, 4, 4),
            value_part(codes, 8, 4),
            value_part(codes, 12, 4),
        )


@triton.jit
def part_dims(place, part: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr):
    """Dimensions of numbers `place` of a part of the values."""
    if BITS == 8:
        return 2 * place + part
    else:
        return 2 * place + part // 2 + (part % 2) * (D // 2)


@triton.jit
def add_parts(sums, decay, unit, weight, levels, BITS: tl.constexpr):
    """Sums of all parts, with weighted levels of one more tile."""
    if BITS == 8:
        return (
            sums[0] * decay + unit * tl.dot(weight, levels[0]),
            sums[1] * decay + unit * tl.dot(weight, levels[1]),
        )
    else:
        step = unit / 16
        return (
            sums[0] * decay + step * tl.dot(weight, levels[0]),
            sums[1] * decay + step * tl.dot(weight, levels[1]),
            sums[2] * decay + step * tl.dot(weight, levels[2]),
            sums[3] * decay + step * tl.dot(weight, levels[3]),
        )
