// On the audio thread: the microphone's samples as the model reads them, 16 kHz, mono, 16 bits, 40 ms at a time.

import { Resampler } from "./resample.js";

const RATE = 16000, PIECE = 640;

registerProcessor("recorder", class extends AudioWorkletProcessor {
  constructor() {
    super();
    this.resampler = new Resampler(sampleRate, RATE);
    this.piece = new Int16Array(PIECE);
    this.count = 0;
  }

  process([channels]) {
    if (!channels.length) return true;
    const mixed = new Float32Array(channels[0].length);
    for (const channel of channels) channel.forEach((value, i) => { mixed[i] += value / channels.length; });
    for (const value of this.resampler.push(mixed)) {
      this.piece[this.count++] = Math.round(Math.max(-1, Math.min(1, value)) * 32767);
      if (this.count === PIECE) {
        this.port.postMessage(this.piece.slice());
        this.count = 0;
      }
    }
    return true;
  }
});
