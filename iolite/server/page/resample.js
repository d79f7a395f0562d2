// From the microphone's rate to another: a windowed sinc, which first takes away what the new rate cannot hold.

const ZEROS = 24;  // crossings of the sinc on each side
const PASS = 0.92;  // of half the lower rate; what is 1.02 times that is 75 dB down
const BETA = 8;  // of Kaiser's window

/** For rates in whole hertz; takes samples piece by piece. */
export class Resampler {
  constructor(from, to) {
    const common = divisor(from, to), cut = PASS * Math.min(1, to / from), half = Math.ceil(ZEROS / cut);
    this.up = to / common;
    this.down = from / common;
    this.taps = Array.from({ length: this.up }, (_, phase) => taps(phase / this.up, cut, half));
    this.phase = 0;
    this.held = new Float32Array(half - 1);  // what comes before the first sample is silence
  }

  /** More samples; returns those of the new rate that are complete, Float32Array. */
  push(samples) {
    const all = new Float32Array(this.held.length + samples.length), width = this.taps[0].length, made = [];
    all.set(this.held);
    all.set(samples, this.held.length);
    let at = 0;
    for (; at + width <= all.length; this.phase %= this.up) {
      const weights = this.taps[this.phase];
      let sum = 0;
      for (let i = 0; i < width; i += 1) sum += weights[i] * all[at + i];
      made.push(sum);
      this.phase += this.down;
      at += Math.floor(this.phase / this.up);
    }
    this.held = all.slice(at);
    return Float32Array.from(made);
  }
}

/** Weights of the samples around a place that lies `later` after one of them. */
function taps(later, cut, half) {
  const found = Float64Array.from({ length: 2 * half }, (_, i) => {
    const x = i - half + 1 - later, edge = Math.max(0, 1 - (x / half) ** 2);
    return (x === 0 ? cut : Math.sin(Math.PI * cut * x) / (Math.PI * x)) * bessel(BETA * Math.sqrt(edge));
  });
  const sum = found.reduce((total, value) => total + value, 0);
  return found.map((value) => value / sum);
}

/** The modified Bessel function of the first kind, order 0. */
function bessel(x) {
  let sum = 1, term = 1;
  for (let n = 1; term > 1e-12 * sum; n += 1) { term *= (x / (2 * n)) ** 2; sum += term; }
  return sum;
}

const divisor = (a, b) => (b === 0 ? a : divisor(b, a % b));
