// The microphone's bar: what is said goes to the model while it is said, and is kept here until the server has it.

import { $, say } from "./dom.js";
import { speak } from "./api.js";
import { Meter } from "./meter.js";
import { RATE, Recorder, wav } from "./recorder.js";

const PIECE = 640;  // samples that the recorder gives at a time
const GOES_ON = "The recording goes on; attach it when you have spoken.";

/** Milliseconds of quiet after which what was said is sent; null: only the button does. Kept in this browser. */
export const pause = {
  usual: 600,
  get: () => JSON.parse(localStorage.getItem("pause") ?? pause.usual),
  set: (milliseconds) => localStorage.setItem("pause", JSON.stringify(milliseconds)),
};

export class Speech {
  /** begin() gives {start, answer}: what belongs to the same message, and who shows the answer to it. */
  constructor(about, composer, begin) {
    Object.assign(this, { about, composer, begin, recorder: new Recorder(), meter: new Meter($("recorder").querySelector("canvas")) });
    this.state = "off";  // then waiting (for a voice), reading; or alone: recorded, not read; opening and sent are short
    this.line = null;
    $("record").hidden = !about.modalities.includes("audio");
    $("record").addEventListener("click", () => this.open());
    $("recorder-send").addEventListener("click", () => this.send());
    $("recorder-attach").addEventListener("click", () => this.attach());
    $("recorder-cancel").addEventListener("click", () => this.cancel());
  }

  get on() {
    return this.state !== "off";
  }

  async open() {
    if (this.on) return;
    this.become("opening");
    this.composer.trouble(null);
    Object.assign(this, { pieces: [], gone: 0, from: 0, longest: this.about.longest, why: null });
    this.name = `Recording ${new Date().toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" }).replace(":", ".")}.wav`;
    this.meter.clear();
    try {
      await this.recorder.start((samples) => this.take(samples));
    } catch (error) {
      this.close();
      this.composer.trouble(error.message);
      return;
    }
    if (this.composer.busy) this.become("alone");  // an answer is drawn
    else this.connect();
    $("recorder").hidden = false;
    this.composer.setListening(true);
    this.show();
    (this.line ? $("recorder-send") : $("recorder-attach")).focus();
  }

  connect() {
    const { start, answer } = this.begin(), silence = pause.get();
    let begun = false;
    this.composer.setBusy(true);
    this.become("waiting");
    this.line = speak({ ...start, name: this.name, silence_ms: silence }, (event) => {
      begun ||= event.type === "begin";
      if (begun) {
        if (event.type === "begin") this.close();
        if (event.type === "error") answer.over(event.message);
        else answer.on(event);
      } else if (event.type === "ready") {
        this.longest = Math.min(this.longest, event.longest_ms / 1000);
      } else if (event.type === "speech_started") {
        this.from = Math.round((event.from_ms * RATE) / 1000);
        this.meter.mark(Math.ceil(this.seconds * RATE / PIECE));
        this.become("reading");
      } else if (event.type === "speech_ended") {
        this.sent();
      } else if (event.type === "nothing_heard") {
        this.fail("No voice was heard, it may have been too faint. What was recorded is attached.");
      } else if (event.type === "error") {
        this.fail(event.message);
      }
    });
  }

  /** 40 ms more. */
  take(samples) {
    if (!["waiting", "reading", "alone"].includes(this.state)) return;
    this.pieces.push(samples);
    this.line?.hear(samples);
    if (this.state === "waiting" && this.pieces.length * PIECE > this.longest * RATE) { this.pieces.shift(); this.gone += PIECE; }
    this.meter.add(samples, this.state === "reading");
    this.show();
    if (this.state === "alone" && this.seconds >= this.longest) this.attach();
  }

  /** Of what is to be sent. */
  get seconds() {
    return Math.max(0, this.gone + this.pieces.length * PIECE - Math.max(this.from, this.gone)) / RATE;
  }

  /** What the recorder has and nobody else, as a file. */
  get file() {
    const all = new Int16Array(this.pieces.length * PIECE);
    this.pieces.forEach((piece, at) => all.set(piece, at * PIECE));
    return wav(all.subarray(Math.max(0, this.from - this.gone)), this.name);
  }

  send() {
    this.line.commit();
    this.sent();
  }

  /** The speaker has ended; the bar goes, the sound stays until the server has stored it. */
  sent() {
    this.recorder.stop();
    this.become("sent");
    $("recorder").hidden = true;
    say("Sent");
  }

  attach() {
    const file = this.pieces.length ? this.file : null;
    this.hangUp();
    this.close();
    if (file) this.composer.attach([file]);
    this.composer.trouble(file ? this.why : "Nothing was recorded.");
  }

  cancel() {
    if (this.state === "opening") return;
    this.hangUp();
    this.close();
    this.composer.trouble(null);
    say("Cancelled");
  }

  /** Another chat is opened: what was said is kept. */
  leave() {
    if (this.state === "reading" || this.state === "alone") this.attach();
    else if (this.state === "waiting") this.cancel();
  }

  /** Nobody reads along any more. What was said whole becomes an attachment at once, the rest when it is whole. */
  fail(message) {
    this.why = message;
    if (this.state === "sent") {
      this.attach();
    } else {
      this.hangUp();
      this.become("alone");
      this.composer.trouble(`${message.replace(/\.$/, "")}. ${GOES_ON}`);
      $("recorder-attach").focus();
    }
  }

  /** Before there is an answer. */
  hangUp() {
    if (!this.line) return;
    this.line.close();
    this.line = null;
    this.composer.setBusy(false);
  }

  close() {
    this.recorder.stop();
    this.line = null;
    this.become("off");
    $("recorder").hidden = true;
    this.composer.setListening(false);
  }

  become(state) {
    this.state = state;
    const words = { waiting: "Speak now", reading: "The model reads along", alone: "Recording" }[state] ?? "";
    $("recorder-state").textContent = words;
    $("recorder").dataset.state = state;
    $("record").disabled = state !== "off";
    $("recorder-send").hidden = state === "alone";
    $("recorder-attach").className = state === "alone" ? "primary" : "link";
  }

  show() {
    const { seconds, longest } = this, left = Math.max(0, longest - seconds);
    $("recorder-time").textContent = this.state === "waiting" ? `up to ${longest.toFixed(0)} s` : `${seconds.toFixed(1)} s · ${left.toFixed(left < 5 ? 1 : 0)} s left`;
    $("recorder").classList.toggle("late", left < 5);
  }
}
