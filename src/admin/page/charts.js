// Small plots over time in SVG: stacked areas or a line, with a legend that tells the values under the pointer.

import { element } from "/page.tables.js";

const SVG = "http://www.w3.org/2000/svg";
const MARGIN = { left: 44, right: 8, top: 8, bottom: 22 };
/** The plot begins with a minute and grows to the whole history, so that it is never mostly empty. */
const SPANS_MIN = [1, 2, 5, 10];
const MINUTE_MS = 60_000;

function svg(name, attributes, ...children) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

export class Chart {
  /** `series`: {key, label, class?}, bottom first; `top`: a fixed upper end of the scale. */
  constructor(figure, { kind, series, format, top, history }) {
    Object.assign(this, { kind, series, format, top, history, samples: [], pointer: null });
    this.svg = figure.querySelector("svg");
    this.title = figure.querySelector("h2").textContent;
    this.values = series.map(() => element("b", {}, "–"));
    figure.querySelector(".legend").replaceChildren(...series.map((one, idx) => {
      return element("li", {}, element("span", { class: `swatch ${one.class ?? one.key}` }), one.label, this.values[idx]);
    }));
    this.svg.addEventListener("pointermove", (event) => { this.pointer = event.offsetX; this.paint(); });
    this.svg.addEventListener("pointerleave", () => { this.pointer = null; this.paint(); });
    new ResizeObserver(() => this.paint()).observe(this.svg);
  }

  draw(samples) {
    this.samples = samples;
    this.paint();
  }

  paint() {
    const { width, height } = this.svg.getBoundingClientRect();
    if (!this.samples.length || width === 0) return;
    const scale = this.scale(width, height);
    const visible = this.samples.filter(({ at }) => at >= scale.from);
    const marked = this.pointer === null ? visible.at(-1) : nearest(visible, scale.x, this.pointer);
    const cursor = this.pointer === null ? [] : [svg("line", { class: "cursor", x1: scale.x(marked.at), x2: scale.x(marked.at), y1: MARGIN.top, y2: height - MARGIN.bottom })];
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.replaceChildren(...this.grid(scale, width, height), ...this.shapes(visible, scale), ...cursor);
    this.series.forEach(({ key }, idx) => { this.values[idx].textContent = this.format(marked[key]); });
    const now = this.series.map(({ label, key }) => `${label} ${this.format(visible.at(-1)[key])}`);
    this.svg.setAttribute("aria-label", `${this.title}, now: ${now.join(", ")}`);
  }

  scale(width, height) {
    const to = this.samples.at(-1).at;
    const age = to - this.samples[0].at;
    const span = (SPANS_MIN.find((minutes) => age <= minutes * MINUTE_MS) ?? SPANS_MIN.at(-1)) * MINUTE_MS;
    const from = to - Math.min(span, this.history);
    const totals = this.samples.map((sample) => this.series.reduce((total, { key }) => total + (sample[key] ?? 0), 0));
    const top = this.top ?? roundUp(Math.max(1, ...totals));
    return {
      from, to, top,
      x: (at) => MARGIN.left + ((at - from) / (to - from)) * (width - MARGIN.left - MARGIN.right),
      y: (value) => height - MARGIN.bottom - (value / top) * (height - MARGIN.top - MARGIN.bottom),
    };
  }

  grid({ from, to, top, x, y }, width, height) {
    const lines = [0, 0.25, 0.5, 0.75, 1].map((part) => svg("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(part * top), y2: y(part * top) }));
    const left = [0, 0.5, 1].map((part) => {
      const text = this.top ? `${Math.round(part * top * 100)} %` : String(part * top);
      return svg("text", { class: "tick", x: MARGIN.left - 7, y: y(part * top) + 4, "text-anchor": "end" }, text);
    });
    const minutes = (to - from) / MINUTE_MS;
    const below = [0, 0.5, 1].map((part) => {
      const back = (1 - part) * minutes;
      const text = back === 0 ? "now" : back < 1 ? `${back * 60} s ago` : `${back} min ago`;
      return svg("text", { class: "tick", x: x(from + part * (to - from)), y: height - 6, "text-anchor": ["start", "middle", "end"][part * 2] }, text);
    });
    return [...lines, ...left, ...below];
  }

  shapes(samples, { x, y }) {
    if (this.kind === "line") {
      return this.series.map((one) => svg("path", { class: `line ${one.class ?? one.key}`, d: line(samples, x, ({ [one.key]: value }) => (value === null ? null : y(value))) }));
    }
    const base = samples.map(() => 0);
    return this.series.map((one) => {
      const below = samples.map(({ at }, idx) => `${x(at).toFixed(1)} ${y(base[idx]).toFixed(1)}`).reverse();
      samples.forEach((sample, idx) => { base[idx] += sample[one.key] ?? 0; });
      const above = samples.map(({ at }, idx) => `${x(at).toFixed(1)} ${y(base[idx]).toFixed(1)}`);
      return svg("path", { class: `area ${one.class ?? one.key}`, d: `M${[...above, ...below].join("L")}Z` });
    });
  }
}

/** A path that has holes where nothing is known. */
function line(samples, x, height) {
  let isDrawing = false;
  return samples.map((sample) => {
    const y = height(sample);
    const step = y === null ? "" : `${isDrawing ? "L" : "M"}${x(sample.at).toFixed(1)} ${y.toFixed(1)}`;
    isDrawing = y !== null;
    return step;
  }).join("");
}

const nearest = (samples, x, pointer) =>
  samples.reduce((best, one) => (Math.abs(x(one.at) - pointer) < Math.abs(x(best.at) - pointer) ? one : best));

/** The next of 1, 2, 5, 10, 20, 50 … */
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value);
}
