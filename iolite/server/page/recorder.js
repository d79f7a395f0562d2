// The microphone as the model reads it: 16 kHz, mono, 16 bits, without a lossy codec in between.

export const RATE = 16000;

export class Recorder {
  /** From now on take(samples) gets 40 ms at a time, as an Int16Array. Throws what a person can read. */
  async start(take) {
    if (!navigator.mediaDevices?.getUserMedia) throw new Error("Browsers give the microphone only to pages of this machine or over https.");
    // At the device's own rate: not every browser connects a microphone to a context of another.
    const context = new AudioContext();
    try {
      await context.audioWorklet.addModule("/page/static/recorder-worklet.js");  // first: nothing that is said is lost
      this.stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: true } });
    } catch (error) {
      context.close();
      throw new Error({ NotAllowedError: "The browser was not allowed to use the microphone.", NotFoundError: "No microphone was found." }[error.name] ?? "The microphone cannot be used.");
    }
    this.context = context;
    const worklet = new AudioWorkletNode(context, "recorder", { numberOfOutputs: 0 });
    worklet.port.onmessage = (event) => { if (this.context === context) take(event.data); };
    context.createMediaStreamSource(this.stream).connect(worklet);
  }

  stop() {
    this.stream?.getTracks().forEach((track) => track.stop());
    this.context?.close();
    this.stream = this.context = null;
  }
}

/** Samples as a WAV file. */
export function wav(samples, name) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const text = (at, letters) => [...letters].forEach((letter, i) => view.setUint8(at + i, letter.charCodeAt(0)));
  text(0, "RIFF"); view.setUint32(4, 36 + 2 * samples.length, true); text(8, "WAVEfmt ");
  view.setUint32(16, 16, true); view.setUint16(20, 1, true); view.setUint16(22, 1, true);
  view.setUint32(24, RATE, true); view.setUint32(28, 2 * RATE, true); view.setUint16(32, 2, true); view.setUint16(34, 16, true);
  text(36, "data"); view.setUint32(40, 2 * samples.length, true);
  samples.forEach((value, i) => view.setInt16(44 + 2 * i, value, true));
  return new File([view.buffer], name, { type: "audio/wav" });
}
