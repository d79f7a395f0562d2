"""Messages with media become ids: expansion, order, positions, digests, budgets, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from support.media import encode_video, numbered_frames, tone
from support.pdf import a_pdf, a_scan

from iolite.config import ProcessorConfig
from iolite.errors import CheckpointError, MediaError, MessageError, UsageError
from iolite.prompt import PromptBuilder
from iolite.text.template import ChatTemplate
from iolite.text.tokenizer import Tokenizer
from iolite.train.nano.recipe import TEMPLATE, nano_config
from iolite.train.nano.tokenizer import train_tokenizer

RED = np.full((96, 96, 3), (255, 0, 0), np.uint8)
WIDE = np.full((48, 200, 3), (0, 0, 255), np.uint8)
HALF_SECOND = np.linspace(-0.5, 0.5, 8001, dtype=np.float32)  # 12.5 frames and a sample: 13 tokens


@pytest.fixture(scope="module")
def builder(tmp_path_factory) -> PromptBuilder:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["what is this? a red square", "say the digits 0 1 2 3"], 512, folder)
    tokenizer = Tokenizer.from_folder(folder)
    config = nano_config(tokenizer)
    processor = ProcessorConfig(image_max_soft_tokens=4, video_max_soft_tokens=1, num_frames=4, image_budgets=None)
    return PromptBuilder(tokenizer, ChatTemplate.from_folder(TEMPLATE.parent), config, processor)


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def image(source, **settings):
    return {"type": "image", "image": source, **settings}


def sound(samples):
    return {"type": "audio", "audio": {"array": samples, "sampling_rate": 16_000}}


def expanded(builder: PromptBuilder, prompt) -> str:
    return builder.tokenizer.decode(prompt.ids)


def test_text_only(builder):
    prompt = builder.build("what is this?")
    assert prompt.spans == ()
    assert prompt.ids == builder.tokenizer.encode(prompt.text)
    assert prompt.text.startswith("<bos><|turn>user\nwhat is this?<turn|>\n")


def test_picture_becomes_begin_placeholders_end(builder):
    prompt = builder.build(user(image(RED), "what is this?"))
    (span,) = prompt.spans
    config = builder.config
    assert "<|image|>what is this?" in prompt.text
    assert prompt.ids[span.start - 1] == config.boi_token_id
    assert prompt.ids[span.start : span.stop] == [config.image_token_id] * 4
    assert prompt.ids[span.stop] == config.eoi_token_id
    assert span.array.shape == (4, 6912)
    assert span.positions.tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]]
    assert prompt.blocks().tolist() == [0] * span.start + [1] * 4 + [0] * (len(prompt.ids) - span.stop)


def test_recording_is_padded_at_its_end_only(builder):
    prompt = builder.build(user("say", sound(HALF_SECOND)))
    (span,) = prompt.spans
    assert span.kind == "audio"
    assert span.length == 13
    flat = span.array.reshape(-1)
    np.testing.assert_array_equal(flat[: len(HALF_SECOND)], HALF_SECOND)
    assert not flat[len(HALF_SECOND) :].any()
    assert not prompt.blocks().any()  # sound is causal


def test_video_is_stamped_frames_with_a_pictures_begin_and_end(builder):
    frames = [np.full((48, 48, 3), shade, np.uint8) for shade in (0, 90, 180)]
    prompt = builder.build(user({"type": "video", "video": frames, "fps": 0.5}, "what is this?"))
    begin, mark, end = "<|image>", "<|video|>", "<image|>"
    assert f"00:00 {begin}{mark}{end} 00:02 {begin}{mark}{end} 00:04 {begin}{mark}{end}" in expanded(builder, prompt)
    assert [s.kind for s in prompt.spans] == ["video"] * 3
    assert sorted(set(prompt.blocks().tolist())) == [0, 1, 2, 3]  # each frame is a block of its own


def test_the_sound_of_a_video_follows_its_frames_when_asked_for(builder):
    clip = encode_video(numbered_frames(4), 8, sound=tone(48_000, 0.5))
    silent = builder.build(user({"type": "video", "video": clip}))
    heard = builder.build(user({"type": "video", "video": clip, "sound": True}))
    assert [s.kind for s in silent.spans] == ["video"] * 4  # as the reference does
    assert [s.kind for s in heard.spans] == ["video"] * 4 + ["audio"]
    assert [s.digest for s in heard.spans[:4]] == [s.digest for s in silent.spans]
    assert "<image|> <|audio>" in expanded(builder, heard)


def test_order_as_written_across_messages(builder):
    messages = [
        *user(sound(HALF_SECOND), image(RED)),
        {"role": "assistant", "content": "yes"},
        *user(image(WIDE), "and this?"),
    ]
    prompt = builder.build(messages)
    assert [s.kind for s in prompt.spans] == ["audio", "image", "image"]
    assert prompt.spans[1].array.max() != prompt.spans[2].array.min()
    assert [s.start for s in prompt.spans] == sorted(s.start for s in prompt.spans)


def test_the_spans_hold_what_the_ids_say(builder):
    prompt = builder.build(user(image(RED), image(RED), sound(HALF_SECOND), image(WIDE)))
    marks = {"image": builder.config.image_token_id, "audio": builder.config.audio_token_id}
    covered = [i for s in prompt.spans for i in range(s.start, s.stop)]
    assert covered == [i for i, t in enumerate(prompt.ids) if t in marks.values()]
    for span in prompt.spans:
        assert {prompt.ids[i] for i in range(span.start, span.stop)} == {marks[span.kind]}


def test_equal_media_have_equal_digests_and_others_do_not(builder):
    a, b, c = builder.build(user(image(RED), image(RED.copy()), image(RED[:, ::-1] // 2))).spans
    assert a.digest == b.digest != c.digest
    tall = builder.build(user(image(np.full((200, 48, 3), (0, 0, 255), np.uint8)))).spans[0]
    wide = builder.build(user(image(WIDE))).spans[0]
    assert tall.array.tobytes() == wide.array.tobytes()  # a plain blue is the same patch by patch,
    assert tall.digest != wide.digest  # but lies differently


def test_budget_of_a_call_and_of_one_picture(builder):
    assert builder.build(user(image(RED)), image_tokens=1).spans[0].length == 1
    first, second = builder.build(user(image(RED, max_soft_tokens=9), image(RED)), image_tokens=1).spans
    assert (first.length, second.length) == (9, 1)


def test_official_checkpoints_take_the_five_budgets_only(builder):
    official = PromptBuilder(builder.tokenizer, builder.template, builder.config, ProcessorConfig())
    with pytest.raises(UsageError, match="70, 140, 280, 560, 1120, not 100"):
        official.build(user(image(RED)), image_tokens=100)
    with pytest.raises(UsageError, match="from 1 to 64"):
        builder.build(user(image(RED)), image_tokens=65)


@pytest.mark.parametrize("tokens", [65, 5000])
def test_the_budget_of_a_videos_frames_is_checked_too(builder, tokens):
    with pytest.raises(UsageError, match="from 1 to 64"):
        builder.build(user({"type": "video", "video": [RED], "max_soft_tokens": tokens}))


@pytest.mark.parametrize("kind", ["image", "audio", "video"])
@pytest.mark.parametrize("source", [5, [5], {"path": 5}, 0.5, object(), np.zeros((), np.uint8)])
def test_what_no_media_can_be_read_from(builder, kind, source):
    with pytest.raises((MediaError, MessageError)):
        builder.build(user({"type": kind, kind: source}))


def test_bad_tools(builder):
    with pytest.raises(MessageError, match="tool 0 has no function"):
        builder.build("what is this?", tools=[5])


def test_pil_images_and_bytes_are_the_same_picture(builder, tmp_path):
    Image.fromarray(RED).save(tmp_path / "red.png")
    spans = builder.build(
        user(
            image(RED),
            image(Image.fromarray(RED)),
            image(str(tmp_path / "red.png")),
            image((tmp_path / "red.png").read_bytes()),
        )
    ).spans
    assert len({s.digest for s in spans}) == 1


def test_a_placeholder_in_the_text_needs_media(builder):
    with pytest.raises(MessageError, match=r"1 media placeholders .image. for 0 attached"):
        builder.build("what is <|image|>?")
    with pytest.raises(MessageError, match="placeholders"):
        builder.build(user("<|audio|>", image(RED)))


def test_media_without_a_source(builder):
    with pytest.raises(MessageError, match="'image' comes without"):
        builder.build(user({"type": "image"}))
    assert "<|image|>" in builder.render(user({"type": "image"}))  # the text alone needs none


def test_modality_the_checkpoint_lacks(builder):
    deaf = PromptBuilder(builder.tokenizer, builder.template, replace(builder.config, audio=None), builder.processor)
    with pytest.raises(MediaError, match="cannot take audio"):
        deaf.build(user(sound(HALF_SECOND)))


def test_silence_and_nothing(builder):
    silent = builder.build(user(sound(np.zeros(640, np.float32))))
    assert silent.spans[0].length == 1
    with pytest.raises(MediaError):
        builder.build(user(sound(np.zeros(0, np.float32))))


def test_a_tokenizer_of_another_checkpoint(builder):
    unknown = replace(builder.config, image_token_id=builder.tokenizer.vocab_size)
    text = builder.tokenizer.token_id("<0x41>")  # these six characters are read as six tokens
    for config, words in ((unknown, "does not have"), (replace(builder.config, image_token_id=text), "does not read")):
        with pytest.raises(CheckpointError, match=words):
            PromptBuilder(builder.tokenizer, builder.template, config, builder.processor).build(user(image(RED)))


def document(data, **settings):
    return {"type": "document", "document": data, "name": "a.pdf", **settings}


def test_words_of_a_document(builder):
    messages = user(document(a_pdf("a red square", "0 1 2 3")), "what is this?")
    prompt = builder.build(messages)
    text = "[a.pdf]\n[page 1]\na red square\n\n[page 2]\n0 1 2 3\n[end of a.pdf]\n\nwhat is this?"
    assert prompt.text == builder.build(text).text == builder.render(messages)
    assert prompt.spans == ()


def test_pages_as_pictures_are_what_a_picture_of_them_is(builder):
    red, blue = Image.new("RGB", (96, 96), "red"), Image.new("RGB", (200, 48), (0, 0, 255))
    data = a_scan(red, blue)
    prompt = builder.build(user(document(data), "what is this?"))
    assert prompt.text.count("<|image|>") == len(prompt.spans) == 2
    assert "[a.pdf]\n[page 1]<|image|>[page 2]<|image|>[end of a.pdf]\n\nwhat is this?" in prompt.text
    first, second = prompt.spans
    (as_picture,) = builder.build(user(image(RED))).spans
    assert np.abs(first.array - as_picture.array).max() < 0.02  # a scan is a JPEG
    assert (first.positions == as_picture.positions).all() and second.length == 4
    smaller = builder.build(user(document(data, max_soft_tokens=1)))
    assert [span.length for span in smaller.spans] == [1, 1]
    assert [span.length for span in builder.build(user(document(data)), image_tokens=1).spans] == [1, 1]
    words = a_pdf("a red square")
    assert builder.build(user(document(words))).spans == ()
    assert len(builder.build(user(document(words, pages="pictures"))).spans) == 1


def test_documents_that_are_refused(builder):
    scan = a_scan(*[Image.new("RGB", (9, 9))] * 5)
    limited = replace(builder, limits=replace(builder.limits, max_page_pictures=8))
    limited.build(user(document(scan), document(a_pdf("x"), pages="pictures")))
    with pytest.raises(MediaError, match="of all PDFs together 8 pages"):
        limited.build(user(document(scan), document(scan)))
    blind = replace(builder, config=replace(builder.config, vision=None))
    with pytest.raises(MediaError, match="holds no text"):
        blind.build(user(document(scan)))
    with pytest.raises(UsageError, match="cannot take pictures"):
        blind.build(user(document(scan, pages="pictures")))
    for part, told in (
        (document(scan, pages="all"), "pages must be one of auto, text, pictures"),
        ({"type": "file", "file": {"file_id": "file-1"}}, "names a file by its id"),
        ({"type": "input_file", "file_id": "file-1"}, "names a file by its id"),
        ({"type": "input_file", "filename": "a.pdf"}, "comes without a path"),
    ):
        with pytest.raises(MessageError, match=told):
            builder.build(user(part))
