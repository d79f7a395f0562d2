// The microphone as a WAV file of 16 kHz, mono, 16 bits: what the model reads, without a lossy codec in between.

const RATE = 16000;

export class Recorder {
  constructor(canvas, clock, longest) {
    Object.assign(this, { canvas, clock, longest, onfull: null });
  }

  async start() {
    if (!navigator.mediaDevices?.getUserMedia) throw new Error("Browsers give the microphone only to pages of this machine or over https.");
    const context = new AudioContext();
    await context.audioWorklet.addModule("/page/static/recorder-worklet.js");  // first: nothing that is said is lost
    try {
      this.stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: true } });
    } catch (error) {
      context.close();
      throw new Error(error.name === "NotAllowedError" ? "The browser was not allowed to use the microphone." : "No microphone was found.");
    }
    this.context = context;
    this.pieces = [];
    this.levels = [];
    this.count = 0;
    const worklet = new AudioWorkletNode(this.context, "recorder", { numberOfOutputs: 0 });
    worklet.port.onmessage = (event) => this.take(event.data);
    this.context.createMediaStreamSource(this.stream).connect(worklet);
    this.draw();
  }

  take(samples) {
    if (!this.context) return;
    this.pieces.push(samples);
    this.count += samples.length;
    this.levels.push(Math.sqrt(samples.reduce((sum, value) => sum + value * value, 0) / samples.length));
    this.draw();
    if (this.count / this.context.sampleRate >= this.longest) this.onfull?.();
  }

  draw() {
    const left = this.longest - this.count / this.context.sampleRate;
    this.clock.textContent = left < 5 && this.count ? `${Math.max(0, left).toFixed(1)} s left` : `${(this.count / this.context.sampleRate).toFixed(1)} s`;
    const { width, height } = this.canvas, pen = this.canvas.getContext("2d");
    pen.clearRect(0, 0, width, height);
    pen.fillStyle = getComputedStyle(this.canvas).color;
    this.levels.slice(-width / 5).forEach((level, at) => {
      const tall = Math.max(3, Math.min(1, level * 5) * height);
      pen.fillRect(at * 5, (height - tall) / 2, 3, tall);
    });
  }

  cancel() {
    this.stream?.getTracks().forEach((track) => track.stop());
    const context = this.context;
    this.context = null;
    context?.close();
    return context?.sampleRate;
  }

  /** The recording as a File, null when there is none. */
  async finish() {
    const rate = this.cancel();
    if (!rate || !this.count) return null;
    const samples = new Float32Array(this.count);
    let at = 0;
    for (const piece of this.pieces) { samples.set(piece, at); at += piece.length; }
    const offline = new OfflineAudioContext(1, Math.ceil((this.count * RATE) / rate), RATE);  // resamples
    const buffer = offline.createBuffer(1, this.count, rate), source = offline.createBufferSource();
    buffer.copyToChannel(samples, 0);
    source.buffer = buffer;
    source.connect(offline.destination);
    source.start();
    const heard = (await offline.startRendering()).getChannelData(0).subarray(0, Math.floor(this.longest * RATE));
    return new File([wav(heard)], "recording.wav", { type: "audio/wav" });
  }
}

function wav(samples) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const text = (at, letters) => [...letters].forEach((letter, i) => view.setUint8(at + i, letter.charCodeAt(0)));
  text(0, "RIFF"); view.setUint32(4, 36 + 2 * samples.length, true); text(8, "WAVEfmt ");
  view.setUint32(16, 16, true); view.setUint16(20, 1, true); view.setUint16(22, 1, true);
  view.setUint32(24, RATE, true); view.setUint32(28, 2 * RATE, true); view.setUint16(32, 2, true); view.setUint16(34, 16, true);
  text(36, "data"); view.setUint32(40, 2 * samples.length, true);
  samples.forEach((value, i) => view.setInt16(44 + 2 * i, Math.round(Math.max(-1, Math.min(1, value)) * 32767), true));
  return view.buffer;
}
