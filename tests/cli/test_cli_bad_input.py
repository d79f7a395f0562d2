"""Bad input, one line of the table each: what is wrong is said in one or two lines, and the exit code is 2.

Every row runs the real command line in this process over a model of the embedded one's sizes with random weights. A
row is (what makes the input in the working directory, the command line, a pattern that the message must match);
MODEL stands for the good model's folder, and a broken one is made as ./broken.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import struct
import subprocess
import sys
import wave
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from support.media import encode_audio, encode_video, numbered_frames, tone

from iolite.cli import COMMANDS, run_command

# A decoder's or a library's own words, and what only a programmer reads.
LEAKS = re.compile(
    r"Traceback|Error\b|Exception|Errno|object at 0x|site-packages|\.py\b|PIL|[Ll]ibav|[Ff][Ff]mpeg|avcodec|avformat"
    r"|Invalid data found|cannot identify|moov|torch\.|NoneType|<class"
)

# What makes an input: a function of the working directory, which may return bytes for stdin. These return such
# functions; content is text, bytes, or a function that makes bytes, so that nothing is made before its row runs.


def nothing(here: Path) -> None:
    """For what is wrong in the command line itself."""


def bytes_of(content):
    content = content() if callable(content) else content
    return content.encode() if isinstance(content, str) else content


def file(name, content):
    def make(here):
        (here / name).write_bytes(bytes_of(content))

    return make


def folder_named(name):
    return lambda here: (here / name).mkdir()


def stdin(content):
    return lambda here: content


def both(*makers):
    def make(here):
        for maker in makers:
            maker(here)

    return make


def picture(form="PNG", size=(200, 100), **options):
    """A picture of noise, so that most of its bytes are data."""
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


def bomb(width, height):
    """A valid PNG of one bit a pixel, all black: some kilobytes that decode to a lot."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    pack, row = zlib.compressobj(1), bytes(1 + (width + 7) // 8)
    rows = b"".join(pack.compress(row * 1000) for _ in range(height // 1000)) + pack.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def wav(samples=16_000, rate=16_000):
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(1)
        out.setframerate(rate)
        out.writeframes(bytes([128, 90]) * (samples // 2))
    return buffer.getvalue()


def video(frames=12, size=48):
    return encode_video(numbered_frames(frames, size, size), 12, codec="mpeg4")


def sound_only():
    return encode_audio(tone(48_000, 0.5), 48_000, "mp4", "aac", "mono")


def noise(data, begin=0.3, end=0.9):
    """The file with noise in its middle."""
    a, b = int(len(data) * begin), int(len(data) * end)
    return data[:a] + np.random.default_rng(1).bytes(b - a) + data[b:]


def broken(change):
    """Makes ./broken, the good model with its files linked, and lets change(folder) spoil it."""

    def make(here):
        folder = here / "broken"
        folder.mkdir()
        for path in (here / "good").resolve().iterdir():
            (folder / path.name).symlink_to(path)
        change(folder)

    return make


def replaced(name, content):
    """change for `broken`: another content for one file; a function makes it from the good one's bytes."""

    def change(folder):
        path = folder / name
        good = path.read_bytes() if path.exists() else b""
        data = content(good) if callable(content) else content
        path.unlink(missing_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)

    return change


def removed(*names):
    def change(folder):
        for name in names:
            (folder / name).unlink()

    return change


def json_with(name, **changes):
    """change for `broken`: other values in a JSON file; text_config__x is the key x in text_config."""

    def edit(good):
        data = json.loads(good)
        for key, value in changes.items():
            *places, last = key.split("__")
            target = data
            for place in places:
                target = target[place]
            target[last] = value
        return json.dumps(data)

    return replaced(name, edit)


def tensors_with(edit):
    def write(good):
        tensors = safetensors.torch.load(good)
        edit(tensors)
        return safetensors.torch.save(tensors)

    return replaced("model.safetensors", write)


def pickled(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


NORM = "model.language_model.norm.weight"
ASK = "run -m MODEL -n 1 what"

IMAGES = {
    "0 bytes": (file("a.png", ""), f"{ASK} --image a.png", r"the picture '.*a\.png' is empty"),
    "text": (file("a.png", "not a picture"), f"{ASK} --image a.png", r"picture '.*a\.png' cannot be read"),
    "noise": (file("a.png", np.random.default_rng(0).bytes(9999)), f"{ASK} --image a.png", "cannot be read"),
    "PNG cut short": (file("a.png", lambda: picture()[:20_000]), f"{ASK} --image a.png", "cut short"),
    "PNG of a signature": (file("a.png", b"\x89PNG\r\n\x1a\n"), f"{ASK} --image a.png", "cannot be read"),
    "PNG with noise in it": (file("a.png", lambda: noise(picture())), f"{ASK} --image a.png", "damaged"),
    "JPEG cut short": (file("a.jpg", lambda: picture("JPEG")[:4000]), f"{ASK} --image a.jpg", "cut short"),
    "WebP cut short": (file("a.webp", lambda: picture("WEBP")[:4000]), f"{ASK} --image a.webp", "cut short"),
    "20000 x 20000": (
        file("a.png", lambda: bomb(20_000, 20_000)),
        f"{ASK} --image a.png",
        r"20000 x 20000.*64,000,000",
    ),
    "GIF that claims 65535 x 65535": (
        file("a.gif", b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + bytes(20)),
        f"{ASK} --image a.gif",
        "65535 x 65535|cannot be read",
    ),
    "SVG": (file("a.png", '<svg xmlns="http://www.w3.org/2000/svg"/>'), f"{ASK} --image a.png", "cannot be read"),
    "EPS": (file("a.png", "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), f"{ASK} --image a.png", "no picture"),
    "PDF": (file("a.pdf", b"%PDF-1.7\n%\xe2\xe3\n1 0 obj\n"), f"{ASK} --image a.pdf", "no picture format"),
    "a directory": (folder_named("a.png"), f"{ASK} --image a.png", "'a.png' is a folder, not a file"),
    "a named pipe": (lambda here: os.mkfifo(here / "a.png"), f"{ASK} --image a.png", "'a.png' is not an ordinary file"),
    "missing": (nothing, f"{ASK} --image gone.png", r"there is no image file 'gone\.png'"),
    "missing, inside the prompt": (nothing, "run -m MODEL -n 1 'what? ./gone.png'", r"no image file '\./gone\.png'"),
    "a name of 5000 letters": (nothing, f"{ASK} --image {'a' * 5000}.png", "no image file"),
    "http": (nothing, f"{ASK} --image http://example.org/a.png", "URLs are not fetched"),
    "https in capitals": (nothing, f"{ASK} --image HTTPS://example.org/a.png", "URLs are not fetched"),
    "another scheme": (nothing, f"{ASK} --image ftp://example.org/a.png", "ftp://example.org/a.png"),
    "a file: on another machine": (nothing, f"{ASK} --image file://example.org/a.png", "another machine"),
    "a missing file:": (nothing, f"{ASK} --image file:///gone/a.png", "not there"),
    "a sound": (file("a.png", wav), f"{ASK} --image a.png", "picture '.*a.png' cannot be read"),
    "data: without a comma": (nothing, f"{ASK} --image data:image/png;base64", "no comma"),
    "data: with damaged base64": (nothing, f"{ASK} --image data:image/png;base64,@@@@", "base64 is damaged"),
    "data: that is empty": (nothing, f"{ASK} --image data:image/png;base64,", "the picture is empty"),
    "stdin without bytes": (nothing, f"{ASK} --image -", "the picture is empty"),
    "stdin twice": (nothing, f"{ASK} --image - --audio -", "stdin is named twice"),
    "an empty name": (nothing, f"{ASK} --image ''", "there is no image file ''"),
    "the home of nobody": (nothing, f"{ASK} --image ~nobody_of_this_name/a.png", "there is no image file '~nobody"),
}
SOUNDS = {
    "0 bytes": (file("a.wav", ""), f"{ASK} --audio a.wav", r"sound '.*a\.wav' is empty: 0 bytes"),
    "0 samples": (file("a.wav", lambda: wav(0)), f"{ASK} --audio a.wav", "has no samples"),
    "cut short": (file("a.wav", lambda: wav()[:9000]), f"{ASK} --audio a.wav", "cut short"),
    "a header only": (file("a.wav", lambda: wav()[:44]), f"{ASK} --audio a.wav", "cut short|has no samples"),
    "FLAC cut short": (
        file("a.flac", lambda: encode_audio(tone(48_000, 2), 48_000, "flac", "flac", "mono")[:9000]),
        f"{ASK} --audio a.flac",
        "cut short",
    ),
    "text": (file("a.mp3", "not a sound"), f"{ASK} --audio a.mp3", "sound '.*a.mp3' cannot be read"),
    "a picture": (file("a.wav", picture), f"{ASK} --audio a.wav", "(no sound track|cannot be read)"),
    "a silent film": (file("a.mp4", video), "transcribe -m MODEL a.mp4", "has no sound track"),
    "an hour and a second": (file("a.wav", lambda: wav(3_601_000, 1000)), f"{ASK} --audio a.wav", "limit is 3,600 s"),
    "a playlist": (file("a.m3u8", "#EXTM3U\n#EXTINF:9,\n/etc/passwd\n"), f"{ASK} --audio a.m3u8", "a.m3u8"),
    "data: that is not base64": (nothing, f"{ASK} --audio data:audio/wav;base64,*", "base64 is damaged"),
    "data: of plain text": (nothing, f"{ASK} --audio data:audio/wav,hello", "the sound cannot be read"),
    "missing": (nothing, "transcribe -m MODEL gone.wav", "there is no audio file 'gone.wav'"),
    "a directory": (folder_named("a.wav"), "transcribe -m MODEL a.wav", "'a.wav' is a folder, not a file"),
    "transcribed: text": (file("a.wav", "no"), "transcribe -m MODEL a.wav", "sound '.*a.wav' cannot be read"),
    "transcribed: nothing named": (nothing, "transcribe -m MODEL", "Missing argument 'FILE"),
    "longer than the context": (
        file("a.wav", lambda: wav(320_000, 1000)),
        f"{ASK} --audio a.wav",
        "tokens and the context is 4096",
    ),
}
VIDEOS = {
    "0 bytes": (file("a.mp4", ""), f"{ASK} --video a.mp4", r"video '.*a\.mp4' is empty"),
    "cut short": (file("a.mp4", lambda: video()[:-500]), f"{ASK} --video a.mp4", "cut short"),
    "AVI cut short": (
        file("a.avi", lambda: encode_video(numbered_frames(30), 12, "avi", "mpeg4")[:9000]),
        f"{ASK} --video a.avi",
        "cut short",
    ),
    "sound only": (file("a.mp4", sound_only), f"{ASK} --video a.mp4", "no picture track"),
    "noise in the middle": (
        file("a.mp4", lambda: noise(video(30), 0.1, 1)),
        f"{ASK} --video a.mp4",
        "damaged|cut short",
    ),
    "text": (file("a.mp4", "not a video"), f"{ASK} --video a.mp4", "video '.*a.mp4' cannot be read"),
    "missing": (nothing, f"{ASK} --video gone.mp4", "there is no video file 'gone.mp4'"),
    "a playlist of files": (
        file("a.mp4", "ffconcat version 1.0\nfile '/etc/passwd'\n"),
        f"{ASK} --video a.mp4",
        "refers to other files|cannot be read",
    ),
    "more frames than are allowed": (
        both(
            broken(json_with("processor_config.json", video_processor={"num_frames": 5000, "max_soft_tokens": 3})),
            file("a.mp4", lambda: video(1030, 16)),
        ),
        "run -m broken what --video a.mp4",
        "1,030 frames; the limit is 1,024",
    ),
}
MESSAGES = {
    "no prompt": (nothing, "run", "there is no prompt"),
    "an empty prompt": (nothing, "run -m MODEL ''", "there is no prompt"),
    "blanks": (nothing, "run -m MODEL '  '", "there is no prompt"),
    "a picture's placeholder": (nothing, "run -m MODEL -n 1 'see <|image|>'", r"1 media placeholders \(image\) for 0"),
    "a placeholder too many": (file("a.png", picture), f"{ASK} '<|image|>' --image a.png", "2 media placeholders"),
    "a placeholder in the system prompt": (nothing, f"{ASK} --system '<|audio|>'", r"\(audio\) for 0"),
    "longer than the context": (nothing, f"run -m MODEL -n 1 '{'word ' * 5000}'", "tokens and the context is 4096"),
    "bytes that are not UTF-8": (nothing, f"{ASK} \udcff", "not valid Unicode"),
    "a system prompt that is not UTF-8": (nothing, f"{ASK} --system \udcff", "not valid Unicode"),
    "stdin that is not UTF-8": (stdin(b"\xff\xfe"), ASK, "not UTF-8"),
    "stdin that is not UTF-8, chat": (stdin(b"\xff\n"), "chat MODEL", "not UTF-8"),
    "a model and a prompt too many": (nothing, "run a b -p c", "arguments beside --prompt"),
    "the model twice": (nothing, "run -m MODEL -p c what", r"what is 'what'\?"),
}
CHECKPOINTS = {
    "missing folder": (nothing, "run -m ./gone what", r"there is no model '\./gone'"),
    "missing folder, chat": (nothing, "chat ./gone", r"there is no model '\./gone'"),
    "missing folder, eval": (nothing, "eval ./gone", r"there is no model '\./gone'"),
    "missing folder, transcribe": (file("a.wav", wav), "transcribe -m ./gone a.wav", "there is no model"),
    "empty name": (nothing, "show ''", "there is no model ''"),
    "empty folder": (folder_named("broken"), "run -m ./broken what", "config.json is missing"),
    "empty folder, show": (folder_named("broken"), "show broken", "config.json is missing"),
    "a file": (file("model.gguf", b"GGUF"), "run -m model.gguf what", "model.gguf is 4 bytes long, too short"),
    "unknown id": (nothing, "run -m nobody/nothing what", "nobody/nothing is not on this machine"),
    "unknown id, show": (nothing, "show nobody/nothing", "nobody/nothing is not on this machine"),
    "unknown id, pulled offline": (
        nothing,
        "pull nobody/nothing",
        "nobody/nothing is not on this machine, and HF_HUB_OFFLINE",
    ),
    "pull of no id": (nothing, "pull nothing", "'nothing'"),
    "pull of a name of 5000 letters": (nothing, f"pull {'a' * 5000}", "is not a Hugging Face id"),
    "name of 5000 letters": (nothing, f"show {'a' * 5000}", "there is no model"),
    "home of nobody": (nothing, "show ~nobody_of_this_name", "there is no model '~nobody_of_this_name'"),
    "config not JSON": (broken(replaced("config.json", "{oops")), "run -m broken what", "config.json.* as JSON"),
    "another architecture": (broken(json_with("config.json", model_type="llama")), "run -m broken what", "'llama'"),
    "another activation": (
        broken(json_with("config.json", text_config__hidden_activation="relu")),
        "show broken",
        "hidden_activation = 'relu'",
    ),
    "config with a number too long": (
        broken(replaced("config.json", '{"a": ' + "9" * 5000 + "}")),
        "show broken",
        "thousands of digits",
    ),
    "config with a section of text": (
        broken(json_with("config.json", vision_config="yes")),
        "show broken",
        "vision_config must be an object",
    ),
    "config with layer types of numbers": (
        broken(json_with("config.json", text_config__layer_types=[1, [2]])),
        "show broken",
        "layer_types must name",
    ),
    "config with a switch of text": (
        broken(json_with("config.json", tie_word_embeddings="no")),
        "show broken",
        "tie_word_embeddings must be true or false",
    ),
    "weights cut short": (
        broken(replaced("model.safetensors", lambda good: good[:-1000])),
        "run -m broken what",
        "model.safetensors",
    ),
    "weights replaced by a web page": (
        broken(replaced("model.safetensors", "<!DOCTYPE html>" * 9)),
        "run -m broken what",
        "not a safetensors file",
    ),
    "weights of 0 bytes, show": (broken(replaced("model.safetensors", "")), "show broken", "too short"),
    "a pickle only": (broken(pickled), "run -m broken what", "pickle"),
    "no weights": (broken(removed("model.safetensors")), "run -m broken what", "holds no weights"),
    "a tensor missing": (broken(tensors_with(lambda t: t.pop(NORM))), "run -m broken what", f"{NORM} is missing"),
    "a tensor of another shape": (
        broken(tensors_with(lambda t: t.update({NORM: torch.ones(7)}))),
        "run -m broken what",
        r"has the shape \[7\]",
    ),
    "weights that are not numbers": (
        broken(tensors_with(lambda t: t.update({NORM: torch.full_like(t[NORM], torch.nan)}))),
        "run -m broken -n 1 what",
        "not numbers|NaN",
    ),
    "no tokenizer": (broken(removed("tokenizer.json")), "run -m broken what", "tokenizer.json"),
    "tokenizer not JSON": (broken(replaced("tokenizer.json", "{")), "run -m broken what", "tokenizer.json"),
    "tokenizer of something else": (broken(replaced("tokenizer.json", "{}")), "run -m broken what", "tokenizer.json"),
    "template with a mistake": (
        broken(replaced("chat_template.jinja", "{% if %}")),
        "run -m broken what",
        "chat_template.jinja|template",
    ),
    "template that reaches out": (
        broken(replaced("chat_template.jinja", "{{ ''.__class__.__mro__ }}")),
        "run -m broken what",
        "template",
    ),
    "template without end": (
        broken(replaced("chat_template.jinja", "{% for i in range(10**9) %}a{% endfor %}")),
        "run -m broken what",
        "template",
    ),
    "template that drops media": (
        both(broken(replaced("chat_template.jinja", "hello")), file("a.png", picture)),
        "run -m broken what --image a.png",
        "0 media placeholders",
    ),
    "sampling settings of text": (
        broken(replaced("generation_config.json", '{"temperature": "hot"}')),
        "run -m broken what",
        "temperature",
    ),
    "suppressed tokens of text": (
        broken(replaced("generation_config.json", '{"suppress_tokens": ["a"]}')),
        "run -m broken what",
        "suppress_tokens",
    ),
    "sound at another rate": (
        broken(json_with("processor_config.json", feature_extractor={"sampling_rate": 8000})),
        "run -m broken what",
        "sampling_rate is 8000",
    ),
    "a transcription prompt that is no text": (
        both(broken(json_with("processor_config.json", transcribe_prompt=7)), file("a.wav", wav)),
        "transcribe -m broken a.wav",
        "transcribe_prompt",
    ),
}
FLAGS = {
    "unknown command": (nothing, "rnu what", "there is no command 'rnu'.*did you mean `iolite run`"),
    "unknown flag of iolite": (nothing, "--fast", "No such option"),
    "temperature below 0": (nothing, f"{ASK} --temp -1", "temp.*-1"),
    "temperature nan": (nothing, f"{ASK} --temp nan", "temp.*not a number"),
    "temperature inf": (nothing, f"{ASK} --temp inf", "temp.*inf"),
    "temperature of text": (nothing, f"{ASK} --temp warm", "'warm' is not a valid float"),
    "top-p above 1": (nothing, f"{ASK} --top-p 2", "top.p.*2"),
    "top-p nan": (nothing, f"{ASK} --top-p nan", "top.p.*not a number"),
    "top-k below 0": (nothing, f"{ASK} --top-k -1", "top.k.*-1"),
    "min-p above 1": (nothing, f"{ASK} --min-p 1.5", "min.p.*1.5"),
    "repeat penalty 0": (nothing, f"{ASK} --repeat-penalty 0", "penalty.*0"),
    "no tokens": (nothing, f"{ASK} --max-tokens 0", "max.tokens.*0"),
    "tokens below 0": (nothing, f"{ASK} -n -5", "max.tokens.*-5"),
    "tokens of a piece": (file("a.wav", wav), "transcribe -m MODEL a.wav -n 0", "max-tokens.*0"),
    "seed of text": (nothing, f"{ASK} --seed lucky", "'lucky' is not a valid integer"),
    "seed below 0": (nothing, f"{ASK} --seed -1", "seed.*-1"),
    "seed of 65 bits": (nothing, f"{ASK} --seed 18446744073709551616", "seed.*18446744073709551616"),
    "an empty stop": (nothing, f"{ASK} --stop ''", "stop string is empty"),
    "picture budget 0": (file("a.png", picture), f"{ASK} --image a.png --image-tokens 0", "image.tokens.*0"),
    "picture budget 9999": (file("a.png", picture), f"{ASK} --image a.png --image-tokens 9999", "9999"),
    "picture budget 9999, no picture": (nothing, f"{ASK} --image-tokens 9999", "9999"),
    "context 0": (nothing, f"{ASK} --ctx-size 0", "context.*0"),
    "context below the prompt": (nothing, f"{ASK} --ctx-size 4", "tokens and the context is 4"),
    "context over the model's": (nothing, f"{ASK} --ctx-size 999999", "context.*999999.*4096"),
    "threads 0": (nothing, f"{ASK} --threads 0", "threads.*0"),
    "a million threads": (nothing, f"{ASK} --threads 1000000", "threads.*1000000"),
    "device unknown": (nothing, f"{ASK} --device toaster", "there is no device 'toaster'"),
    "device not UTF-8": (nothing, f"{ASK} --device \udcff", "there is no device"),
    "device without values": (nothing, f"{ASK} --device meta", "'meta' is not available"),
    "device not here": (nothing, f"{ASK} --device cuda:99", "'cuda:99' is not available here"),
    "dtype unknown": (nothing, f"{ASK} --dtype int7", "cannot compute in 'int7'"),
    "a flag without its value": (nothing, f"{ASK} --temp", "requires an argument"),
    "chat: temperature": (nothing, "chat MODEL --temp -1", "temp.*-1"),
    "chat: picture budget": (nothing, "chat MODEL --image-tokens 9999", "9999"),
    "chat: context": (nothing, "chat MODEL --ctx-size 0", "context.*0"),
    "chat: two models": (nothing, "chat MODEL -m nano", "two models: 'good' and 'nano'"),
    "chat: another argument": (nothing, "chat MODEL hello", "unexpected extra argument"),
    "show: flag": (nothing, "show --weights", "No such option '--weights'"),
    "list: argument": (nothing, "list all", "unexpected extra argument"),
    "pull: nothing": (nothing, "pull", "Missing argument 'MODEL'"),
    "convert: format": (nothing, "convert MODEL ./new --to q4_0", "a folder cannot hold q4_0"),
    "bench: part": (nothing, "bench MODEL --only sleep", "there is no part 'sleep'"),
    "serve: no model": (nothing, "serve nowhere-model", "there is no model 'nowhere-model'"),
    "serve: an open door": (nothing, "serve MODEL --host 0.0.0.0", "needs a key of at least 16 characters"),
    "serve: a short key": (nothing, "serve MODEL --host 0.0.0.0 --api-key short", "16"),
    "serve: media": (nothing, "serve MODEL --media-path absent", "the media folder absent is not there"),
    "init: taken": (file("new", "x"), "init ./new --shape tiny", "new is there already"),
    "quantize: scheme": (nothing, "quantize MODEL ./new --to int3", "'int3' is not one of"),
    "quantize: taken": (file("new", "x"), "quantize MODEL ./new --force", r"new is a file"),
    "quantize: missing": (nothing, "quantize ./gone ./new", r"there is no model '\./gone'"),
    "run: quantize": (nothing, "run MODEL what --quantize int3", "'int3' is not one of"),
    "eval: kv": (nothing, "eval MODEL --kv int3", "'int3' is not one of"),
    "eval: task": (nothing, "eval MODEL --tasks juggling", "there is no task 'juggling'"),
    "eval: no questions": (nothing, "eval MODEL --limit 0", "limit.*0"),
    "train: nothing": (nothing, "train", "Missing command"),
    "train: something else": (nothing, "train micro", "micro"),
    "train: nowhere": (nothing, "train nano", "Missing option '--out'"),
    "train: no time": (nothing, "train nano --out run --minutes 0", "minutes.*0"),
    "train: time nan": (nothing, "train nano --out run --minutes nan", "minutes.*nan"),
    "train: no processes": (nothing, "train nano --out run --processes 0", "processes.*0"),
    "train: into a file": (file("run", ""), "train nano --out run", "'run' is a file"),
    "train: over another run": (
        both(folder_named("run"), file("run/state.safetensors", "")),
        "train nano --out run",
        "run holds a run already",
    ),
    "train: a mixture of nothing": (
        both(folder_named("run"), file("run/mixture.json", "[]")),
        "train nano --out run",
        "mixture.json holds no JSON object",
    ),
    "train: seed below 0": (nothing, "train nano --out run --seed -1", "seed.*-1"),
    "train: evaluated never": (nothing, "train nano --out run --evaluate-every -1", "evaluate-every.*-1"),
}
SECTIONS = {
    "image": IMAGES,
    "sound": SOUNDS,
    "video": VIDEOS,
    "message": MESSAGES,
    "checkpoint": CHECKPOINTS,
    "flag": FLAGS,
}
TABLE = {f"{section}: {name}": row for section, rows in SECTIONS.items() for name, row in rows.items()}


@pytest.fixture
def here(tmp_path, monkeypatch, random_model, piped):
    """An empty working directory with nothing on stdin, and no training: a row of it must fail before it begins."""
    monkeypatch.setattr("iolite.train.nano.store.build_store", lambda *_, **__: pytest.fail("a training began"))
    (tmp_path / "good").symlink_to(random_model)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(out: str, err: str, words: str) -> None:
    """stdout is empty; stderr says what is wrong, what to do, and nothing of how we found out."""
    assert out == ""
    lines = err.splitlines()
    if not lines[0].startswith("error: "):  # one line of talk may come first: "Added a.png", a chat's greeting
        del lines[0]
    assert 1 <= len(lines) <= 2, err
    assert lines[0].startswith("error: "), err
    assert len(lines) == 1 or lines[1].startswith("hint: "), err
    assert all(len(line) < 400 for line in lines), err
    assert re.search(words, " ".join(lines)), err
    assert not LEAKS.search(err), err


@pytest.mark.parametrize("name", TABLE)
def test_bad_input(here, piped, capsys, name):
    make, line, words = TABLE[name]
    piped(make(here) or b"")
    assert run_command(["good" if word == "MODEL" else word for word in shlex.split(line)]) == 2
    check(*capsys.readouterr(), words)


def test_every_command_has_its_rows():
    assert len(TABLE) >= 40
    assert {shlex.split(line)[0] for _, line, _ in TABLE.values()} >= set(COMMANDS)


@pytest.mark.parametrize(("flags", "thinks"), [("--thinking --no-thinking", False), ("--no-thinking --thinking", True)])
def test_of_two_contrary_flags_the_last_holds(says, here, flags, thinks):
    prompts = says("yes")
    assert run_command(["run", "what", *flags.split()]) == 0
    assert ("<|think|>" in prompts[0].text) is thinks


@pytest.mark.parametrize(
    "name",
    ["image: 20000 x 20000", "sound: cut short", "message: bytes that are not UTF-8", "checkpoint: a tensor missing"],
)
def test_bad_input_in_a_process_of_its_own(here, name):
    make, line, words = TABLE[name]
    make(here)
    arguments = [os.fsencode("good" if word == "MODEL" else word) for word in shlex.split(line)]
    command = [sys.executable, "-m", "iolite.cli", *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    check(done.stdout, done.stderr, words)
