"""Video: which frames, when, with what sound; seeking finds the same frames as playing; bad files."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest
from PIL import Image
from support.media import encode_video, number_of, numbered_frames, tone

from iolite.errors import MediaError
from iolite.media.image import image_patches
from iolite.media.limits import Limits
from iolite.media.video import decode_video, sample_indices, timestamp_text


@pytest.mark.parametrize("total", [1, 5, 31, 32, 33, 100, 719, 7200])
@pytest.mark.parametrize("count", [1, 2, 7, 32])
def test_indices_equal_the_reference(reference, total: int, count: int) -> None:
    if count > total:
        assert sample_indices(total, count) == list(
            range(total)
        )  # the reference refuses; all frames are what was meant
        return
    from transformers.video_utils import VideoMetadata

    want = reference.video().sample_frames(VideoMetadata(total_num_frames=total, fps=24.0), num_frames=count)
    assert sample_indices(total, count) == want.tolist()


@pytest.mark.parametrize("fps", [0.5, 1, 2, 24])
def test_frames_per_second_equal_the_reference(reference, fps: float) -> None:
    from transformers.video_utils import VideoMetadata

    data = encode_video(numbered_frames(100), 24)
    want = reference.video(num_frames=None).sample_frames(VideoMetadata(total_num_frames=100, fps=24.0), fps=fps)
    assert [number_of(frame) for frame in decode_video(data, fps=fps).frames] == want.tolist()


def test_patches_and_stamps_equal_the_reference(reference, tmp_path) -> None:
    """The reference reads the same file through PyAV, samples it, and resizes to its budget per frame."""
    from transformers.video_utils import read_video_pyav

    path = tmp_path / "clip.mp4"
    path.write_bytes(encode_video(numbered_frames(90, 120, 200), 30))
    processor = reference.video(max_soft_tokens=70, num_frames=8)
    frames, metadata = read_video_pyav(str(path), lambda metadata, **_: processor.sample_frames(metadata, num_frames=8))
    want = processor(videos=[frames], do_sample_frames=False, return_tensors="pt")
    video = decode_video(path, num_frames=8)
    np.testing.assert_array_equal(np.stack(video.frames), frames)
    np.testing.assert_allclose(video.timestamps, metadata.timestamps, atol=1e-9)
    for index, frame in enumerate(video.frames):
        patches = image_patches(frame, max_soft_tokens=70)
        count = len(patches.pixels)
        assert count == want["num_soft_tokens_per_video"][0]
        np.testing.assert_allclose(
            patches.pixels, want["pixel_values_videos"][index][:count].numpy(), rtol=0, atol=1e-6
        )
        np.testing.assert_array_equal(patches.positions, want["video_position_ids"][index][:count].numpy())


@pytest.mark.parametrize(
    ("container", "codec", "fps"),
    [
        ("mp4", "libx264", 24),
        ("mp4", "mpeg4", 30),
        ("webm", "libvpx-vp9", 30),
        ("avi", "mpeg4", 25),
        ("matroska", "ffv1", 24),
        ("mpegts", "libx264", 25),
        ("gif", "gif", 10),
    ],
)
def test_containers(container: str, codec: str, fps: int) -> None:
    video = decode_video(encode_video(numbered_frames(50), fps, container, codec), num_frames=10)
    shown = [number_of(frame) for frame in video.frames]
    # GIF's palette is too coarse for the codes; that its frames differ and are as many has to do.
    assert shown == sample_indices(50, 10) if codec != "gif" else len(set(shown)) > 4
    np.testing.assert_allclose(video.timestamps, np.arange(10) * 5 / fps, atol=1e-6)
    assert video.audio is None


@pytest.mark.parametrize(("container", "codec"), [("mp4", "libx264"), ("matroska", "libx264"), ("webm", "libvpx")])
@pytest.mark.parametrize("gop", [1, 7, 250])
def test_seeking_finds_the_frames_that_playing_finds(container: str, codec: str, gop: int) -> None:
    data = encode_video(numbered_frames(250), 25, container, codec, gop=gop)
    for count in (3, 40, 249):
        video = decode_video(data, num_frames=count)
        assert [number_of(frame) for frame in video.frames] == sample_indices(250, count)


def test_short_videos_give_all_their_frames() -> None:
    video = decode_video(encode_video(numbered_frames(3), 24), num_frames=32)
    assert [number_of(frame) for frame in video.frames] == [0, 1, 2]


@pytest.mark.parametrize("container", ["mp4", "webm"])
def test_the_sound_track_comes_along(container: str) -> None:
    codec = "libx264" if container == "mp4" else "libvpx"
    data = encode_video(numbered_frames(48), 24, container, codec, sound=tone(48000, 2.0, 2))
    video = decode_video(data, num_frames=2)
    assert video.audio is not None
    assert abs(len(video.audio) - 32000) < 350  # within a packet
    np.testing.assert_allclose(video.audio[2000:30000], tone(16000, 2.0)[0, 2000:30000], atol=0.05)


def test_odd_sizes_have_no_padding_in_their_rows() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 33, 37, 3), dtype=np.uint8)
    video = decode_video(encode_video(frames, 10, "matroska", "ffv1"))
    np.testing.assert_array_equal(np.stack(video.frames), frames)


def test_phones_turn_their_videos() -> None:
    """Four matrices in an MP4's track header tell how the camera was held."""
    frames = np.zeros((3, 48, 96, 3), np.uint8)
    frames[:, :, :48] = 255  # the left half is white
    data = bytearray(encode_video(frames, 24))
    straight = b"".join(x.to_bytes(4, "big", signed=True) for x in (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30))
    quarter = b"".join(x.to_bytes(4, "big", signed=True) for x in (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30))
    place = data.rindex(straight)  # the first is the movie's own
    data[place : place + 36] = quarter
    frame = decode_video(bytes(data)).frames[0]
    assert frame.shape == (96, 48, 3)
    assert frame[:40].mean() > 240  # turned by 90 degrees clockwise, left is above
    assert frame[-40:].mean() < 15


def test_frames_of_uneven_length_keep_their_times() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as output:
        stream = output.add_stream("ffv1", rate=10, width=16, height=16, pix_fmt="bgr0")
        for stamp in (0, 1, 2, 50, 100):
            frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
            frame.pts = stamp
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    assert decode_video(buffer.getvalue()).timestamps[-2:] == [5.0, 10.0]


# --------------------------------------------------------------------------------------------- lists, stamps


def test_a_list_of_frames(tmp_path) -> None:
    frames = numbered_frames(3)
    path = tmp_path / "frame.png"
    Image.fromarray(frames[1]).save(path)
    video = decode_video([frames[0], path, Image.fromarray(frames[2])], fps=2)
    np.testing.assert_array_equal(np.stack(video.frames), frames)
    assert video.timestamps == [0.0, 0.5, 1.0]
    assert decode_video(frames).timestamps == [0, 1 / 24, 2 / 24]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "00:00"), (0.999, "00:00"), (59.99, "00:59"), (60, "01:00"), (754.2, "12:34"), (6000, "100:00")],
)
def test_stamps(seconds: float, text: str) -> None:
    assert timestamp_text(seconds) == text


# ------------------------------------------------------------------------------------------------- refusals


def test_damaged_files() -> None:
    mp4 = encode_video(numbered_frames(60), 24)
    webm = encode_video(numbered_frames(60), 24, "webm", "libvpx")
    for data in (b"\0", b"hello, world", mp4[: len(mp4) // 2], webm[: len(webm) // 2]):
        with pytest.raises(MediaError, match=r"^the video (cannot be read|is cut short)"):
            decode_video(data)
    with pytest.raises(MediaError, match="0 bytes"):
        decode_video(b"")
    with pytest.raises(MediaError, match="no frames"):
        decode_video([])


def test_a_song_is_no_video() -> None:
    from support.media import encode_audio

    with pytest.raises(MediaError, match="has no picture track"):
        decode_video(encode_audio(tone(16000, 0.5), 16000, "wav", "pcm_s16le", "mono"))


def test_limits() -> None:
    data = encode_video(numbered_frames(72), 24)
    for limits, message in [
        (Limits(max_pixels=3071), "64 x 48 pixels; the limit is 3,071"),
        (Limits(max_video_seconds=2), "lasts 3.0 s or more; the limit is 2 s"),
        (Limits(max_frames=31), "would give 32 frames; the limit is 31"),
        (Limits(max_video_pixels=98_303), "32 frames of 64 x 48 pixels; the limit is 98,303"),
        (Limits(max_bytes=100), "the limit is 100"),
    ]:
        with pytest.raises(MediaError, match=message):
            decode_video(data, limits=limits)
    for limits in (Limits(max_frames=2), Limits(max_video_pixels=3 * 48 * 64 - 1), Limits(max_pixels=100)):
        with pytest.raises(MediaError, match="the limit is"):
            decode_video(numbered_frames(3), limits=limits)
    for options in ({"num_frames": 0}, {"fps": 0.0}, {"fps": float("nan")}):
        with pytest.raises(MediaError, match="one frame at least"):
            decode_video(data, **options)
