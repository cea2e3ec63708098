"use strict";
// A chart: the curves of one quantity in every run, over steps or tokens. `view` is what all charts share:
// {axis, smoothing, logarithmic, marks, hidden: Set of curve numbers, range: [from, to] or null, at: x under the cursor or null}.

const SVG = "http://www.w3.org/2000/svg";
const COLORS = 8, LEFT = 62, RIGHT = 26, TOP = 12, BOTTOM = 26;

const color = number => `var(--c${number % COLORS})`;

function draw(parent, name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

function short(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1e12) return +(value / 1e12).toPrecision(4) + "T";
  if (size >= 1e9) return +(value / 1e9).toPrecision(4) + "G";
  if (size >= 1e6) return +(value / 1e6).toPrecision(4) + "M";
  if (size >= 1e4) return +(value / 1e3).toPrecision(4) + "k";
  if (size !== 0 && size < 1e-3) return value.toExponential(2);
  return String(+value.toPrecision(5));
}

// Index of the last of the rising numbers `xs` that is at most `x`, or -1.
function before(xs, x) {
  let low = 0, high = xs.length;
  while (low < high) { const middle = (low + high) >> 1; if (xs[middle] <= x) low = middle + 1; else high = middle; }
  return low - 1;
}

// Index of the number of the rising `xs` that is nearest to `x`.
function nearest(xs, x) {
  const i = before(xs, x);
  return i + 1 < xs.length && (i < 0 || xs[i + 1] - x < x - xs[i]) ? i + 1 : i;
}

// The value at `x` of the line through (xs, ys), held at its ends.
function along(xs, ys, x) {
  const i = before(xs, x);
  if (i < 0) return ys[0];
  if (i >= xs.length - 1) return ys[ys.length - 1];
  return ys[i] + (ys[i + 1] - ys[i]) * (x - xs[i]) / (xs[i + 1] - xs[i]);
}

// Exponential moving average without the pull of its start: the weight of what is not there is taken out.
function smooth(ys, weight) {
  let sum = 0, mass = 0;
  return ys.map(y => { sum = weight * sum + (1 - weight) * y; mass = weight * mass + 1 - weight; return sum / mass; });
}

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find(m => m * power >= rough) * power, found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

class Chart {
  constructor(spec, curves, view, moved) {
    Object.assign(this, {spec, curves, view, moved});
    this.node = document.createElement("div");
    this.node.className = "chart";
    this.node.dataset.chart = spec.id;
    const title = document.createElement("h3"), unit = document.createElement("small");
    title.append(spec.title, unit);
    unit.textContent = spec.unit;
    this.svg = document.createElementNS(SVG, "svg");
    this.svg.setAttribute("tabindex", "0");
    this.svg.setAttribute("role", "img");
    this.svg.setAttribute("aria-label", `${spec.title}${spec.unit ? ", " + spec.unit : ""}`);
    this.tip = document.createElement("div");
    this.tip.className = "tip";
    this.tip.hidden = true;
    this.node.append(title, this.svg, this.tip);
    this.listen();
  }

  // What is drawn of one curve: {number, name, raw: [xs, ys], line: [xs, ys]}; `raw` stands behind a smoothed `line`.
  get lines() {
    const {axis, smoothing, hidden} = this.view, found = [];
    this.curves.forEach((curve, number) => {
      if (hidden.has(number)) return;
      for (const name of this.spec.series) {
        const s = curve.series[name];
        if (!s) continue;
        const place = xs => axis === "step" || !curve.tokens.x.length ? xs : xs.map(x => along(curve.tokens.x, curve.tokens.y, x));
        const raw = [place(s.x), s.y], sparse = name.startsWith("val/");
        const line = smoothing > 0 && !sparse ? [place(s.mx || s.x), smooth(s.my || s.y, smoothing)] : null;
        found.push({number, name, raw, line: line || raw, smoothed: line !== null, sparse});
      }
    });
    return found;
  }

  render() {
    const lines = this.lines, {logarithmic, range} = this.view;
    const width = Math.max(280, this.node.clientWidth - 24), height = this.node.classList.contains("wide") ? 300 : 200;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.style.height = height + "px";
    this.svg.replaceChildren();
    const all = lines.flatMap(l => [l.raw[0][0], l.raw[0][l.raw[0].length - 1]]);
    const [from, to] = range || [Math.min(...all), Math.max(...all)];
    let low = Infinity, high = -Infinity;
    for (const l of lines) l.raw[0].forEach((x, i) => {
      const y = l.raw[1][i];
      if (x >= from && x <= to && (!logarithmic || y > 0)) { low = Math.min(low, y); high = Math.max(high, y); }
    });
    this.empty = !(high >= low);
    if (this.empty) { draw(this.svg, "text", {x: width / 2, y: height / 2, "text-anchor": "middle"}, "nothing to draw here"); return; }
    const scale = logarithmic ? Math.log10 : y => y;
    let [a, b] = [scale(low), scale(high)];
    const spread = b - a || Math.abs(b) || 1;
    [a, b] = [a - spread * 0.05, b + spread * 0.05];
    if (!logarithmic && low >= 0 && a < 0) a = 0;
    const w = width - LEFT - RIGHT, h = height - TOP - BOTTOM, across = to - from || 1;
    Object.assign(this, {width, height, from, to, drawn: lines,
      px: x => LEFT + w * (x - from) / across, unpx: p => from + across * (p - LEFT) / w,
      py: y => TOP + h * (b - scale(y)) / (b - a)});
    this.frame(a, b, logarithmic);
    const clip = `clip-${this.spec.id.replace(/\W/g, "-")}`;
    draw(draw(this.svg, "clipPath", {id: clip}), "rect", {x: LEFT, y: 0, width: w, height});
    this.inside = draw(this.svg, "g", {"clip-path": `url(#${clip})`});
    if (this.view.marks) this.markEvents();
    for (const l of lines) {
      if (l.smoothed) this.path(l, l.raw, "curve raw");
      this.path(l, l.line, l.sparse ? "curve val" : "curve");
    }
    this.over = draw(this.svg, "g", {});
    this.point();
  }

  frame(a, b, logarithmic) {
    const {width, height} = this;
    for (const t of ticks(a, b, height / 45)) {
      const value = logarithmic ? 10 ** t : t, y = this.py(value);
      draw(this.svg, "line", {x1: LEFT, x2: width - RIGHT, y1: y, y2: y, class: "grid"});
      draw(this.svg, "text", {x: LEFT - 8, y: y + 4, "text-anchor": "end"}, short(value));
    }
    for (const t of ticks(this.from, this.to, width / 110)) draw(this.svg, "text", {x: this.px(t), y: height - 8, "text-anchor": "middle"}, short(t));
    draw(this.svg, "line", {x1: LEFT, x2: width - RIGHT, y1: height - BOTTOM, y2: height - BOTTOM, class: "axis"});
  }

  path(line, [xs, ys], kind) {
    const margin = (this.to - this.from) * 0.02;
    let d = "", gap = true;
    for (let i = 0; i < xs.length; i++) {
      if (xs[i] < this.from - margin && xs[i + 1] < this.from - margin) continue;
      if (this.view.logarithmic && ys[i] <= 0) { gap = true; continue; }
      d += `${gap ? "M" : "L"}${this.px(xs[i]).toFixed(1)} ${this.py(ys[i]).toFixed(1)}`;
      gap = false;
      if (xs[i] > this.to + margin) break;
    }
    draw(this.inside, "path", {d, class: kind, stroke: color(line.number), "data-series": line.name, "data-curve": line.number});
    if (line.sparse && xs.length <= 60) xs.forEach((x, i) => draw(this.inside, "circle", {cx: this.px(x), cy: this.py(ys[i]), r: 3, fill: color(line.number)}));
    else if (xs.length === 1) draw(this.inside, "circle", {cx: this.px(xs[0]), cy: this.py(ys[0]), r: 3, fill: color(line.number)});
  }

  place(curve, step) { return this.view.axis === "step" || !curve.tokens.x.length ? step : along(curve.tokens.x, curve.tokens.y, step); }

  markEvents() {
    this.curves.forEach((curve, number) => {
      if (this.view.hidden.has(number)) return;
      // What went wrong is drawn last, above what happened at the same step.
      for (const event of [...curve.events].sort((one, other) => (one.level === "error") - (other.level === "error"))) {
        const x = this.px(this.place(curve, event.step));
        const mark = draw(this.inside, "g", {"data-event": event.kind, "data-step": event.step});
        draw(mark, "line", {x1: x, x2: x, y1: TOP, y2: this.height - BOTTOM, class: `mark mark-${event.level}`});
        draw(mark, "path", {d: `M${x - 4} ${TOP - 8}h8l-4 7z`, class: `flag-${event.level}`});
        draw(mark, "title", {}, `step ${event.step}: ${event.kind} ${event.text}`);
      }
    });
  }

  // The values under the cursor, one line a curve, and events near it.
  point() {
    this.over?.replaceChildren();
    const x = this.view.at;
    this.tip.hidden = true;
    if (x === null || this.empty || x < this.from || x > this.to) return "";
    const p = this.px(x), rows = [];
    draw(this.over, "line", {x1: p, x2: p, y1: TOP, y2: this.height - BOTTOM, class: "cursor"});
    for (const l of this.drawn) {
      const [xs, ys] = l.raw, j = nearest(xs, x);
      if (x > xs[xs.length - 1] + (this.to - this.from) * 0.02) continue;
      draw(this.over, "circle", {cx: this.px(xs[j]), cy: this.py(ys[j]), r: 3.5, fill: color(l.number)});
      const smoothed = l.smoothed ? `, smoothed ${short(l.line[1][nearest(l.line[0], x)])}` : "";
      rows.push({number: l.number, text: `${this.curves[l.number].label}${l.sparse ? " validation" : ""} ${short(ys[j])}${smoothed}`});
    }
    this.fill(x, p, rows);
    return `${this.spec.title} at ${this.view.axis} ${short(x)}: ${rows.map(row => row.text).join("; ")}`;
  }

  fill(x, p, rows) {
    const head = document.createElement("div");
    head.textContent = `${this.view.axis} ${Math.round(x).toLocaleString("en")}`;
    this.tip.replaceChildren(head);
    for (const row of rows) {
      const line = document.createElement("div"), swatch = document.createElement("span");
      swatch.className = "swatch";
      swatch.style.background = color(row.number);
      line.append(swatch, row.text);
      this.tip.append(line);
    }
    if (this.view.marks) for (const event of this.near(p)) {
      const line = document.createElement("div");
      line.className = "event";
      line.textContent = `${this.curves.length > 1 ? event.label + ", " : ""}step ${event.step.toLocaleString("en")}: ${event.kind}${event.text ? ", " + event.text : ""}`;
      this.tip.append(line);
    }
    this.tip.hidden = !this.node.matches(":hover") && document.activeElement !== this.svg;
    this.tip.style.top = "34px";
    this.tip.style.left = p > this.width / 2 ? "auto" : `${p + 26}px`;
    this.tip.style.right = p > this.width / 2 ? `${this.width - p + 26}px` : "auto";
  }

  near(p) {
    return this.curves.flatMap((curve, number) => this.view.hidden.has(number) ? [] :
      curve.events.filter(event => Math.abs(this.px(this.place(curve, event.step)) - p) < 4)
        .map(event => ({...event, label: curve.label}))).slice(0, 4);
  }

  listen() {
    const at = event => { const box = this.svg.getBoundingClientRect(); return Math.min(this.to, Math.max(this.from, this.unpx((event.clientX - box.left) * this.width / box.width))); };
    let start = null, box = null;
    this.svg.addEventListener("pointerdown", event => { if (!this.empty && event.button === 0) { start = at(event); this.svg.setPointerCapture(event.pointerId); } });
    this.svg.addEventListener("pointermove", event => {
      if (this.empty) return;
      this.moved({at: at(event)});
      if (start === null) return;
      box?.remove();
      const [a, b] = [this.px(start), this.px(this.view.at)].sort((m, n) => m - n);
      box = draw(this.svg, "rect", {x: a, y: TOP, width: b - a, height: this.height - TOP - BOTTOM, class: "select"});
    });
    this.svg.addEventListener("pointerup", event => {
      if (start === null) return;
      const range = [start, at(event)].sort((m, n) => m - n);
      start = null;
      box?.remove();
      if (this.px(range[1]) - this.px(range[0]) > 6) this.moved({range});
    });
    this.svg.addEventListener("pointerleave", () => { if (start === null) this.moved({at: null}); });
    this.svg.addEventListener("blur", () => this.moved({at: null}));
    this.svg.addEventListener("dblclick", () => this.moved({range: null}));
    this.svg.addEventListener("keydown", event => {
      if (event.key === "Escape") return this.moved({range: null, at: null});
      if (this.empty || !["ArrowLeft", "ArrowRight", "Home", "End"].includes(event.key)) return;
      event.preventDefault();
      const stride = (this.to - this.from) / (event.shiftKey ? 20 : 200), now = this.view.at ?? this.from;
      const next = {ArrowLeft: now - stride, ArrowRight: now + stride, Home: this.from, End: this.to}[event.key];
      this.moved({at: Math.min(this.to, Math.max(this.from, next)), told: this});
    });
  }
}
