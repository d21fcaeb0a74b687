"use strict";
// Draws what launch/report_page.py left in the block "page-data": curves with a legend and values under the pointer, and the
// heatmaps of expert loads. Nothing is fetched, and text of a run becomes text nodes only.
const page = JSON.parse(document.getElementById("page-data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 220, TOP = 16, BOTTOM = 32, RIGHT = 10;
const BAD = new Set(["skipped_step", "spike", "rewind", "hang", "router_collapse"]);
let smoothing = 0;

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "line", "text", "circle", "rect"].includes(tag);
  const node = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function trimmed(text) { return text.includes(".") ? text.replace(/\.?0+$/, "") : text; }

function shown(value, percent) {
  if (value === null) return "-";
  if (percent) return trimmed((value * 100).toPrecision(3)).replace(/e.*/, "") + "%";
  const size = Math.abs(value);
  if (size === 0) return "0";
  for (const [unit, from] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e4]])
    if (size >= from) return trimmed((value / (unit === "k" ? 1e3 : from)).toPrecision(4)) + unit;
  if (size < 0.01) { const [head, power] = value.toExponential(2).split("e"); return trimmed(head) + "e" + Number(power); }
  return trimmed(value.toPrecision(4));
}

function whole(value) { return Math.round(value).toLocaleString("en-US"); }

// Round places between two values, about `count` of them.
function ticks(low, high, count) {
  const rough = (high - low) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((each) => each * power).find((each) => each >= rough * 0.999);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at++) found.push(Number((at * step).toPrecision(12)));
  return found;
}

function logTicks(low, high) {
  const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high)), found = [];
  const every = Math.max(1, Math.round((last - first) / 6));
  for (let power = first; power <= last; power += every)
    for (const head of last - first <= 2 ? [1, 2, 5] : [1]) found.push(head * 10 ** power);
  const inside = found.filter((value) => value >= low * 0.999 && value <= high * 1.001);
  return inside.length > 1 ? inside : ticks(low, high, 4);
}

function nearest(xs, at) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) { const middle = (low + high) >> 1; if (xs[middle] < at) low = middle; else high = middle; }
  return Math.abs(xs[low] - at) <= Math.abs(xs[high] - at) ? low : high;
}

function smoothed(values) {
  let mean = null, weight = 0;
  return values.map((value) => {
    if (value === null) { mean = null; return null; }
    if (mean === null) { mean = 0; weight = 0; }
    mean = smoothing * mean + (1 - smoothing) * value;
    weight = smoothing * weight + 1 - smoothing;
    return mean / weight;
  });
}

class Chart {
  constructor(figure, chart) {
    Object.assign(this, chart, { figure, hidden: new Set(), width: 0 });
    this.top = this.curves.filter((curve) => !curve.dash);
    for (const [place, curve] of this.top.entries()) curve.colour = this.colour(curve, place);
    for (const curve of this.curves.filter((each) => each.dash)) {
      curve.of = curve.name.slice(0, curve.name.lastIndexOf(" ("));
      curve.colour = this.top.find((each) => each.name === curve.of)?.colour ?? "var(--c8)";
    }
    this.plot = make("svg", { class: "plot", role: "img", "aria-label": `${this.title}, ${this.unit}`, height: HEIGHT });
    this.tip = make("div", { class: "tip", hidden: "" });
    const caption = make("figcaption", {}, this.title, make("span", {}, this.unit));
    const values = this.curves.flatMap((curve) => curve.y).filter((value) => value !== null);
    if (!this.area && !this.percent && Math.min(...values) > 0)
      caption.append(make("button", { type: "button", "aria-pressed": this.log, onclick: (event) => {
        this.log = !this.log; event.currentTarget.setAttribute("aria-pressed", this.log); this.draw(); } }, "log"));
    figure.append(caption);
    if (this.top.length > 1 || this.byRun || this.named) figure.append(this.legend());
    figure.append(this.plot, this.tip);
    if (this.note) figure.append(make("p", { class: "note" }, this.note));
    this.plot.addEventListener("pointermove", (event) => this.hover(event));
    this.plot.addEventListener("pointerdown", (event) => this.hover(event));
    this.plot.addEventListener("pointerleave", () => this.leave());
    new ResizeObserver(() => { if (this.plot.clientWidth !== this.width) this.draw(); }).observe(figure);
    this.draw();
  }

  colour(curve, place) {
    if (this.byRun) return `var(--c${curve.run % 10})`;
    if (this.ordered && this.top.length > 3) {
      const hue = 265 - 235 * place / (this.top.length - 1);
      return `hsl(${hue} 65% 52%)`;
    }
    return `var(--c${place % 10})`;
  }

  legend() {
    return make("div", { class: "legend" }, ...this.top.map((curve) => {
      const swatch = make("svg", { viewBox: "0 0 15 10", "aria-hidden": "true" }, make("rect", { y: 3, width: 15, height: 4, rx: 2, fill: curve.colour }));
      return make("button", { type: "button", "aria-pressed": "true", title: "click: hide or show; with shift: only this one", onclick: (event) => {
        if (event.shiftKey) this.hidden = new Set(this.top.map((each) => each.name).filter((name) => name !== curve.name));
        else if (!this.hidden.delete(curve.name)) this.hidden.add(curve.name);
        for (const [place, button] of [...event.currentTarget.parentNode.children].entries())
          button.setAttribute("aria-pressed", !this.hidden.has(this.top[place].name));
        this.draw();
      } }, swatch, curve.name);
    }));
  }

  visible() {
    const found = this.curves.filter((curve) => !this.hidden.has(curve.of ?? curve.name));
    return found.length ? found : this.curves;
  }

  // Bottom and top of every curve: stacked, or nothing below.
  bands(curves) {
    let below = null;
    return curves.map((curve) => {
      if (!this.area) return { curve, y: curve.y };
      const low = below ?? curve.y.map(() => 0), y = curve.y.map((value, place) => low[place] + (value ?? 0));
      below = y;
      return { curve, y, low };
    });
  }

  draw() {
    const bands = this.bands(this.visible()), width = this.width = this.plot.clientWidth || 400;
    const values = bands.flatMap((band) => band.y).filter((value) => value !== null), xs = bands.flatMap((band) => band.curve.x);
    let low = Math.min(...values), high = Math.max(...values);
    let first = Math.min(...xs), last = Math.max(...xs);
    if (first < 0.3 * page.last) first = 0;  // the same axis in all charts, but for curves of one stage of several
    if (last > 0.7 * page.last) last = page.last;
    if (this.area || (!this.log && low >= 0 && low < 0.5 * high) || (this.percent && low >= 0 && high - low < 0.01)) low = Math.min(0, low);
    if (low === high) { high += Math.abs(high) * 0.1 || 1; if (this.log) low *= 0.9; else if (low) low -= Math.abs(low) * 0.1; }
    else if (!this.log) { const more = 0.04 * (high - low); high += this.area ? 0 : more; if (low) low -= more; }
    const marksY = this.log ? logTicks(low, high) : ticks(low, high, 4), labels = marksY.map((value) => shown(value, this.percent));
    const left = 12 + 6.8 * Math.max(...labels.map((label) => label.length));
    const scale = this.log ? Math.log : (value) => value, from = scale(low), to = scale(high);
    this.x = (step) => last === first ? (left + width - RIGHT) / 2 : left + (step - first) / (last - first) * (width - RIGHT - left);
    this.y = (value) => HEIGHT - BOTTOM - (scale(value) - from) / (to - from) * (HEIGHT - BOTTOM - TOP);
    this.step = (pixel) => first + (pixel - left) / Math.max(1, width - RIGHT - left) * (last - first);
    this.drawn = bands;
    const parts = [];
    for (const [place, value] of marksY.entries()) {
      parts.push(make("line", { class: "grid", x1: left, x2: width - RIGHT, y1: this.y(value), y2: this.y(value) }));
      parts.push(make("text", { x: left - 6, y: this.y(value) + 4, "text-anchor": "end" }, labels[place]));
    }
    parts.push(...this.axis(first, last, left, width), ...this.marks(first, last, width));
    for (const band of bands) parts.push(...this.paths(band));
    this.cursor = make("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
    this.plot.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.plot.replaceChildren(...parts, this.cursor);
  }

  axis(first, last, left, width) {
    const bottom = HEIGHT - BOTTOM;
    const parts = [make("line", { class: "axis", x1: left, x2: width - RIGHT, y1: bottom, y2: bottom })];
    const places = first === last ? [first] : ticks(first, last, Math.max(2, Math.floor(width / 95))).filter(Number.isInteger);
    for (const step of places) {
      const x = this.x(step), anchor = x > width - 24 ? "end" : "middle";
      parts.push(make("line", { class: "axis", x1: x, x2: x, y1: bottom, y2: bottom + 4 }));
      parts.push(make("text", { x: anchor === "end" ? width - 2 : x, y: bottom + 15, "text-anchor": anchor }, last >= 1e6 ? shown(step) : whole(step)));
    }
    parts.push(make("text", { x: width - RIGHT, y: HEIGHT - 3, "text-anchor": "end" }, "step"));
    return parts;
  }

  // Where stages and phases begin, and what happened.
  marks(first, last, width) {
    const parts = [], bottom = HEIGHT - BOTTOM, runs = this.runs();
    for (const run of runs.length === 1 ? runs : []) {
      for (const [place, [step, name]] of run.bounds.entries()) {
        const next = run.bounds[place + 1]?.[0] ?? last;
        if (step > last || next < first) continue;
        const x = this.x(Math.max(first, step)), room = this.x(Math.min(next, last)) - x, letters = Math.floor(room / 6.2 - 0.5);
        if (step > first) parts.push(make("line", { class: "bound", x1: x, x2: x, y1: 4, y2: bottom }));
        if (letters > 3) parts.push(make("text", { class: "edge-name", x: x + 3, y: 11 }, name.length > letters ? name.slice(0, letters - 1) + "…" : name));
      }
    }
    for (const run of runs) {
      for (const [step, kind] of run.events) {
        if (step < first || step > last) continue;
        const x = this.x(step), bad = BAD.has(kind) ? " bad" : "";
        parts.push(make("line", { class: "event" + bad, x1: x, x2: x, y1: TOP, y2: bottom }));
        parts.push(make("path", { class: "flag" + bad, d: `M${x - 4} ${bottom + 6}h8l-4 -6z` }));
      }
    }
    return parts;
  }

  runs() { return [...new Set(this.visible().map((curve) => curve.run))].map((place) => page.runs[place]); }

  path(xs, ys) {
    let d = "", pen = "M";
    for (let place = 0; place < xs.length; place++) {
      if (ys[place] === null || (this.log && ys[place] <= 0)) { pen = "M"; continue; }
      d += `${pen}${this.x(xs[place]).toFixed(1)} ${this.y(ys[place]).toFixed(1)}`;
      pen = "L";
    }
    return d;
  }

  paths({ curve, y, low }) {
    if (this.area) {
      const back = curve.x.map((x, place) => `L${this.x(x).toFixed(1)} ${this.y(low[place]).toFixed(1)}`).reverse().join("");
      return [make("path", { class: "area", d: this.path(curve.x, y) + back + "Z", fill: curve.colour })];
    }
    const style = { class: "line", stroke: curve.colour, ...(curve.dash ? { "stroke-dasharray": "4 3" } : {}) };
    const parts = [];
    if (smoothing && !this.exact) parts.push(make("path", { ...style, class: "line raw", d: this.path(curve.x, y) }));
    parts.push(make("path", { ...style, d: this.path(curve.x, smoothing && !this.exact ? smoothed(y) : y) }));
    if ((this.dots && curve.x.length < 80) || curve.x.length < 3)
      for (const [place, x] of curve.x.entries())
        if (y[place] !== null) parts.push(make("circle", { cx: this.x(x), cy: this.y(y[place]), r: 2.6, fill: curve.colour }));
    return parts;
  }

  hover(event) {
    const box = this.plot.getBoundingClientRect(), pixel = event.clientX - box.left, step = this.step(pixel);
    const found = this.drawn.map(({ curve, y }) => ({ curve, place: nearest(curve.x, step), y }));
    const closest = found.reduce((a, b) => Math.abs(a.curve.x[a.place] - step) <= Math.abs(b.curve.x[b.place] - step) ? a : b);
    const at = closest.curve.x[closest.place], x = this.x(at), near = Math.abs(this.step(14) - this.step(0));
    const rows = found.filter(({ curve, place }) => !curve.dash && Math.abs(curve.x[place] - at) <= near && curve.y[place] !== null)
      .map(({ curve, place }) => [curve, curve.y[place], this.asked(curve, at)]);
    if (!this.area) rows.sort((a, b) => b[1] - a[1]); else rows.reverse();
    const happened = this.runs().flatMap((run) => run.events.filter(([when]) => Math.abs(this.x(when) - pixel) < 5));
    this.tip.replaceChildren(make("b", {}, `step ${whole(at)}`), ...rows.slice(0, 18).map(([curve, value, asked]) => {
      const swatch = make("i"); swatch.style.background = curve.colour;
      const name = this.top.length > 1 || this.byRun || this.named ? curve.name : "";
      return make("div", {}, swatch, make("span", {}, name), shown(value, this.percent) + asked);
    }), ...happened.slice(0, 4).map(([when, kind, text]) => make("p", {}, `${whole(when)}: ${text || kind.replaceAll("_", " ")}`)));
    this.tip.hidden = false;
    this.cursor.setAttribute("x1", x); this.cursor.setAttribute("x2", x); this.cursor.setAttribute("visibility", "visible");
    const room = this.figure.clientWidth, wide = this.tip.offsetWidth, offset = this.plot.offsetLeft ?? 0;
    const place = x + offset + 14 + wide > room ? x + offset - wide - 14 : x + offset + 14;
    this.tip.style.left = `${Math.max(4, place + box.left - this.figure.getBoundingClientRect().left - offset)}px`;
    this.tip.style.top = `${box.top - this.figure.getBoundingClientRect().top + TOP}px`;
  }

  asked(curve, at) {
    const other = this.curves.find((each) => each.of === curve.name);
    return other ? ` (${shown(other.y[nearest(other.x, at)], this.percent)} asked)` : "";
  }

  leave() { this.tip.hidden = true; this.cursor.setAttribute("visibility", "hidden"); }
}

// A load's byte as colour: idle blue, even light, busy red, none dark. 1 to 255 is 1/16 to 16 times the mean.
function heat(cell) {
  if (cell === 0) return [32, 33, 40];
  const load = ((cell - 1) / 254 * 8 - 4) / 2, busy = Math.min(1, Math.max(-1, load)), far = Math.abs(busy) ** 0.8;
  const to = busy < 0 ? [38, 92, 190] : [190, 24, 40];
  return [244, 240, 232].map((from, channel) => Math.round(from + (to[channel] - from) * far));
}

function paint(canvas, columns, bytes) {
  canvas.width = columns; canvas.height = bytes.length / columns;
  const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
  for (const [place, cell] of bytes.entries()) image.data.set([...heat(cell), 255], 4 * place);
  context.putImageData(image, 0, 0);
}

function heatmap(figure, map) {
  const several = page.runs.length > 1, tip = make("div", { class: "tip", hidden: "" }), step = make("output");
  const slider = make("input", { type: "range", min: 0, max: map.frames.length - 1, value: map.frames.length - 1, "aria-label": "step of the heatmap" });
  const caption = make("figcaption", {}, `Expert load, ${map.decoder}${several ? ": " + map.run : ""}`, make("span", {}, `${map.layers} layers of ${map.experts} experts, by the media of the token`));
  const views = map.names.map((name) => {
    const canvas = make("canvas", { role: "img", "aria-label": `expert loads, ${name}` });
    canvas.style.height = `${Math.min(320, Math.max(48, map.layers * (map.layers > 24 ? 5 : 14)))}px`;
    const rows = make("div", { class: "rows" }, make("span", {}, "layer 0"), map.layers > 1 ? make("span", {}, String(map.layers - 1)) : "");
    const columns = make("div", { class: "columns" }, make("span", {}, "expert 0"), make("span", {}, String(map.experts - 1)));
    const view = { name, canvas, bytes: null, node: make("div", { class: "map" }, make("h4", {}, name), make("div", { class: "frame" }, rows, canvas, columns)) };
    canvas.addEventListener("pointermove", (event) => {
      const box = canvas.getBoundingClientRect(), outer = figure.getBoundingClientRect();
      const expert = Math.min(map.experts - 1, Math.floor((event.clientX - box.left) / box.width * map.experts));
      const layer = Math.min(map.layers - 1, Math.floor((event.clientY - box.top) / box.height * map.layers));
      const cell = view.bytes?.[Math.max(0, layer) * map.experts + Math.max(0, expert)] ?? 0;
      const load = cell ? `${shown(2 ** ((cell - 1) / 254 * 8 - 4))} times the mean`.replace(/^(\d+\.\d\d)\d+/, "$1") : "no token";
      tip.replaceChildren(make("b", {}, load), `layer ${layer}, expert ${expert}, ${name}`);
      tip.hidden = false;
      tip.style.left = `${Math.min(event.clientX - outer.left + 12, outer.width - tip.offsetWidth - 4)}px`;
      tip.style.top = `${event.clientY - outer.top + 14}px`;
    });
    canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
    return view;
  });
  const show = () => {
    const frame = map.frames[slider.value];
    step.textContent = `step ${whole(frame.step)}`;
    for (const view of views) {
      const found = frame.loads[view.name];
      view.node.hidden = found === undefined;
      if (found === undefined) continue;
      view.bytes = Uint8Array.from(atob(found), (letter) => letter.charCodeAt(0));
      paint(view.canvas, map.experts, view.bytes);
    }
  };
  slider.addEventListener("input", show);
  const scale = make("canvas"), none = make("canvas", { class: "none" });
  paint(scale, 128, Uint8Array.from({ length: 128 }, (_, place) => 64 + place)); paint(none, 1, Uint8Array.of(0));
  figure.append(caption, make("div", { class: "controls" }, slider, step), make("div", { class: "maps" }, ...views.map((view) => view.node)),
    make("div", { class: "scale" }, "1/4 of the mean", scale, "4 times", none, "no token"), tip);
  show();
}

const charts = [...document.querySelectorAll("[data-chart]")].map((figure) => new Chart(figure, page.charts[figure.dataset.chart]));
for (const figure of document.querySelectorAll("[data-heat]")) heatmap(figure, page.heat[figure.dataset.heat]);
const control = document.getElementById("smoothing");
control.hidden = !charts.length;
control.querySelector("input").addEventListener("input", (event) => {
  smoothing = Number(event.target.value);
  for (const chart of charts) chart.draw();
});
const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) links.get(entry.target.id)?.classList.toggle("here", entry.isIntersecting);
}, { rootMargin: "-30% 0px -65% 0px" });
for (const section of document.querySelectorAll("main section")) seen.observe(section);
