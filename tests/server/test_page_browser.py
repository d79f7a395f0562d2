"""The page in headless Chromium, against real servers: what a person does on it, by mouse, keyboard and microphone.

After every test: no error on the console (a breach of the page's policy is one), no request to another host.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from PIL import Image
from support.pdf import a_pdf, a_scan
from support.programs import need_program
from support.serving import DEMO, KEY, serving, wait_for
from support.speaking import idle

from iolite.errors import BusyError
from iolite.media.audio import decode_audio

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-dev-shm-usage", "--disable-sync", "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream", f"--use-file-for-fake-audio-capture={DEMO / 'digits.wav'}%noloop",
]  # fmt: skip
LIMIT = 60_000  # milliseconds that anything may take on a busy machine
LONG = "on and on " * 300
WIDE, PHONE = {"width": 1280, "height": 820}, {"width": 375, "height": 720}


@pytest.fixture(scope="module")
def chromium() -> Iterator:
    need_program("chromium")
    import shutil

    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=LIMIT)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium):
    """(listener, **context) -> a page of that server, watched."""
    contexts, wrong = [], []

    def opened(listener, signed_in=True, **context):
        contexts.append(chromium.new_context(**{"viewport": WIDE, "reduced_motion": "reduce"} | context))
        page = contexts[-1].new_page()
        page.set_default_timeout(LIMIT)
        page.on("console", lambda message: message.type in ("error", "warning") and wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda r: r.url.startswith((listener.url, "blob:")) or wrong.append(f"asks {r.url}"))
        page.goto(listener.url + (f"/?token={KEY}" if signed_in else "/"))
        if signed_in:
            page.wait_for_selector("#empty:not([hidden])")
        return page

    opened.wrong = wrong
    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def expect(locator):
    from playwright.sync_api import expect

    return expect(locator)


def ask(page, text, answers=1):
    """Sends a message and waits until that many answers are complete."""
    page.fill("#text", text)
    page.keyboard.press("Enter")
    complete(page, answers)


def complete(page, answers=1):
    expect(page.locator(".turn.assistant:not(.writing)")).to_have_count(answers)


def found_again(page, title):
    """The message box has let go of what was sent, and the chat is there when the page is loaded anew."""
    expect(page.locator("#title")).to_have_text(title)
    expect(page.locator("#text")).to_have_value("")
    expect(page.locator("#files li")).to_have_count(0)
    page.reload()
    complete(page)


def answer(page):
    return page.locator(".turn.assistant").last


def test_a_picture_is_sent_and_found_again(server, open_page):
    page = open_page(server)
    page.set_input_files("#picker", DEMO / "number.png")
    expect(page.locator("#cost")).to_have_text("+ 2 of 4,096 tokens")
    page.get_by_label("Detail of number.png").select_option(label="Detail: 1 token")
    expect(page.locator("#cost")).to_have_text("+ 1 of 4,096 tokens")
    page.get_by_label("Detail of number.png").select_option(label="Detail: 2 tokens")
    ask(page, "What number is this?")
    expect(answer(page).locator(".prose")).to_have_text("47")
    expect(answer(page).locator(".spent")).to_contain_text("tokens/s")
    found_again(page, "What number is this?")
    expect(answer(page).locator(".prose")).to_have_text("47")
    picture = page.locator(".turn.user img")
    expect(picture).to_be_visible()
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") == 400
    page.click("#new")
    expect(page.locator("#empty")).to_be_visible()
    page.fill("#search", "numb")
    page.locator("#chats button", has_text="What number is this?").first.click()
    expect(answer(page).locator(".prose")).to_have_text("47")


def test_a_pdf_is_read_or_looked_at(server, open_page):
    page = open_page(server)
    red = Image.new("RGB", (300, 100), "red")
    for name, data in (("a.pdf", a_pdf("some words", "more words", size=(300, 100))), ("scan.pdf", a_scan(red, red))):
        page.set_input_files("#picker", {"name": name, "mimeType": "application/pdf", "buffer": data})
        expect(page.get_by_label(f"How {name} is read")).to_be_visible()
    choice, scan = page.get_by_label("How a.pdf is read"), page.get_by_label("How scan.pdf is read")
    expect(choice.locator("option:checked")).to_have_text(re.compile(r"^Text · \d+ tokens$"))
    expect(scan.locator("option:checked")).to_have_text(re.compile(r"^Pages as pictures · 2 × \d+ tokens$"))
    expect(scan.locator("option")).to_have_count(2)
    before = page.inner_text("#cost")
    choice.select_option("3")
    expect(choice.locator("option:checked")).to_have_text(re.compile(r"^Pages as pictures · 2 × \d+ tokens$"))
    expect(page.locator("#cost")).not_to_have_text(before)
    ask(page, "What is this?")
    expect(page.locator(".turn.user .doc")).to_have_text(["a.pdf", "scan.pdf"])
    page.reload()
    complete(page)
    page.locator(".turn.user").hover()
    page.get_by_label("Edit").click()
    expect(page.get_by_label("How a.pdf is read")).to_have_value("3")
    page.get_by_label("How a.pdf is read").select_option("")
    expect(page.locator("#cost")).to_have_text(before)


def test_pasted_and_dropped(server, open_page):
    page = open_page(server)
    data = list((DEMO / "shape.png").read_bytes())
    for kind, target in (("paste", "#text"), ("drop", "#scroll")):
        page.evaluate(
            """([kind, target, bytes]) => {
                const data = new DataTransfer();
                data.items.add(new File([new Uint8Array(bytes)], kind + ".png", { type: "image/png" }));
                const more = kind === "paste" ? { clipboardData: data } : { dataTransfer: data };
                const event = kind === "paste" ? ClipboardEvent : DragEvent;
                const options = { bubbles: true, cancelable: true, ...more };
                document.querySelector(target).dispatchEvent(new event(kind, options));
            }""",
            [kind, target, data],
        )
        expect(page.locator("#files li.here .name", has_text=f"{kind}.png")).to_be_visible()
    page.get_by_label("Remove paste.png").click()
    ask(page, "What colour is the shape?")
    expect(answer(page).locator(".prose")).to_have_text("blue")


def test_who_stops_speaking_is_answered(server, open_page):
    page = open_page(server)
    page.set_input_files("#picker", DEMO / "shape.png")
    expect(page.locator("#files li.here")).to_have_count(1)
    page.fill("#text", "Transcribe the speech.")
    page.click("#record")
    expect(page.locator("#recorder")).to_be_visible()
    expect(page.locator("#recorder-send")).to_be_focused()
    complete(page)  # without a click
    expect(page.locator("#recorder")).to_be_hidden()
    expect(answer(page).locator(".prose")).to_have_text(re.compile(r"\d"))
    expect(answer(page).locator(".spent")).to_contain_text("after the last sample")
    found_again(page, "Transcribe the speech.")
    expect(page.locator(".turn.user .said")).to_have_text("Transcribe the speech.")
    expect(page.locator(".turn.user img")).to_be_visible()
    expect(page.locator(".turn.user figcaption")).to_have_text(re.compile(r"Recording \d\d\.\d\d\.wav"))
    page.wait_for_function("document.querySelector('.turn.user audio').duration > 1")
    was_spoken(server, page)
    answer(page).get_by_label("Answer again").click()
    expect(answer(page).locator(".branch")).to_contain_text("2 / 2")


def was_spoken(server, page):
    """What is kept is what came out of the microphone, wherever in the recording it begins."""
    link = page.locator(".turn.user audio").last.get_attribute("src")
    kept = decode_audio(httpx.get(server.url + link, headers={"x-api-key": KEY}).content)
    spoken = decode_audio(str(DEMO / "digits.wav"))
    size = 1 << 18
    product = np.fft.irfft(np.fft.rfft(kept, size) * np.conj(np.fft.rfft(spoken, size)))
    assert product.max() > 0.8 * np.linalg.norm(kept) * np.linalg.norm(spoken)


def only_by_the_button(page):
    page.click("#settings-open")
    page.get_by_label("Answer when I stop speaking").uncheck()
    expect(page.get_by_label("Milliseconds of quiet")).to_be_disabled()
    page.click("#settings [value=save]")
    expect(page.locator("#settings")).to_be_hidden()


SPOKEN = re.compile(r"^(2\.[0-9]|[3-9]\.[0-9]) s")


def test_send_now_and_cancel(server, open_page):
    page = open_page(server)
    only_by_the_button(page)
    chats = page.locator("#chats button").count()
    for leave in (lambda: page.keyboard.press("Escape"), lambda: page.click("#recorder-cancel")):
        page.click("#record")
        expect(page.locator("#recorder-time")).to_have_text(re.compile("s left"))
        leave()
        expect(page.locator("#recorder")).to_be_hidden()
        expect(page.locator("#files li")).to_have_count(0)
    wait_for(lambda: idle(server))
    page.reload()
    page.wait_for_selector("#empty:not([hidden])")
    assert page.locator("#chats button").count() == chats
    page.click("#record")
    expect(page.locator("#recorder-time")).to_have_text(SPOKEN)
    page.keyboard.press("Enter")  # the button has the focus
    complete(page)
    expect(page.locator("#title")).to_have_text(re.compile("Recording"))
    page.reload()
    complete(page)
    was_spoken(server, page)


def test_a_recording_is_attached(server, open_page):
    page = open_page(server)
    only_by_the_button(page)
    page.click("#record")
    expect(page.locator("#recorder-time")).to_have_text(SPOKEN)
    page.click("#recorder-attach")
    expect(page.locator("#files li.here .price")).to_have_text(re.compile(r"[2-9]\.\d s · \d+ tokens"))
    wait_for(lambda: idle(server))
    expect(page.locator("#empty")).to_be_visible()
    ask(page, "Transcribe the speech.")
    expect(answer(page).locator(".prose")).to_have_text(re.compile(r"\d"))
    was_spoken(server, page)


def test_nothing_that_was_said_is_lost(server, open_page, monkeypatch):
    """Where nobody can read along the recording goes on; another chat, too, finds it attached."""

    async def full(*_):
        raise BusyError("all places are taken", "ask again a little later", retry_after=5.0)

    page = open_page(server)
    monkeypatch.setattr(server.app.state.service.answers, "listen", full)
    page.click("#record")
    expect(page.locator("#trouble")).to_contain_text("All places are taken; ask again a little later. The recording")
    expect(page.locator("#recorder-state")).to_have_text("Recording")
    expect(page.locator("#recorder-time")).to_have_text(SPOKEN)
    page.click("#recorder-attach")
    expect(page.locator("#trouble p")).to_have_text("All places are taken; ask again a little later")
    expect(page.locator("#files li.here")).to_have_count(1)
    monkeypatch.undo()
    page.route_web_socket("**/page/live", lambda socket: socket.close())
    page.click("#record")
    expect(page.locator("#trouble")).to_contain_text("connection")
    expect(page.locator("#recorder-time")).to_have_text(SPOKEN)
    page.click("#new")
    expect(page.locator("#recorder")).to_be_hidden()
    expect(page.locator("#files li.here")).to_have_count(2)
    ask(page, "Transcribe the speech.")


def test_a_server_that_comes_back_gets_what_was_said(server, open_page):
    page = open_page(server)
    only_by_the_button(page)
    page.click("#record")
    expect(page.locator("#recorder-time")).to_have_text(SPOKEN)
    page.route("**/page/files", lambda route: route.abort())
    page.click("#recorder-attach")
    expect(page.locator("#files li.bad .price")).to_contain_text("does not answer")
    page.unroute("**/page/files")
    page.get_by_label(re.compile("Attach Recording .* again")).click()
    expect(page.locator("#files li.here .price")).to_have_text(re.compile(r"[2-9]\.\d s"))
    assert all("Failed to load resource" in text for text in open_page.wrong), open_page.wrong
    open_page.wrong.clear()


def test_a_spoken_answer_is_stopped(script, scripted, open_page):
    """And while it is drawn, what is said is only recorded."""
    page = open_page(scripted)
    script.say(LONG)
    page.click("#record")
    expect(page.locator(".turn.assistant.writing .prose")).to_contain_text("on and")
    script.gate.clear()
    page.click("#record")
    expect(page.locator("#recorder-state")).to_have_text("Recording")
    expect(page.locator("#recorder-send")).to_be_hidden()
    page.keyboard.press("Escape")
    expect(page.locator("#recorder")).to_be_hidden()
    page.keyboard.press("Escape")
    script.gate.set()
    complete(page)
    expect(answer(page).locator(".notice")).to_have_text("Stopped here.")
    wait_for(lambda: idle(scripted))


@pytest.mark.parametrize("rate", [44_100, 48_000, 16_000, 8_000])
def test_the_microphones_rate_becomes_the_models(server, open_page, rate):
    """Tones below 7 kHz stay as they are; those that 16 kHz cannot hold are gone, and not heard as others."""
    page = open_page(server)
    found = page.evaluate(
        """async (rate) => {
            const { Resampler } = await import("/page/static/resample.js");
            const made = (hertz) => {
                const from = new Resampler(rate, 16000), out = [];
                for (let at = 0; at < rate; at += 128) out.push(...from.push(Float32Array.from(
                    { length: 128 }, (_, i) => Math.sin(2 * Math.PI * hertz * (at + i) / rate))));
                return out;
            };
            return Object.fromEntries([0.1, 1, 3, 6.5, 8.5, 12, 20].map((k) => [k, made(1000 * k)]));
        }""",
        rate,
    )
    for kilohertz, tone in ((float(k), np.array(v)) for k, v in found.items()):
        assert abs(len(tone) - 16_000) < 130
        middle = tone[2000:14_000]
        expected = np.sin(2 * np.pi * 1000 * kilohertz * np.arange(2000, 14_000) / 16_000)
        if kilohertz < 0.46 * rate / 1000 and kilohertz < 7:
            assert np.abs(middle - expected).max() < 2e-3, kilohertz
        elif kilohertz > 8 and kilohertz < rate / 2000:
            assert np.abs(middle).max() < 2e-3, kilohertz


def test_stop_again_edit_and_branches(script, scripted, open_page):
    page = open_page(scripted)
    script.say(LONG)
    page.fill("#text", "first question")
    page.keyboard.press("Enter")
    expect(page.locator(".turn.assistant.writing .prose")).to_contain_text("on and")
    assert page.locator(".turn.assistant").get_attribute("aria-busy") == "true"
    page.click("#stop")
    complete(page)
    expect(answer(page).locator(".notice")).to_have_text("Stopped here.")
    wait_for(lambda: not scripted.app.state.writings)

    script.say("another answer")
    answer(page).get_by_label("Answer again").click()
    expect(answer(page).locator(".prose")).to_have_text("another answer")
    expect(answer(page).locator(".branch")).to_contain_text("2 / 2")
    answer(page).get_by_label("Earlier version").click()
    expect(answer(page).locator(".prose")).to_contain_text("on and")

    script.say("to the edited one")
    page.locator(".turn.user").hover()
    page.get_by_label("Edit the message").click()
    expect(page.locator("#editing")).to_be_visible()
    expect(page.locator("#text")).to_have_value("first question")
    ask(page, "second question")
    expect(answer(page).locator(".prose")).to_have_text("to the edited one")
    expect(page.locator(".turn.user .branch")).to_contain_text("2 / 2")
    page.locator(".turn.user").get_by_label("Earlier version").click()
    expect(page.locator(".turn.user .said")).to_have_text("first question")
    page.reload()
    expect(page.locator(".turn.user .said")).to_have_text("first question")
    expect(answer(page).locator(".branch")).to_contain_text("/ 2")


def test_thoughts_and_calls_are_folded(script, scripted, open_page):
    page = open_page(scripted)
    page.click("#settings-open")
    page.get_by_text("Tools", exact=True).click()
    page.fill("[name=tools]", "no list")
    page.click("#settings [value=save]")
    expect(page.locator("#tools-trouble")).to_contain_text("JSON")
    tool = '[{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]'
    page.fill("[name=tools]", tool)
    page.click("#settings [value=save]")
    expect(page.locator("#settings")).to_be_hidden()
    page.click("#think")
    expect(page.locator("#think")).to_have_attribute("aria-pressed", "true")
    script.say("<|channel>thought\nfirst *this*<channel|>let me look<|tool_call>call:weather{}<tool_call|>",
               end="<|tool_response>")  # fmt: skip
    ask(page, "will it rain?")
    thought = answer(page).locator("details.thought")
    expect(thought.locator("summary")).to_have_text(re.compile(r"Thought for \d+\.\d s · \d+ tokens"))
    expect(thought.locator(".inside")).to_be_hidden()
    thought.locator("summary").click()
    expect(thought.locator("em")).to_have_text("this")
    thought.locator("summary").press("Enter")
    expect(thought.locator(".inside")).to_be_hidden()
    expect(answer(page).locator("details.call summary")).to_have_text(re.compile(r"Calls weather · \d+\.\d s"))
    script.say("<channel|>take an umbrella")  # after a result the thought goes on
    page.get_by_label("Result of weather").fill("rain")
    page.get_by_role("button", name="Give").click()
    complete(page, 2)
    expect(answer(page).locator(".prose").last).to_have_text("take an umbrella")
    expect(page.locator(".turn.tool .said")).to_have_text("rain")


MARKDOWN = r"""## a heading

so $x^2$ and <script>alert(1)</script> ![x](https://evil.example/x.png)

```python
def f(x):
    return 1
```
"""


def test_markdown_grows_and_code_is_copied(script, scripted, open_page):
    page = open_page(scripted, permissions=["clipboard-read", "clipboard-write"])
    script.say(MARKDOWN)
    ask(page, "show it")
    prose = answer(page).locator(".prose")
    expect(prose.locator("h2")).to_have_text("a heading")
    expect(prose.locator("math msup")).to_have_count(1)
    expect(prose.locator("script, img")).to_have_count(0)
    prose.get_by_role("button", name="Copy").click()
    expect(prose.locator(".copy")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "def f(x):\n    return 1\n"


def test_light_dark_and_a_phones_width(script, scripted, open_page):
    page = open_page(scripted, color_scheme="dark", viewport=PHONE)
    script.say(MARKDOWN + "\n" + "| a wide table " * 12 + "|\n" + "|-" * 12 + "|\n")
    ask(page, "a_question_of_one_long_word_" * 8)

    def ground():
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3]))

    assert ground() < 150
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert page.evaluate("document.querySelector('#scroll').scrollWidth") <= PHONE["width"]
    expect(page.locator("#side")).to_be_hidden()
    page.get_by_label("Open the list of chats").click()
    expect(page.locator("#search")).to_be_focused()
    page.click("#theme")
    assert ground() > 650
    page.reload()
    complete(page)
    assert ground() > 650, "what was chosen is remembered"
    page.get_by_label("Open the list of chats").click()
    page.locator("#chats button").first.click()
    expect(page.locator("#side")).to_be_hidden()


def test_by_keyboard_alone(script, scripted, open_page):
    page = open_page(scripted)
    expect(page.locator("#text")).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    script.say(LONG)
    page.keyboard.press("Enter")
    expect(page.locator(".turn.user .said")).to_have_text("one\ntwo", use_inner_text=True)
    expect(page.locator(".turn.assistant.writing .prose")).to_contain_text("on")
    page.keyboard.press("Escape")
    complete(page)
    page.keyboard.press("ArrowUp")
    expect(page.locator("#text")).to_have_value("one\ntwo")
    page.keyboard.press("Escape")
    expect(page.locator("#editing")).to_be_hidden()
    page.keyboard.press("Control+k")
    expect(page.locator("#search")).to_be_focused()
    page.keyboard.press("ArrowDown")
    expect(page.locator("#chats button").first).to_be_focused()
    page.evaluate(
        """document.querySelector("#chats button").className = "old";
           document.querySelector("#search").dispatchEvent(new Event("input"))"""
    )
    expect(page.locator("#chats button.old")).to_have_count(0)
    expect(page.locator("#chats button").first).to_be_focused()  # in the list that has been made anew, too
    page.keyboard.press("Control+Shift+O")
    expect(page.locator("#empty")).to_be_visible()
    page.reload()
    page.wait_for_selector("#empty:not([hidden])")
    names = page.evaluate(
        """[...document.querySelectorAll("button, input:not([type=file]), textarea, dialog, [role=log]")].filter((e) =>
             !(e.getAttribute("aria-label") || e.getAttribute("aria-labelledby") || e.textContent.trim()
                || e.labels?.length)).map((e) => e.outerHTML)"""
    )
    assert names == [], "what screen readers have no name for"


def test_rename_export_delete(script, scripted, open_page):
    page = open_page(scripted)
    script.say("hello")
    ask(page, "rename me")
    page.click("#menu-open")
    page.get_by_role("menuitem", name="Rename").click()
    page.fill("#ask-input", "A better name")
    page.keyboard.press("Enter")
    expect(page.locator("#chats [aria-current]")).to_have_text("A better name")
    for form, ending in (("Markdown", "md"), ("JSON", "json")):
        page.click("#menu-open")
        with page.expect_download() as download:
            page.get_by_role("menuitem", name=f"Export as {form}").click()
        assert download.value.suggested_filename == f"A better name.{ending}"
        assert "hello" in download.value.path().read_text()
    page.click("#menu-open")
    page.get_by_role("menuitem", name="Delete").click()
    page.locator("#ask").get_by_role("button", name="Cancel").click()
    expect(page.locator("#title")).to_have_text("A better name")
    page.click("#menu-open")
    page.get_by_role("menuitem", name="Delete").click()
    page.click("#ask-yes")
    expect(page.locator("#empty")).to_be_visible()
    expect(page.locator("#chats button", has_text="A better name")).to_have_count(0)


def test_settings_reach_the_model(script, scripted, open_page):
    page = open_page(scripted)
    page.click("#settings-open")
    page.fill("[name=max_tokens]", "3")
    page.fill("[name=system]", "be brief")
    page.click("#settings [value=save]")
    script.say(LONG)
    ask(page, "go on")
    expect(answer(page).locator(".notice")).to_contain_text("cut off after 3 tokens")
    page.reload()
    complete(page)
    page.click("#settings-open")
    expect(page.locator("[name=system]")).to_have_value("be brief")


def test_what_goes_wrong_is_told(nano, open_page):
    with serving(nano, grace=0.1) as listener:
        page = open_page(listener)
        page.set_input_files("#picker", {"name": "x.bin", "mimeType": "", "buffer": b"\x00\x01\x02" * 9})
        expect(page.locator("#files li.bad .price")).to_contain_text("no picture, sound, video, PDF or text")
        page.get_by_label("Remove x.bin").click()
        page.fill("#text", "one two three " * 5000)
        page.keyboard.press("Enter")
        expect(page.locator("#trouble")).to_contain_text("context")
        assert page.input_value("#text").startswith("one two three"), "what was written is still there"
        page.get_by_label("Dismiss").click()
        expect(page.locator("#trouble")).to_be_hidden()
    page.fill("#text", "hello?")
    page.keyboard.press("Enter")
    expect(page.locator("#trouble")).to_contain_text("does not answer")
    assert page.input_value("#text") == "hello?"
    assert all("Failed to load resource" in text for text in open_page.wrong), open_page.wrong
    open_page.wrong.clear()  # browsers note on the console what a server refuses


def test_the_key_is_asked_for(server, open_page):
    page = open_page(server, signed_in=False)
    page.fill("#token", KEY)
    page.keyboard.press("Enter")
    page.wait_for_selector("#empty:not([hidden])")
    assert KEY not in page.url
    assert [text for text in open_page.wrong if "401" not in text] == []
    open_page.wrong.clear()
