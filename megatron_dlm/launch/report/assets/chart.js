"use strict";
// One figure of lines in SVG, with a reading of the values under the pointer.

const SVG = "http://www.w3.org/2000/svg";
const MARGIN = { left: 62, right: 24, top: 10, bottom: 40 };

function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

function shape(name, attributes, ...children) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

// spec: {label, xLabel, lines: [{label, color, dash, x, y, isMain, isFaint}], marks: [{x, color,
// text, row}], xLog, yLog, cutStart, zoom: [low, high] or null, height, onZoom}; x of a line grows.
function drawChart(host, spec) {
  const width = Math.max(280, host.clientWidth || 640), height = spec.height || 300;
  const plot = plotArea(spec, width, height);
  const svg = shape("svg", {
    viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": spec.label,
  });
  host.replaceChildren(svg);
  if (!plot) {
    svg.append(shape("text", { x: width / 2, y: height / 2, class: "empty" }, "nothing to show"));
    return;
  }
  drawAxes(svg, spec, plot);
  const clip = `clip${(drawChart.count = (drawChart.count || 0) + 1)}`;
  svg.append(shape("clipPath", { id: clip }, shape("rect", {
    x: plot.left, y: plot.top - 4, width: plot.right - plot.left,
    height: plot.bottom - plot.top + 8,
  })));
  const inside = shape("g", { "clip-path": `url(#${clip})` });
  svg.append(inside);
  drawMarks(inside, spec.marks || [], plot);
  for (const line of spec.lines) drawLine(inside, line, plot);
  attachReading(host, svg, spec, plot);
}

function plotArea(spec, width, height) {
  const xs = range(spec.lines.map((line) => line.x), spec.xLog);
  if (!xs) return null;
  const [low, high] = spec.zoom || xs;
  const seen = spec.lines.map((line) => line.y.filter(
    (value, place) => line.x[place] >= low && line.x[place] <= high));
  let ys = range(spec.cutStart ? seen.map(withoutStart) : seen, spec.yLog) || range(seen, spec.yLog);
  if (!ys) return null;
  const plot = {
    left: MARGIN.left, right: width - MARGIN.right, top: MARGIN.top, bottom: height - MARGIN.bottom,
  };
  plot.x = makeScale(...widened(low, high, 0, spec.xLog), plot.left, plot.right, spec.xLog);
  plot.y = makeScale(...widened(...ys, 0.04, spec.yLog), plot.bottom, plot.top, spec.yLog);
  return plot;
}

// What comes first is so high that nothing of the rest would be seen.
function withoutStart(values) {
  return values.slice(Math.floor(values.length / 10));
}

// Not a hole, and so far from the limits of numbers that sums and ratios are none of them.
function isDrawable(value, isLog) {
  return value !== null && Math.abs(value) < 1e200 && (!isLog || value > 1e-200);
}

function range(lists, isLog) {
  let low = Infinity, high = -Infinity;
  for (const values of lists) {
    for (const value of values) {
      if (!isDrawable(value, isLog)) continue;
      if (value < low) low = value;
      if (value > high) high = value;
    }
  }
  return low <= high ? [low, high] : null;
}

function widened(low, high, share, isLog) {
  if (isLog) {
    const factor = high > low * (1 + 1e-9) ? (high / low) ** share : 1.1;
    return [low / factor, high * factor];
  }
  const length = high - low, size = Math.max(Math.abs(low), Math.abs(high));
  // Values that differ by rounding alone are one value.
  const margin = length > size * 1e-9 ? length * share : size * 0.1 || 1;
  return [low - margin, high + margin];
}

function drawAxes(svg, spec, plot) {
  const lines = shape("g", { class: "grid" }), texts = shape("g", { class: "ticks" });
  for (const value of ticks(plot.y, 5)) {
    const y = plot.y.at(value);
    lines.append(shape("line", { x1: plot.left, x2: plot.right, y1: y, y2: y }));
    texts.append(shape("text", { x: plot.left - 7, y: y + 4, "text-anchor": "end" },
      formatNumber(value)));
  }
  for (const value of ticks(plot.x, Math.floor((plot.right - plot.left) / 75))) {
    const x = plot.x.at(value);
    lines.append(shape("line", { x1: x, x2: x, y1: plot.bottom, y2: plot.bottom + 5 }));
    texts.append(shape("text", { x, y: plot.bottom + 18, "text-anchor": "middle" },
      spec.xFormat ? spec.xFormat(value) : formatNumber(value)));
  }
  lines.append(shape("line", {
    x1: plot.left, x2: plot.right, y1: plot.bottom, y2: plot.bottom, class: "base",
  }));
  texts.append(shape("text", {
    x: (plot.left + plot.right) / 2, y: plot.bottom + 35, "text-anchor": "middle", class: "label",
  }, spec.xLabel));
  svg.append(lines, texts);
}

// Holes break a line; a point between two holes becomes a dot.
function drawLine(svg, line, plot) {
  let path = "", isDown = false;
  const points = [];
  line.x.forEach((x, place) => {
    const y = line.y[place];
    if (!isDrawable(x, plot.x.isLog) || !isDrawable(y, plot.y.isLog)) {
      isDown = false;
      return;
    }
    const at = [plot.x.at(x).toFixed(1), plot.y.at(y).toFixed(1)];
    path += `${isDown ? "L" : "M"}${at[0]} ${at[1]}`;
    isDown = true;
    points.push(at);
  });
  svg.append(shape("path", {
    d: path, class: line.isFaint ? "faint" : line.isMain ? "main" : "thin",
    style: `stroke:${line.color}`, "stroke-dasharray": line.dash || "none",
  }));
  if ((line.isMain || points.length < 2) && points.length <= 80) {
    for (const [cx, cy] of points) {
      svg.append(shape("circle", { cx, cy, r: 3, style: `fill:${line.color}` }));
    }
  }
}

// A text that would run into the one before it in its row is left out.
function drawMarks(svg, marks, plot) {
  const ends = new Map();
  for (const mark of marks) {
    if (mark.x < plot.x.low || mark.x > plot.x.high || (plot.x.isLog && mark.x <= 0)) continue;
    const x = plot.x.at(mark.x);
    svg.append(shape("line", {
      x1: x, x2: x, y1: plot.top, y2: plot.bottom, class: "mark", style: `stroke:${mark.color}`,
    }));
    if (x < (ends.get(mark.row) ?? 0)) continue;
    ends.set(mark.row, x + 3 + 6 * mark.text.length);
    svg.append(shape("text", {
      x: x + 3, y: plot.top + 10 + 12 * mark.row, class: "mark-text", style: `fill:${mark.color}`,
    }, mark.text));
  }
}

// The pointer reads the values at its place; dragged over a stretch it zooms in on it.
function attachReading(host, svg, spec, plot) {
  const cursor = shape("line", {
    y1: plot.top, y2: plot.bottom, class: "cursor", visibility: "hidden",
  });
  const stretch = shape("rect", {
    y: plot.top, height: plot.bottom - plot.top, width: 0, class: "stretch",
  });
  const reading = element("div", { class: "reading", hidden: true });
  svg.append(stretch, cursor);
  host.append(reading);
  let start = null;
  const pixelOf = (event) => {
    const box = svg.getBoundingClientRect();
    const pixel = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    return Math.min(plot.right, Math.max(plot.left, pixel));
  };
  svg.addEventListener("pointermove", (event) => {
    const pixel = pixelOf(event);
    cursor.setAttribute("x1", pixel);
    cursor.setAttribute("x2", pixel);
    cursor.setAttribute("visibility", "visible");
    if (start !== null) {
      stretch.setAttribute("x", Math.min(start, pixel));
      stretch.setAttribute("width", Math.abs(pixel - start));
    }
    showReading(reading, spec, plot, pixel, svg);
  });
  svg.addEventListener("pointerleave", () => {
    reading.hidden = true;
    cursor.setAttribute("visibility", "hidden");
  });
  if (!spec.onZoom) return;
  svg.addEventListener("pointerdown", (event) => {
    start = pixelOf(event);
    svg.setPointerCapture(event.pointerId);
  });
  svg.addEventListener("pointerup", (event) => {
    const ends = [start, pixelOf(event)].sort((a, b) => a - b);
    start = null;
    if (ends[1] - ends[0] > 6) spec.onZoom(ends.map((pixel) => plot.x.back(pixel)));
    else stretch.setAttribute("width", 0);
  });
  svg.addEventListener("dblclick", () => spec.onZoom(null));
}

function showReading(reading, spec, plot, pixel, svg) {
  const wanted = plot.x.back(pixel), format = spec.xFormat || formatNumber;
  const rows = [];
  for (const line of spec.lines) {
    if (line.isFaint) continue;
    const place = nearest(line.x, wanted);
    if (place < 0 || line.y[place] === null) continue;
    const swatch = element("i", { style: `background:${line.color}` });
    rows.push(element("div", {}, swatch, `${line.label} `,
      element("b", {}, formatNumber(line.y[place], 5)), ` at ${format(line.x[place])}`));
  }
  reading.hidden = rows.length === 0;
  reading.replaceChildren(...rows);
  const share = pixel / svg.viewBox.baseVal.width;
  reading.style.left = share < 0.5 ? `calc(${share * 100}% + 12px)` : "auto";
  reading.style.right = share < 0.5 ? "auto" : `calc(${(1 - share) * 100}% + 12px)`;
}
