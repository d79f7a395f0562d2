"""Sound: exact samples where nothing needs resampling, frames as Transformers cuts them, every format, bad files."""

from __future__ import annotations

import io
import struct
import wave

import numpy as np
import pytest
from support.media import encode_audio, tone

from iolite.errors import MediaError
from iolite.media.audio import audio_frames, decode_audio
from iolite.media.limits import Limits


def wav(samples: np.ndarray, rate: int = 16000, channels: int = 1, width: int = 2) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes(samples.tobytes())
    return buffer.getvalue()


# -------------------------------------------------------------------------------------------------- frames


@pytest.mark.parametrize("count", [1, 624, 639, 640, 641, 1279, 1280, 1281, 16000, 480_000, 496_001])
def test_frames_equal_the_reference(reference, count: int) -> None:
    samples = np.random.default_rng(count).standard_normal(count).astype(np.float32)
    want = reference.audio()(samples, return_tensors="np")
    ours = audio_frames(samples)
    assert want["input_features_mask"].all()
    np.testing.assert_array_equal(ours, want["input_features"][0])
    assert len(ours) == -(-count // 640)
    assert ours.dtype == np.float32


def test_only_the_end_is_padded() -> None:
    frames = audio_frames(np.ones(641, np.float32))
    assert frames.sum() == 641
    assert frames[1, 0] == 1


def test_no_samples_are_an_error() -> None:
    for nothing in (np.zeros(0, np.float32), np.zeros((0, 2), np.float32)):
        with pytest.raises(MediaError, match="no samples"):
            audio_frames(nothing.reshape(-1))
        with pytest.raises(MediaError, match="no samples"):
            decode_audio(nothing, sampling_rate_in=16000)
    with pytest.raises(MediaError, match="no samples"):
        decode_audio(wav(np.zeros(0, np.int16)))


# ------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("count", [624, 640, 641, 6400, 16001])
def test_sixteen_bit_wav_is_exact(count: int) -> None:
    samples = np.random.default_rng(count).integers(-32768, 32768, count).astype(np.int16)
    got = decode_audio(wav(samples))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, samples / np.float32(32768))
    np.testing.assert_array_equal(decode_audio(samples, sampling_rate_in=16000), got)


def test_float_and_24_bit_wav_are_exact() -> None:
    samples = np.random.default_rng(0).uniform(-1, 1, 5000).astype(np.float32)
    np.testing.assert_array_equal(decode_audio(encode_audio(samples[None], 16000, "wav", "pcm_f32le", "mono")), samples)
    whole = np.random.default_rng(0).integers(-(2**23), 2**23, 3000)
    packed = np.frombuffer(b"".join(int(x).to_bytes(3, "little", signed=True) for x in whole), np.uint8)
    np.testing.assert_array_equal(decode_audio(wav(packed, width=3)), (whole / 2**23).astype(np.float32))


def test_silence_stays_silence() -> None:
    assert not decode_audio(wav(np.zeros(16000, np.int16))).any()
    assert not decode_audio(wav(np.zeros(44100, np.int16), rate=44100)).any()


def test_channels_are_averaged() -> None:
    left, right = np.full(800, 16384, np.int16), np.full(800, -8192, np.int16)
    got = decode_audio(wav(np.stack([left, right], axis=1), channels=2))
    np.testing.assert_array_equal(got, np.full(800, 0.125, np.float32))
    for array in (np.stack([left, right], axis=1), np.stack([left, right])):
        np.testing.assert_array_equal(decode_audio(array, sampling_rate_in=16000), got)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 32000, 44100, 48000, 96000, 192000])
def test_other_rates(rate: int) -> None:
    got = decode_audio(encode_audio(tone(rate, 1.0), rate, "wav", "pcm_f32le", "mono"))
    assert abs(len(got) - 16000) <= 1
    # The resampler's filter ripples by well under 1e-3 in the pass band; its ends see the silence around the sound.
    np.testing.assert_allclose(got[500:15500], tone(16000, 1.0)[0, 500:15500], atol=1e-3)
    array = decode_audio(tone(rate, 1.0)[0], sampling_rate_in=rate)
    np.testing.assert_array_equal(array, got)


@pytest.mark.parametrize(
    ("container", "codec", "rate", "layout", "tolerance"),
    [
        ("flac", "flac", 44100, "stereo", 1e-3),
        ("wav", "pcm_s24le", 48000, "5.1", 1e-3),
        ("wav", "pcm_u8", 22050, "mono", 0.02),  # 1/128 of a level and its dither
        ("aiff", "pcm_s16be", 44100, "stereo", 1e-3),
        ("mp3", "libmp3lame", 44100, "stereo", 0.05),  # lossy: this tone comes back within a tenth of its height
        ("ogg", "libopus", 48000, "mono", 0.05),
        ("webm", "libopus", 48000, "stereo", 0.05),
        ("ipod", "aac", 44100, "stereo", 0.05),
        ("matroska", "ac3", 48000, "5.1", 0.1),  # its sixth channel has no tone of this height
    ],
)
def test_formats(container: str, codec: str, rate: int, layout: str, tolerance: float) -> None:
    channels = {"mono": 1, "stereo": 2, "5.1": 6}[layout]
    got = decode_audio(encode_audio(tone(rate, 1.0, channels), rate, container, codec, layout))
    assert 15900 <= len(got) <= 16400  # codecs of packets may add part of a packet, and 1.5 ms of a filter's delay
    want = tone(16000, 1.0)[0, 2000:14000]
    np.testing.assert_allclose(got[2000:14000], want, atol=tolerance)


def test_mp4_is_as_long_as_it_says() -> None:
    """Its last packet is filled up with silence, which would be one frame too many."""
    got = decode_audio(encode_audio(tone(44100, 1.0), 44100, "ipod", "aac", "mono"))
    assert len(audio_frames(got)) == 25


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.uint8, np.float64])
def test_arrays_of_other_types(dtype: type) -> None:
    full = {np.int16: 32768, np.int32: 2**31, np.uint8: 128, np.float64: 1}[dtype]
    array = np.array([0.5, -0.5, 0.25, 0.0] * 10) * full + (128 if dtype == np.uint8 else 0)
    np.testing.assert_array_equal(decode_audio(array.astype(dtype), sampling_rate_in=16000)[:4], [0.5, -0.5, 0.25, 0])


# ------------------------------------------------------------------------------------------------- refusals


def test_damaged_files() -> None:
    flac = encode_audio(tone(44100, 1.0), 44100, "flac", "flac", "mono")
    mp4 = encode_audio(tone(44100, 1.0), 44100, "ipod", "aac", "mono")
    for data in (
        b"\0",
        b"hello, world",
        flac[: len(flac) // 2],
        mp4[: len(mp4) // 2],
        flac[:200] + bytes(len(flac) - 200),
    ):
        with pytest.raises(MediaError, match=r"^the sound (cannot be read|is cut short)") as caught:
            decode_audio(data)
        assert caught.value.hint


def test_a_wav_cut_short_is_not_played_to_the_cut() -> None:
    data = wav(np.ones(16000, np.int16))
    with pytest.raises(MediaError, match="cut short: its header tells of more than the 20,000 bytes"):
        decode_audio(data[:20000])
    webm = encode_audio(tone(48000, 1.0), 48000, "webm", "libopus", "mono")
    with pytest.raises(MediaError, match="cut short"):
        decode_audio(webm[: len(webm) // 2])


def test_a_wav_from_a_pipe_does_not_know_its_length() -> None:
    samples = np.arange(1000, dtype=np.int16)
    data = bytearray(wav(samples))
    data[4:8] = data[40:44] = struct.pack("<I", 0xFFFFFFFF)
    np.testing.assert_array_equal(decode_audio(bytes(data)), samples / np.float32(32768))


def test_a_picture_has_no_sound() -> None:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "GIF")
    with pytest.raises(MediaError, match="has no sound track"):
        decode_audio(buffer.getvalue())


def test_limits() -> None:
    with pytest.raises(MediaError, match=r"lasts 2.0 s or more; the limit is 1 s"):
        decode_audio(wav(np.zeros(32000, np.int16)), limits=Limits(max_audio_seconds=1))
    with pytest.raises(MediaError, match=r"lasts 2.0 s or more; the limit is 1 s"):
        decode_audio(np.zeros(32000), sampling_rate_in=16000, limits=Limits(max_audio_seconds=1))
    # A header that lies about the length: the samples are counted too.
    data = bytearray(encode_audio(tone(44100, 3.0), 44100, "flac", "flac", "mono"))
    data[21:26] = bytes([data[21] & 0xF0, 0, 0, 0, 100])
    with pytest.raises(MediaError, match="the limit is 2 s"):
        decode_audio(bytes(data), limits=Limits(max_audio_seconds=2))


def test_arrays_that_are_no_sound() -> None:
    with pytest.raises(MediaError, match="sampling rate is not given"):
        decode_audio(np.zeros(100))
    with pytest.raises(MediaError, match="not believable"):
        decode_audio(np.zeros(100), sampling_rate_in=16)
    with pytest.raises(MediaError, match="is not a sound"):
        decode_audio(np.zeros((20, 20)), sampling_rate_in=16000)
    with pytest.raises(MediaError, match="an array of int64"):
        decode_audio(np.array([1000, -1000] * 100, np.int64), sampling_rate_in=16000)
    with pytest.raises(MediaError, match="not numbers"):
        decode_audio(np.array([0.0, np.nan, 0.0]), sampling_rate_in=16000)


def test_half_a_minute_and_twelve() -> None:
    for seconds in (30, 31, 720):
        assert len(audio_frames(decode_audio(wav(np.zeros(16000 * seconds, np.int16))))) == 25 * seconds
