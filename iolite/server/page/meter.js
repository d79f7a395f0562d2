// How loud it is, as bars that run to the left: quiet ones for what is only recorded, strong ones for what is read.

const BAR = 3, GAP = 2;  // pixels

export class Meter {
  constructor(canvas) {
    this.canvas = canvas;
    this.clear();
  }

  clear() {
    this.bars = Array.from({ length: 500 }, () => ({ tall: 0, read: false }));  // of silence, from edge to edge
  }

  /** samples: Int16Array. read: whether the model reads them. */
  add(samples, read) {
    const power = samples.reduce((sum, value) => sum + value * value, 0) / samples.length;
    const decibels = 10 * Math.log10(power / 32768 ** 2 + 1e-10);
    this.bars.push({ tall: Math.max(0, Math.min(1, (decibels + 62) / 50)), read });
    this.draw();
  }

  /** The last `count` are read. */
  mark(count) {
    this.bars.slice(-count).forEach((bar) => { bar.read = true; });
  }

  draw() {
    const { canvas } = this, sharp = devicePixelRatio, width = canvas.clientWidth, height = canvas.clientHeight;
    if (canvas.width !== Math.round(width * sharp)) Object.assign(canvas, { width: Math.round(width * sharp), height: Math.round(height * sharp) });
    const pen = canvas.getContext("2d"), style = getComputedStyle(canvas);
    pen.setTransform(sharp, 0, 0, sharp, 0, 0);
    pen.clearRect(0, 0, width, height);
    this.bars = this.bars.slice(-Math.ceil(width / (BAR + GAP)));
    this.bars.forEach(({ tall, read }, at) => {
      const size = Math.max(BAR, tall * height), x = width - (this.bars.length - at) * (BAR + GAP);
      pen.fillStyle = read ? style.color : style.caretColor;
      pen.beginPath();
      pen.roundRect(x, (height - size) / 2, BAR, size, BAR / 2);
      pen.fill();
    });
  }
}
