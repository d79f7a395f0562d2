"""The block codes of GGUF, against ggml's rules written out value by value, and (marked `peer`) against ggml itself."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from iolite.checkpoint import gguf_blocks
from iolite.checkpoint.gguf import TYPES, tensor_bytes
from iolite.checkpoint.gguf_blocks import DECODED, PACKED, decode_blocks, dequantize, encode, repack
from iolite.errors import CheckpointError
from iolite.quant import formats

EXACT = ("Q4_0", "Q4_1", "Q5_0", "Q8_0")
ROUNDED = ("Q5_1", "Q5_K", "Q6_K")

# Where a block's fp16 numbers lie.
HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}


def random_raw(kind, rows, cols, seed=0, largest=8.0):
    """Blocks of random bytes, but for their fp16 numbers: of either sign, from `largest` down to fp16's smallest."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows * cols // TYPES[kind].values, TYPES[kind].nbytes), dtype=np.uint8)
    for at in HALVES[kind]:
        values = largest * 2.0 ** -rng.integers(0, 27, len(raw)) * rng.uniform(-1, 1, len(raw))
        raw[:, at : at + 2] = values.astype(np.float16)[:, None].view(np.uint8)
    return torch.from_numpy(raw.reshape(-1))


def half(block, at):
    return struct.unpack_from("<e", block, at)[0]


def six_bits(block, g):
    """get_scale_min_k4 of ggml-quants.c, for the group g of 8."""
    q = block[4:16]
    if g < 4:
        return q[g] & 63, q[g + 4] & 63
    return (q[g + 4] & 15) | (q[g - 4] >> 6 << 4), (q[g + 4] >> 4) | (q[g] >> 6 << 4)


def weight(kind, block, i):
    """Value i of a block, in Python's float64, which holds all these products and sums exactly."""
    d, j = half(block, HALVES[kind][0]), i % 16
    shift = 4 if i % 32 >= 16 else 0
    if kind == "Q4_0":
        return d * ((block[2 + j] >> shift & 15) - 8)
    if kind == "Q4_1":
        return d * (block[4 + j] >> shift & 15) + half(block, 2)
    if kind == "Q5_0":
        fifth = struct.unpack_from("<I", block, 2)[0] >> i & 1
        return d * ((block[6 + j] >> shift & 15 | fifth << 4) - 16)
    if kind == "Q5_1":
        fifth = struct.unpack_from("<I", block, 4)[0] >> i & 1
        return d * (block[8 + j] >> shift & 15 | fifth << 4) + half(block, 2)
    if kind == "Q8_0":
        return d * struct.unpack_from("b", block, 2 + i)[0]
    if kind == "Q6_K":
        n, k, quarter = i // 128, i % 32, i % 128 // 32
        low = block[64 * n + k + 32 * (quarter % 2)] >> 4 * (quarter // 2) & 15
        high = block[128 + 32 * n + k] >> 2 * quarter & 3
        return d * struct.unpack_from("b", block, 192 + i // 16)[0] * ((low | high << 4) - 32)
    g, k = i // 32, i % 32
    scale, minimum = six_bits(block, g)
    q = block[(16 if kind == "Q4_K" else 48) + 32 * (g // 2) + k] >> 4 * (g % 2) & 15
    if kind == "Q5_K":
        q |= (block[16 + k] >> g & 1) << 4
    return d * scale * q - half(block, 2) * minimum


def weights(kind, raw):
    """Every value of a tensor, float64."""
    size, values = TYPES[kind].nbytes, TYPES[kind].values
    data = raw.numpy().tobytes()
    blocks = [data[at : at + size] for at in range(0, len(data), size)]
    return torch.tensor([weight(kind, block, i) for block in blocks for i in range(values)], dtype=torch.float64)


@pytest.mark.parametrize("kind", PACKED)
def test_dequantize_is_the_rule_rounded_once(kind):
    raw = random_raw(kind, 6, 512)
    ours = dequantize(raw, kind, (6, 2, 256))
    assert ours.shape == (6, 2, 256)
    # No step but the last addition rounds, so float32 of the exact value is the one right answer.
    assert torch.equal(ours.flatten(), weights(kind, raw).float())


def test_dequantize_in_several_runs(monkeypatch):
    raw = random_raw("Q6_K", 5, 512)
    whole = dequantize(raw, "Q6_K", (5, 512))
    monkeypatch.setattr(gguf_blocks, "_CHUNK", 768)
    assert torch.equal(dequantize(raw, "Q6_K", (5, 512)), whole)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_plain_values(kind):
    values = torch.tensor([[0.0, 1.0, -2.5], [2.0**-14, 2.0**-20, -96.0]])
    assert torch.equal(dequantize(encode(values, kind), kind, (2, 3)), values)


def test_blocks_by_hand():
    quants = [8, 9, 0, 15] * 4, [7, 8, 15, 1] * 4  # of the columns 0 to 15 and 16 to 31
    nibbles = bytes(low | high << 4 for low, high in zip(*quants, strict=True))
    raw = torch.frombuffer(bytearray(struct.pack("<e", -0.5) + nibbles), dtype=torch.uint8)
    expected = [0, -0.5, 4, -3.5] * 4 + [0.5, 0, -3.5, 3.5] * 4
    assert dequantize(raw, "Q4_0", (32,)).tolist() == expected
    blocks = decode_blocks(raw, "Q4_0", 1, 32)
    assert blocks.scales.item() == -0.5
    assert blocks.quants.tolist() == [quants[0] + quants[1]]
    raw = torch.frombuffer(bytearray(struct.pack("<e32b", 0.25, *range(-128, -96))), dtype=torch.uint8)
    assert dequantize(raw, "Q8_0", (32,)).tolist() == [q / 4 for q in range(-128, -96)]
    assert decode_blocks(raw, "Q8_0", 1, 32).quants.tolist() == [list(range(-128, -96))]


@pytest.mark.parametrize("kind", EXACT)
def test_decode_blocks_loses_nothing(kind):
    raw = random_raw(kind, 7, 96)
    blocks = decode_blocks(raw, kind, 7, 96)
    assert blocks.format is PACKED[kind]
    assert blocks.quants.shape == (7, 96)
    assert torch.equal(formats.decode(blocks), dequantize(raw, kind, (7, 96)))
    assert (blocks.scales < 0).any()  # scales keep their sign
    if kind == "Q8_0":
        assert blocks.quants.min() == -128


def exactly(blocks):
    """What int4m and int8 blocks stand for, float64 [R, B, 32], and the scales [R, B, 1]."""
    quants = blocks.quants.double().unflatten(1, (-1, 32))
    scales = blocks.scales.double()[..., None]
    return quants * scales + (0 if blocks.mins is None else blocks.mins.double()[..., None]), scales


@pytest.mark.parametrize("largest", [8.0, 0.001])  # 0.001: most products are subnormal in fp16
def test_q4_k_is_rounded_as_documented(largest):
    raw = random_raw("Q4_K", 16, 512, largest=largest)
    blocks = decode_blocks(raw, "Q4_K", 16, 512)
    ours, _ = exactly(blocks)
    error = (ours - weights("Q4_K", raw).view(16, 16, 32)).abs()
    # Half an fp16 step of the value before rounding; |x| <= |rounded| * (1 + 2**-11) + 2**-25.
    slack = [(t.double().abs() * (1 + 2**-10) * 2**-11).clamp_(min=2**-25) for t in (blocks.scales, blocks.mins)]
    bound = slack[0][..., None] * blocks.quants.double().unflatten(1, (-1, 32)) + slack[1][..., None]
    assert (error <= bound).all()
    assert error.max() > 0


@pytest.mark.parametrize("largest", [8.0, 0.001])
@pytest.mark.parametrize("kind", ROUNDED)
def test_requantised_values_are_half_a_step_off_at_most(kind, largest):
    raw = random_raw(kind, 16, 512, largest=largest)
    reference = weights(kind, raw).view(16, 16, 32)
    ours, scales = exactly(decode_blocks(raw, kind, 16, 512))
    # Beside half a step there is what float32 rounds: the weight itself and the quotient, 127 * 2**-23 steps or less.
    assert ((ours - reference).abs() <= scales / 2 * (1 + 2**-14)).all()
    # The step is the largest magnitude / 127, rounded to fp16 (2**-11 of it, or 2**-25) and perhaps one step up.
    steps = reference.abs().amax(-1, keepdim=True) / 127
    assert (scales <= steps * (1 + 3 * 2**-11) + 3 * 2**-25).all()


def test_blocks_of_zeros():
    for kind in PACKED:
        raw = torch.zeros(tensor_bytes((3, 256), kind), dtype=torch.uint8)
        assert (formats.decode(decode_blocks(raw, kind, 3, 256)) == 0).all()


@pytest.mark.parametrize("kind", PACKED)
def test_repack_is_decode_and_pack(kind, monkeypatch):
    raw = random_raw(kind, 37, 512)
    expected = formats.pack(decode_blocks(raw, kind, 37, 512))
    monkeypatch.setattr(gguf_blocks, "_CHUNK", 16 * 512)  # runs of 16 rows, the last of 5
    packed = repack(raw, kind, 37, 512)
    assert packed.shape == (37, 512)
    assert packed.format is PACKED[kind]
    assert torch.equal(packed.data, expected.data)
    assert torch.equal(formats.decode(decode_blocks(raw, kind, 37, 512)), packed.to_float())


def test_damaged_scales_are_refused():
    for number in (math.inf, -math.inf, math.nan):
        for kind, places in HALVES.items():
            for at in places:
                raw = random_raw(kind, 1, 256)
                raw[at : at + 2] = torch.frombuffer(bytearray(struct.pack("<e", number)), dtype=torch.uint8)
                raw[4:16] = 255 if kind.endswith("_K") else raw[4:16]  # no scale of a group is 0
                with pytest.raises(CheckpointError, match="not finite"):
                    decode_blocks(raw, kind, 1, 256)
    raw = random_raw("Q4_K", 1, 256)
    raw[:16] = torch.frombuffer(bytearray(struct.pack("<2e", 60000, 1) + b"\xff" * 12), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="too large"):  # 60000 * 63 is finite, but not in fp16
        decode_blocks(raw, "Q4_K", 1, 256)


def test_types_that_are_not_decoded():
    for kind in sorted(set(TYPES) - set(DECODED)):
        raw = torch.zeros(tensor_bytes((1, 256), kind), dtype=torch.uint8)
        with pytest.raises(CheckpointError, match=f"type {kind} are not supported"):
            dequantize(raw, kind, (1, 256))
        with pytest.raises(CheckpointError, match=f"type {kind} are not supported"):
            decode_blocks(raw, kind, 1, 256)
    with pytest.raises(CheckpointError, match="F32 are not supported"):
        repack(torch.zeros(4, dtype=torch.uint8), "F32", 1, 1)
    with pytest.raises(ValueError, match="17 bytes are no Q4_0 tensor"):
        dequantize(torch.zeros(17, dtype=torch.uint8), "Q4_0", (1, 32))


# Encoding


def test_q4_0_by_hand():
    # The value of largest magnitude, 16, becomes -8: the scale is -2. Halves round up once divided: -1 / -2 = 0.5.
    values = [16.0, -1.0, 1.0, -15.0, -14.0, 0.0, 2.9, -16.0] + [4.0] * 24
    raw = encode(torch.tensor([values]), "Q4_0")
    assert half(raw.numpy().tobytes(), 0) == -2
    # (int)(v / -2 + 8.5), at most 15; of two equal magnitudes the first decides.
    expected = [0, 9, 8, 15, 15, 8, 7, 15] + [6] * 24
    assert decode_blocks(raw, "Q4_0", 1, 32).quants.tolist() == [expected]


def test_q8_0_by_hand():
    values = [127.0, 0.5, -0.5, 1.5, 2.5, -2.5, 0.49999997, -126.5] + [0.0] * 24
    raw = encode(torch.tensor([values]), "Q8_0")
    assert half(raw.numpy().tobytes(), 0) == 1
    assert raw.view(torch.int8)[2:].tolist() == [127, 1, -1, 2, 3, -3, 0, -127] + [0] * 24


def encode_by_rule(kind, block):
    """quantize_row_q4_0_ref and quantize_row_q8_0_ref of ggml-quants.c, in NumPy's float32, value by value."""
    f = np.float32
    peak = f(0)
    for v in block:
        if abs(peak) < abs(v):
            peak = v
    d = peak / f(-8) if kind == "Q4_0" else abs(peak) / f(127)
    inverse = f(1) / d if d else f(0)
    scale = np.float16(d).tobytes()
    if kind == "Q8_0":
        rounded = [math.floor(abs(float(v * inverse)) + 0.5) * (-1 if v * inverse < 0 else 1) for v in block]
        return scale + struct.pack("32b", *rounded)
    nibbles = [min(15, int(v * inverse + f(8.5))) for v in block]
    return scale + bytes(low | high << 4 for low, high in zip(nibbles[:16], nibbles[16:], strict=True))


def values_to_encode():
    """Random values of many sizes, ties, values on the lattice, zeros, and one that disappears in fp16."""
    rng = torch.Generator().manual_seed(1)
    rows = torch.randn(40, 64, generator=rng) * torch.logspace(-7, 3, 40)[:, None]
    rows[0] = 0
    rows[1] = torch.arange(64) % 17 - 8
    rows[2] = (torch.arange(64) % 16 - 8) * 0.013
    rows[3] = 1e-42
    rows[4, ::2] = 0.25
    rows[4, 1::2] = -0.25
    return rows


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_encode_follows_the_rule_bit_for_bit(kind, monkeypatch):
    rows = values_to_encode()
    by_rule = b"".join(encode_by_rule(kind, block) for block in np.delete(rows.numpy(), 3, 0).reshape(-1, 32))
    kept = torch.cat((rows[:3], rows[4:]))
    assert encode(kept, kind).numpy().tobytes() == by_rule
    monkeypatch.setattr(gguf_blocks, "_CHUNK", 96)
    assert encode(kept, kind).numpy().tobytes() == by_rule
    # 1e-42 has no inverse in float32 (the rule's result is undefined): it decodes to zero.
    assert (dequantize(encode(rows[3], kind), kind, (64,)) == 0).all()


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_encoding_what_was_decoded_changes_nothing(kind):
    raw = encode(values_to_encode(), kind)
    again = encode(dequantize(raw, kind, (40, 64)), kind)
    assert torch.equal(dequantize(again, kind, (40, 64)), dequantize(raw, kind, (40, 64)))


def test_weights_that_cannot_be_encoded():
    for value in (math.nan, math.inf, -math.inf, 1e30):
        for kind in ("Q4_0", "Q8_0", "F16"):
            with pytest.raises(ValueError, match="not finite"):
                encode(torch.full((1, 32), value), kind)
    with pytest.raises(ValueError, match="blocks of 32"):
        encode(torch.ones(32, 16), "Q4_0")


# ggml's own functions, where llama-cpp-python is installed


@pytest.fixture(scope="module")
def ggml():
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        pytest.skip("llama-cpp-python is not installed (make test-peers)")
    return ctypes.CDLL(str(next((Path(spec.origin).parent / "lib").glob("libggml-base.*"))))


def call(function, source, target, count):
    function.restype = None
    function(ctypes.c_void_p(source.data_ptr()), ctypes.c_void_p(target.data_ptr()), ctypes.c_int64(count))
    return target


@pytest.mark.peer
@pytest.mark.parametrize("kind", PACKED)
def test_dequantize_is_ggml_bit_for_bit(ggml, kind):
    raw = random_raw(kind, 64, 2048, seed=3)
    name = "dequantize_row_" + kind.lower().replace("_k", "_K")
    theirs = call(getattr(ggml, name), raw, torch.empty(64, 2048), 64 * 2048)
    assert torch.equal(dequantize(raw, kind, (64, 2048)).view(torch.int32), theirs.view(torch.int32))


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_encode_is_ggml_bit_for_bit(ggml, kind):
    rng = torch.Generator().manual_seed(2)
    random = torch.randn(512, 64, generator=rng) * torch.logspace(-7, 3, 512)[:, None]
    rows = torch.cat((values_to_encode()[:3], values_to_encode()[4:], random, random.bfloat16().float()))
    target = torch.empty(tensor_bytes(tuple(rows.shape), kind), dtype=torch.uint8)
    theirs = call(getattr(ggml, f"quantize_row_{kind.lower()}_ref"), rows, target, rows.numel())
    assert torch.equal(encode(rows, kind), theirs)
