"""The program that decodes foreign bytes, in a process of its own. `worker.py` starts it and reads its answers.

It imports the standard library, Pillow, PyAV and pypdfium2 only, so that it is up in well under a tenth of a second. A
request is a 4-byte length, a JSON object and the media bytes; the answer is JSON lines, those with a "shape" followed
by that array's raw bytes, until one says "end" or "refused". No text that a decoder wrote ever leaves this process,
except the words of a PDF.

On Linux the process that imports the decoders never touches foreign bytes: for every request it forks a copy of itself,
which limits its memory and processor time, gives up opening files and sockets, decodes, answers and exits. Elsewhere a
process serves one request.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import json
import math
import os
import sys
from bisect import bisect_right
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import av
    import pypdfium2
    from PIL import Image

Message = tuple[dict[str, Any], Any]  # an array's header, and a buffer of its bytes

# Formats that Pillow decodes by itself. Left out: EPS (starts Ghostscript), WMF (the system's GDI), FPX and MIC (OLE
# containers), IPTC and PCD (no size check of their own), and BUFR, GRIB, HDF5 and MPEG, which it only identifies.
IMAGE_FORMATS = [
    *("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "ICO", "ICNS", "PPM", "TGA", "PSD"),
    *("BLP", "CUR", "DCX", "DDS", "DIB", "FITS", "FLI", "FTEX", "GBR", "IM", "IMT", "MCIDAS", "MSP", "PCX", "PIXAR"),
    *("QOI", "SGI", "SPIDER", "SUN", "XBM", "XPM", "XVTHUMB"),
]

# FFmpeg's containers of one file. Left out: everything that reads other files or the network (concat, hls, dash,
# image2, sdp, rtsp, ...), devices, and formats without a signature of their own (raw samples, ADPCM of consoles, ...).
CONTAINERS = [
    *("wav", "flac", "mp3", "ogg", "mov", "matroska", "aac", "aiff", "au", "caf", "amr", "asf", "w64", "voc", "wv"),
    *("ac3", "eac3", "dts", "truehd", "ape", "tak", "tta", "mpc", "mpc8", "oma"),
    *("avi", "flv", "gif", "h264", "hevc", "ivf", "m4v", "mjpeg", "mpeg", "mpegts", "mpegvideo", "mxf", "nut", "obu"),
    "yuv4mpegpipe",
]
EXACT_LENGTH = {
    "w64",
    "flac",
    "aiff",
    "au",
    "caf",
    "mov",
    "matroska",
}  # whose headers tell the length, rather than guess it
SEEKABLE = {"mov", "matroska"}  # whose index leads to the right key frame

RATE = 16_000  # Hz, of all sound that leaves here
NO_WORDS = dict.fromkeys([*range(9), *range(11, 32), 0xFFFE, 0xFFFF])  # CR, and U+FFFE: where PDFium takes a hyphen out
SLACK = 0.1  # seconds by which a recording may fall short of its header: codecs' delays, not a cut file


class Refused(Exception):
    """Media that is not used: a code, which the parent has words for, and the numbers that belong into them."""

    def __init__(self, code: str, **values: float) -> None:
        super().__init__(code)
        self.code = code
        self.values = values


# --------------------------------------------------------------------------------------------------- pictures


def decode_image(data: bytes, request: dict[str, Any]) -> Iterator[Message]:
    """The first frame as RGB, upright, uint8 [H, W, 3]."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # the check below comes before decoding too, and can say the size
    formats = [name for name in IMAGE_FORMATS if name in Image.OPEN]
    with Image.open(io.BytesIO(data), formats=formats) as image:
        check_pixels(image.width, image.height, request["max_pixels"])
        Image.MAX_IMAGE_PIXELS = request["max_pixels"]  # for pictures within pictures: ICO, ICNS, DCX, ...
        image.load()
        rgb = to_rgb(image)
    check_pixels(rgb.width, rgb.height, request["max_pixels"])
    yield {"shape": [rgb.height, rgb.width, 3], "dtype": "uint8"}, rgb.tobytes()


def check_pixels(width: int, height: int, most: int) -> None:
    if width < 1 or height < 1:
        raise Refused("unreadable")
    if width * height > most:
        raise Refused("pixels", width=width, height=height)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow's to RGB: turned as EXIF says, transparency on white, more than 8 bits scaled to 8."""
    from PIL import Image

    image = _upright(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    elif image.mode == "LAB":
        from PIL import ImageCms

        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB") or image
    elif image.mode == "La":
        image = image.convert("LA")
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if "A" in image.getbands() or "a" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    from PIL.Image import Transpose

    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # EXIF is damaged more often than the picture that carries it
        orientation = 1
    turn = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }.get(orientation)
    return image if turn is None else image.transpose(turn)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale grey levels of 16 or 32 bits, or floats, to 8 bits. Pillow's own conversion would clip them at 255."""
    sixteen = image.mode.startswith("I;16")
    values = image.convert("F")
    values.info.pop("transparency", None)  # a grey level of the old scale
    top = 65535.0 if sixteen else float(values.getextrema()[1])  # type: ignore[arg-type]
    if not sixteen:
        # Pillow does not say how deep "I" and "F" are; the brightest pixel tells which of the usual scales it is.
        usual = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        top = next((scale for scale in usual if top <= scale), top)
    return values.point(lambda level: level * (255.0 / top) + 0.5).convert("L")  # convert() cuts off and clips


# ------------------------------------------------------------------------------------------------------ sound


def open_container(data: bytes, request: dict[str, Any]) -> av.container.InputContainer:
    """Open bytes as one of CONTAINERS, with no way to other files or the network, and frames no larger than allowed."""
    import av

    options = {
        "format_whitelist": ",".join(CONTAINERS),
        "protocol_whitelist": "none",  # nothing may be opened beside the bytes at hand
        "max_pixels": str(request["max_pixels"]),
    }
    container = av.open(io.BytesIO(data), mode="r", options=options, metadata_errors="ignore")
    if not set(container.format.name.split(",")) & set(CONTAINERS):
        raise Refused("unreadable")
    return container


def decode_audio(data: bytes, request: dict[str, Any]) -> Iterator[Message]:
    """Pieces of sound, float32 [channels, samples] at 16 kHz; the caller takes the mean of the channels."""
    _check_wav(data)
    with open_container(data, request) as container:
        if not container.streams.audio:
            raise Refused("track")
        yield from _sound(container, request["max_audio_seconds"])


def _check_wav(data: bytes) -> None:
    """Refuse a WAV file that is cut short, which FFmpeg would play to the cut and call it whole."""
    place = 12
    while data[:4] == b"RIFF" and place + 8 <= len(data):
        name, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        place += 8
        if name == b"data":
            # Programs that write to a pipe cannot know the size, and put one of several very large ones.
            if place + size > len(data) and size < 0x7FFF0000:
                raise Refused("short", bytes=len(data))
            return
        place += size + size % 2


def _sound(container: av.container.InputContainer, max_seconds: float) -> Generator[Message, None, float]:
    """The first sound track; returns its seconds."""
    stream = container.streams.audio[0]
    names = set(container.format.name.split(","))
    told = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0
    if not told and container.duration and len(container.streams) == 1:
        told = container.duration / 1_000_000
    if told > max_seconds:
        raise Refused("seconds", seconds=told)
    # MP4 tells the length without what fills up the last packet, which would sound to the model like silence.
    end = math.ceil(told * RATE) if told and "mov" in names else sys.maxsize
    count = 0
    for frame in _resampled(container, stream):
        samples = min(frame.samples, end - count)
        count += samples
        if count > max_seconds * RATE:
            raise Refused("seconds", seconds=count / RATE)
        planes = b"".join(bytes(memoryview(plane)[: 4 * samples]) for plane in frame.planes)  # planes are padded
        yield {"shape": [len(frame.planes), samples], "dtype": "float32", "track": "sound"}, planes
    if names & EXACT_LENGTH and count / RATE < told - SLACK:
        raise Refused("short", seconds=count / RATE)
    return count / RATE


def _resampled(container: av.container.InputContainer, stream: av.AudioStream) -> Iterator[av.AudioFrame]:
    """Frames at 16 kHz with the channels kept. A new resampler begins where a stream changes its form midway."""
    import av

    form, resampler = None, None
    for frame in container.decode(stream):
        if form != (form := (frame.format.name, frame.layout.name, frame.sample_rate)):
            if resampler is not None:
                yield from resampler.resample(None)
            resampler = av.AudioResampler(format="fltp", layout=frame.layout, rate=RATE)
        frame.pts = None  # gaps in time stamps are not gaps in the sound
        yield from resampler.resample(frame)  # type: ignore[union-attr]
    if resampler is not None:
        yield from resampler.resample(None)


# ------------------------------------------------------------------------------------------------------ video


def decode_video(data: bytes, request: dict[str, Any]) -> Iterator[Message]:
    """The sampled frames, uint8 [H, bytes of a row] with the width told, then the sound, as `decode_audio` gives it."""
    with open_container(data, request) as container:
        stream = _picture_track(container)
        check_pixels(stream.width, stream.height, request["max_pixels"])
        pts, keys = _scan(container, stream)
        fps = float(stream.average_rate or stream.guessed_rate or 24)
        indices = _sample(len(pts), fps, request)
        times = _times(pts, float(stream.time_base or 0), fps)
        if times[-1] > request["max_video_seconds"]:
            raise Refused("seconds", seconds=times[-1])
        if len(indices) * stream.width * stream.height > request["max_video_pixels"]:
            raise Refused("video_pixels", frames=len(indices), width=stream.width, height=stream.height)
    with open_container(data, request) as container:
        stream = _picture_track(container)
        stream.thread_type = "AUTO"
        keys = keys if set(container.format.name.split(",")) & SEEKABLE else []
        for index, frame in zip(indices, _frames(container, stream, pts, indices, keys), strict=True):
            check_pixels(frame.width, frame.height, request["max_pixels"])
            turn = round(frame.rotation / 90) % 4
            rgb = frame.reformat(format="rgb24")
            plane = rgb.planes[0]
            header = {"shape": [rgb.height, plane.line_size], "dtype": "uint8", "track": "frame"}
            yield (
                {**header, "width": rgb.width, "seconds": times[index], "turn": turn},
                memoryview(plane)[: rgb.height * plane.line_size],
            )
    with open_container(data, request) as container:
        end = times[-1]
        if container.streams.audio:
            end = max(end, (yield from _sound(container, request["max_audio_seconds"])))
        exact = set(container.format.name.split(",")) & EXACT_LENGTH
        if exact and container.duration and end < container.duration / 1_000_000 - SLACK - 2 / fps:
            raise Refused("short", seconds=end)


def _picture_track(container: av.container.InputContainer) -> av.VideoStream:
    from av.stream import Disposition

    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:  # the cover of a song is no video
            return stream
    raise Refused("track")


def _scan(container: av.container.InputContainer, stream: av.VideoStream) -> tuple[list[int | None], list[int]]:
    """The time stamps of all frames in order of showing, and of the key frames; found without decoding."""
    stamps, keys = [], []
    for packet in container.demux(stream):
        if not packet.size or packet.is_discard:
            continue
        if packet.is_corrupt:
            raise Refused("unreadable")
        stamps.append(packet.pts)
        if packet.is_keyframe and packet.pts is not None:
            keys.append(packet.pts)
    if not stamps:
        raise Refused("unreadable")
    known = sorted(stamp for stamp in stamps if stamp is not None)
    if len(set(known)) < len(stamps):  # missing or doubled: frames are then counted
        return [None] * len(stamps), []
    return list(known), sorted(keys)


def _sample(total: int, fps: float, request: dict[str, Any]) -> list[int]:
    """Indices of `num_frames` frames (or `fps` a second) of `total`, evenly spread; all, if there are no more."""
    count = request["num_frames"]
    if request["fps"] is not None:
        count = max(1, int(total / fps * request["fps"]))
    if min(count, total) > request["max_frames"]:
        raise Refused("frames", frames=min(count, total))
    return sample_indices(total, count)


def sample_indices(total: int, num_frames: int) -> list[int]:
    """Indices of `num_frames` frames spread evenly over `total`, the first included; all when there are no more.

    Source: `default_sample_indices_fn` of Transformers 5.23, which refuses videos of fewer frames.
    """
    count = min(num_frames, total)
    return [i * total // count for i in range(count)]


def _times(pts: list[int | None], time_base: float, fps: float) -> list[float]:
    """Seconds of each frame: index / fps, as the reference has it, except where the time stamps say otherwise."""
    even = [index / fps for index in range(len(pts))]
    if pts[0] is None or not time_base:
        return even
    shown = [(stamp - pts[0]) * time_base for stamp in pts]  # type: ignore[operator]
    return [e if abs(s - e) < 1.5 / fps else s for s, e in zip(shown, even, strict=True)]


def _frames(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    pts: list[int | None],
    indices: list[int],
    keys: list[int],
) -> Iterator[av.VideoFrame]:
    """Decode the frames at `indices`, going from key frame to key frame where that leaves something out."""
    decoded = container.decode(stream)
    frame, place = next(decoded, None), 0
    for index in indices:
        target = pts[index]
        if target is not None and frame is not None and frame.pts is not None and keys:
            key = keys[max(bisect_right(keys, target) - 1, 0)]
            if key > frame.pts:
                container.seek(key, stream=stream)
                decoded = container.decode(stream)
                frame = next(decoded, None)
        while frame is not None and _before(frame, place, index, target):
            frame, place = next(decoded, None), place + 1
        if frame is None:
            raise Refused("unreadable")
        yield frame


def _before(frame: av.VideoFrame, place: int, index: int, target: int | None) -> bool:
    return place < index if target is None or frame.pts is None else frame.pts < target


# ------------------------------------------------------------------------------------------------------ pages


def decode_pdf(data: bytes, request: dict[str, Any]) -> Iterator[Message]:
    """The words of each page as UTF-8, uint8 [bytes], with its size in points as it is shown."""
    with open_pdf(data, request) as pdf:
        left = request["max_text"]
        for number in range(len(pdf)):
            with contextlib.closing(_page(pdf, number)) as page, contextlib.closing(page.get_textpage()) as words:
                left -= words.count_chars()
                if left < 0:
                    raise Refused("text")
                text = words.get_text_range().translate(NO_WORDS).strip().encode()
                empty = not text and not any(page.get_objects(max_depth=1)) and not _annotations(page)
                size = {"width": page.get_width(), "height": page.get_height()}
                yield {"shape": [len(text)], "dtype": "uint8", "empty": empty, **size}, text


def draw_pages(data: bytes, request: dict[str, Any]) -> Iterator[Message]:
    """The pages asked for as [number, height, width]: uint8 RGB of just that size, one after the other."""
    import pypdfium2
    import pypdfium2.raw as raw

    with open_pdf(data, request) as pdf:
        for number, height, width in request["pages"]:
            check_pixels(width, height, request["max_pixels"])
            with contextlib.closing(_page(pdf, number)) as page:
                bitmap = pypdfium2.PdfBitmap.new_native(width, height, raw.FPDFBitmap_BGR, rev_byteorder=True)
                with contextlib.closing(bitmap):
                    bitmap.fill_rect((255, 255, 255, 255), 0, 0, width, height)
                    flags = raw.FPDF_ANNOT | raw.FPDF_REVERSE_BYTE_ORDER
                    # Width and height apart, as the model's resize has them: `PdfPage.render` knows one scale only.
                    raw.FPDF_RenderPageBitmap(bitmap, page, 0, 0, width, height, 0, flags)
                    yield {"shape": [height, width, 3], "dtype": "uint8"}, bitmap.buffer


def open_pdf(data: bytes, request: dict[str, Any]) -> pypdfium2.PdfDocument:
    import pypdfium2
    import pypdfium2.raw as raw

    try:
        pdf = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        locked = error.err_code in (raw.FPDF_ERR_PASSWORD, raw.FPDF_ERR_SECURITY)
        raise Refused("locked" if locked else "unreadable") from None
    if len(pdf) > request["max_pages"]:
        raise Refused("pages", pages=len(pdf))
    pdf.init_forms()
    return pdf


def _page(pdf: pypdfium2.PdfDocument, number: int) -> pypdfium2.PdfPage:
    """A page with what was filled into its form as a part of it."""
    page = pdf[number]
    if pdf.formenv:
        page.flatten()
        page.close()
        page = pdf[number]
    return page


def _annotations(page: pypdfium2.PdfPage) -> int:
    import pypdfium2.raw as raw

    return int(raw.FPDFPage_GetAnnotCount(page))


# ---------------------------------------------------------------------------------------------------- serving

DECODERS = {
    "image": decode_image,
    "audio": decode_audio,
    "video": decode_video,
    "pdf": decode_pdf,
    "pages": draw_pages,
}


def main() -> None:
    sys.path[:] = json.loads(sys.argv[1])  # the parent's, so that the same packages are found without `site`
    while (request := _read_request()) is not None:
        _import_decoders(request["kind"])
        if not sys.platform.startswith("linux"):
            return _serve(request)
        if (pid := os.fork()) == 0:
            try:
                _confine(request)
                _serve(request)
            finally:
                os._exit(1)
        status = os.waitpid(pid, 0)[1]
        if status:  # killed, half an answer may lie in the pipe: end it, and this process with it
            os._exit(os.WTERMSIG(status) if os.WIFSIGNALED(status) else 1)


def _import_decoders(kind: str) -> None:
    """Before the fork, once; also what they import late themselves, because the fork can open no files."""
    if kind == "image":
        names = ["copy", *(f"PIL.Image{name}" for name in ("", "Cms", "Color", "File", "Filter", "Palette"))]
    elif kind in ("pdf", "pages"):
        names = ["pypdfium2", "encodings.utf_16_le"]
    else:
        names = ["av", "av.subtitles.stream"]
    modules = [importlib.import_module(name) for name in names]
    if kind == "image":
        modules[1].init()  # all plugins


def _confine(request: dict[str, Any]) -> None:
    import resource

    with open("/proc/self/statm") as statm:
        size = int(statm.read().split()[0]) * resource.getpagesize()
    memory = size + request["max_decode_memory"]
    seconds = max(1, int(request["max_decode_seconds"]))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))  # what is open stays; nothing more is opened, sockets included


def _serve(request: dict[str, Any]) -> None:
    data = _read(request["bytes"])
    try:
        for header, buffer in DECODERS[request["kind"]](data, request):
            _write(json.dumps(header).encode() + b"\n")
            _write(buffer)
        answer: dict[str, Any] = {"end": True}
    except Refused as refused:
        answer = {"refused": refused.code, **refused.values}
    except OSError as error:
        answer = {"refused": "files" if error.errno == errno.EMFILE else "unreadable"}
    except MemoryError:
        answer = {"refused": "memory"}
    except Exception:  # whatever else a decoder raises about foreign bytes means just this
        answer = {"refused": "unreadable"}
    _write(json.dumps(answer).encode() + b"\n")
    os._exit(0)


def _read_request() -> dict[str, Any] | None:
    length = _read(4)
    return json.loads(_read(int.from_bytes(length, "little"))) if length else None


def _read(count: int) -> bytes:
    """`count` bytes from the parent, or none when it is gone. Unbuffered: what follows may be for the fork to read."""
    data = bytearray()
    while len(data) < count:
        piece = os.read(0, min(count - len(data), 1 << 20))
        if not piece:
            return b""
        data += piece
    return bytes(data)


def _write(buffer: Any) -> None:
    view = memoryview(buffer).cast("B")
    while view:
        view = view[os.write(1, view[: 1 << 20]) :]


if __name__ == "__main__":
    main()
