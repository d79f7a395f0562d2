// On the audio thread: the microphone's samples, mixed to one channel, some fifty milliseconds at a time.

registerProcessor("recorder", class extends AudioWorkletProcessor {
  constructor() {
    super();
    this.pieces = [];
    this.count = 0;
  }

  process([channels]) {
    if (!channels.length) return true;
    const mixed = new Float32Array(channels[0].length);
    for (const channel of channels) channel.forEach((value, i) => { mixed[i] += value / channels.length; });
    this.pieces.push(mixed);
    this.count += mixed.length;
    if (this.count >= sampleRate / 20) {
      const all = new Float32Array(this.count);
      let at = 0;
      for (const piece of this.pieces) { all.set(piece, at); at += piece.length; }
      this.port.postMessage(all, [all.buffer]);
      this.pieces = [];
      this.count = 0;
    }
    return true;
  }
});
