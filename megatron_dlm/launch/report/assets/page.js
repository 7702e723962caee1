"use strict";
// The figures of the page and the controls that they share.

const RUNS = JSON.parse(document.getElementById("data").textContent);
// Okabe and Ito's palette, told apart by colour-blind readers; then the same again, dashed.
const COLORS = [1, 2, 3, 4, 5, 6].map((number) => `var(--run-${number})`);
const DASHES = ["", "7 3", "2 3", "8 3 2 3"];
RUNS.forEach((run, number) => {
  run.color = COLORS[number % COLORS.length];
  run.dash = DASHES[Math.floor(number / COLORS.length) % DASHES.length];
  run.isShown = true;
});
const X_LABELS = {
  step: "step (updates)", tokens: "tokens, repeats included", epoch: "epochs over the unique tokens",
};
// Events that change a curve; saves would only hide it.
const MARKED = ["resume", "rollback", "spike", "straggler", "hang", "signal", "damaged"];
// Not noisy: smoothing would only shift them.
const EXACT = ["lr", "peak_memory_bytes"];
const PROFILE = /^(nll|nelbo)_at_noise_([\d.]+)-([\d.]+)$/;
const LAYER = /^(grad_norm|param_norm)_layer_(\d+)$/;

const state = { x: "step", xLog: false, smoothing: 0, hasMarks: true, cutStart: true, zoom: null };
const figures = [];
const main = document.getElementById("charts");

function refresh() {
  for (const figure of figures) figure.draw();
}

function shownRuns() {
  return RUNS.filter((run) => run.isShown);
}

// A figure with its title, controls of its own and a place to draw.
function addFigure(title, { isWide = false, controls = [], note = "" }, draw) {
  const host = element("div", { class: "plot" });
  const caption = element("figcaption", {}, element("h2", {}, title), ...controls);
  const figure = element("figure", { class: isWide ? "wide-figure" : "" }, caption, host);
  if (note) figure.append(element("p", { class: "quiet" }, note));
  main.append(figure);
  figures.push({ draw: () => draw(host) });
}

function checkbox(text, isOn, change) {
  const box = element("input", {
    type: "checkbox", onchange: () => { change(box.checked); refresh(); },
  });
  box.checked = isOn;
  return element("label", {}, box, ` ${text}`);
}

function select(text, options, chosen, change) {
  const list = element("select", { onchange: () => { change(list.value); refresh(); } },
    ...options.map(([value, shown]) => element("option", { value }, shown)));
  list.value = chosen;
  return element("label", {}, `${text} `, list);
}

function slider(text, { max, step, value }, change) {
  const shown = element("output", {}, String(value));
  const input = element("input", {
    type: "range", min: 0, max, step, value,
    oninput: () => { shown.value = input.value; change(Number(input.value)); refresh(); },
  });
  return element("label", {}, `${text} `, input, shown);
}

// Names of all metrics, in the order in which they come; those of one kind of curve only.
function metricNames(wanted = () => true) {
  const names = new Set();
  for (const run of RUNS) {
    for (const table of run.tables) Object.keys(table.columns).forEach((name) => names.add(name));
  }
  return [...names].filter(wanted);
}

function linesOf(metric, smoothing) {
  const lines = [];
  for (const run of shownRuns()) {
    for (const table of run.tables) {
      if (!(metric in table.columns)) continue;
      const isMain = table.split !== "train";
      const x = table.axes[state.x], y = table.columns[metric];
      const kept = x.map((value, place) => place).filter((place) => x[place] !== null);
      const line = {
        label: RUNS.length > 1 ? `${run.name} ${table.split}` : table.split,
        color: run.color, dash: run.dash, isMain,
        x: kept.map((place) => x[place]), y: kept.map((place) => y[place]),
      };
      if (!isMain && smoothing > 0) {
        lines.push({ ...line, isFaint: true });
        line.y = smoothed(line.y, smoothing);
      }
      lines.push(line);
    }
  }
  return lines.sort((a, b) => a.isMain - b.isMain);
}

// Events have steps; on another axis they stand where the run was at that step. Those of one step
// share a mark, those of different runs are written in different rows.
function marks(withText) {
  if (!state.hasMarks) return [];
  return shownRuns().flatMap((run, row) => {
    const table = run.tables.find((one) => one.split === "train") || run.tables[0];
    const kinds = new Map();
    for (const event of run.events) {
      if (!MARKED.includes(event.kind) || event.step === null) continue;
      kinds.set(event.step, new Set(kinds.get(event.step)).add(event.kind));
    }
    return [...kinds].map(([step, found]) => {
      const place = table ? nearest(table.axes.step, step) : -1;
      const x = state.x === "step" || place < 0 ? step : table.axes[state.x][place];
      return { x, row, color: run.color, text: withText ? [...found].join(", ") : "" };
    });
  });
}

function addCurve(title, options) {
  const own = { metric: options.metric, yLog: Boolean(options.yLog) };
  const controls = [checkbox("log y", own.yLog, (isOn) => { own.yLog = isOn; })];
  if (options.choices) {
    const pairs = options.choices.map((name) => [name, name]);
    controls.unshift(select("metric", pairs, own.metric, (name) => { own.metric = name; }));
  }
  addFigure(title, { ...options, controls }, (host) => drawChart(host, {
    label: `${own.metric} against ${X_LABELS[state.x]}`,
    xLabel: X_LABELS[state.x],
    lines: linesOf(own.metric, EXACT.includes(own.metric) ? 0 : state.smoothing),
    marks: marks(Boolean(options.isWide)),
    xLog: state.xLog,
    yLog: own.yLog,
    zoom: state.zoom,
    cutStart: Boolean(options.choices) && state.cutStart && !own.yLog,
    height: options.isWide ? 380 : 250,
    onZoom: (zoom) => { state.zoom = zoom; refresh(); },
  }));
}

// Values over noise levels or layers, at one moment of every run.
function addProfile(title, { pattern, kinds, xLabel, placeOf, note }) {
  const names = metricNames((name) => pattern.test(name));
  const present = kinds.filter(([kind]) => names.some((name) => pattern.exec(name)[1] === kind));
  if (present.length === 0) return;
  const own = { kind: present[0][0], moment: 100 };
  const controls = [slider("moment [% of the run]", { max: 100, step: 1, value: 100 },
    (value) => { own.moment = value; })];
  if (present.length > 1) {
    controls.unshift(select("metric", present, own.kind, (kind) => { own.kind = kind; }));
  }
  addFigure(title, { controls, note }, (host) => drawChart(host, {
    label: `${title}: ${own.kind}`,
    xLabel,
    lines: shownRuns().flatMap((run) => profileLine(run, own, pattern, placeOf)),
    height: 250,
  }));
}

function profileLine(run, own, pattern, placeOf) {
  const points = [];
  for (const table of run.tables) {
    const names = Object.keys(table.columns).filter(
      (name) => (pattern.exec(name) || [])[1] === own.kind);
    if (names.length === 0) continue;
    const steps = table.axes.step;
    const row = nearest(steps, (steps[steps.length - 1] * own.moment) / 100);
    for (const name of names) points.push([placeOf(pattern.exec(name)), table.columns[name][row]]);
  }
  if (points.length === 0) return [];
  points.sort((a, b) => a[0] - b[0]);
  return [{
    label: run.name, color: run.color, dash: run.dash, isMain: true,
    x: points.map((point) => point[0]), y: points.map((point) => point[1]),
  }];
}

// When every run was at work: a bar from each start to its last event, and what happened.
function addTimeline() {
  if (!RUNS.some((run) => run.events.length)) return;
  const kinds = [...new Set(RUNS.flatMap((run) => run.events.map((event) => event.kind)))];
  const note = `Small dots: save; ringed: trouble. Here: ${kinds.join(", ")}.`;
  addFigure("Events in time", { isWide: true, note }, (host) => {
    const runs = shownRuns().filter((run) => run.events.length);
    drawTimeline(host, runs);
  });
}

function drawTimeline(host, runs) {
  const width = Math.max(280, host.clientWidth || 640), height = 56 + 30 * runs.length;
  const svg = shape("svg", {
    viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "events of the runs in time",
  });
  host.replaceChildren(svg);
  const times = runs.flatMap((run) => run.events.map((event) => event.time));
  if (times.length === 0) return;
  const low = Math.min(...times), high = Math.max(...times, low + 1000);
  const scale = makeScale(low, high, 20, width - 20, false);
  runs.forEach((run, number) => {
    const y = 34 + 30 * number;
    svg.append(shape("text", { x: 20, y: y - 10, class: "row-text" }, run.name));
    for (const [from, to] of stretches(run.events)) {
      svg.append(shape("line", {
        x1: scale.at(from), x2: scale.at(to), y1: y, y2: y, class: "at-work",
        style: `stroke:${run.color}`,
      }));
    }
    for (const event of run.events) svg.append(dot(event, run, scale.at(event.time), y));
  });
  const base = height - 22;
  svg.append(shape("line", { x1: 20, x2: width - 20, y1: base, y2: base, class: "axis" }));
  for (const [time, anchor] of [[low, "start"], [high, "end"]]) {
    svg.append(shape("text", {
      x: scale.at(time), y: base + 16, "text-anchor": anchor, class: "tick-text",
    }, `${clock(time)} UTC`));
  }
}

function clock(time) {
  return new Date(time).toISOString().slice(0, 19).replace("T", " ");
}

function dot(event, run, x, y) {
  const isSmall = event.kind === "save";
  const step = event.step === null ? "" : ` at step ${event.step}`;
  const isBad = !["start", "resume", "save", "end"].includes(event.kind) ||
    (event.kind === "end" && event.text.includes("state failed"));
  return shape("circle", {
    cx: x, cy: y, r: isSmall ? 3 : 5, class: isBad ? "event trouble" : "event",
    style: `fill:${run.color}`,
  }, shape("title", {}, `${run.name}: ${event.kind}${step}, ${clock(event.time)} ${event.text}`));
}

function stretches(events) {
  const found = [];
  let from = null, last = null;
  for (const event of events) {
    if (["start", "resume"].includes(event.kind)) {
      if (from !== null) found.push([from, last]);
      from = event.time;
    }
    last = event.time;
    if (event.kind === "end" && from !== null) {
      found.push([from, last]);
      from = null;
    }
  }
  if (from !== null) found.push([from, last]);
  return found;
}

function addControls() {
  const legend = RUNS.map((run) => {
    const label = checkbox("", true, (isOn) => { run.isShown = isOn; });
    const line = shape("svg", { class: "swatch", viewBox: "0 0 28 10" }, shape("line", {
      x1: 0, x2: 28, y1: 5, y2: 5, style: `stroke:${run.color}`, "stroke-width": 3,
      "stroke-dasharray": run.dash || "none",
    }));
    label.append(line, ` ${run.name}`);
    return label;
  });
  const axes = Object.keys(X_LABELS).filter((axis) => RUNS.some((run) => run.tables.some(
    (table) => table.axes[axis].some((value) => value !== null))));
  const themes = [["", "as the system"], ["light", "light"], ["dark", "dark"]];
  main.append(element("div", { class: "controls", role: "group", "aria-label": "all figures" },
    element("div", { class: "legend" }, ...legend,
      element("span", { class: "quiet" }, "thin: training · thick: validation")),
    element("div", {},
      select("x axis", axes.map((axis) => [axis, axis]), state.x,
        (axis) => { state.x = axis; state.zoom = null; }),
      checkbox("log x", state.xLog, (isOn) => { state.xLog = isOn; }),
      slider("smoothing", { max: 0.99, step: 0.01, value: 0 },
        (value) => { state.smoothing = value; }),
      checkbox("events", state.hasMarks, (isOn) => { state.hasMarks = isOn; }),
      checkbox("cut the steep start", state.cutStart, (isOn) => { state.cutStart = isOn; }),
      element("button", { type: "button", onclick: () => { state.zoom = null; refresh(); } },
        "whole range"),
      select("colours", themes, "", (name) => { document.documentElement.dataset.theme = name; })),
    element("p", { class: "quiet screen-only" },
      "Drag over a figure to zoom in on a stretch, double-click to see all again.")));
}

function build() {
  if (RUNS.every((run) => run.tables.length === 0)) return addTimeline();
  addControls();
  const plain = metricNames((name) => !PROFILE.test(name) && !LAYER.test(name));
  const first = ["nelbo", "loss"].find((name) => plain.includes(name)) || plain[0];
  const losses = plain.filter((name) => /loss|nelbo|nll|^kl$|itakura/.test(name));
  if (losses.length) {
    addCurve("Loss [nats per token]", { metric: first, choices: losses, isWide: true });
  }
  const known = [
    ["grad_norm", "Gradient norm", true],
    ["lr", "Learning rate", false],
    ["tokens_per_second", "Tokens per second", false],
    ["data_wait_share", "Share of the time spent waiting for data", false],
    ["mfu", "Model FLOPs utilisation", false],
    ["peak_memory_bytes", "Peak memory of rank 0 [bytes]", false],
    ["moe_load_max_over_mean", "Load of the busiest expert over the mean", false],
    ["moe_dropped_share", "Share of dropped tokens", false],
  ];
  for (const [metric, title, yLog] of known) {
    if (plain.includes(metric)) addCurve(title, { metric, yLog });
  }
  addProfile("Validation loss by noise level [nats]", {
    pattern: PROFILE,
    kinds: [["nll", "NLL of masked tokens"], ["nelbo", "terms of the bound"]],
    xLabel: "share of noised tokens: 0 clean, 1 all noise",
    placeOf: (found) => (Number(found[2]) + Number(found[3])) / 2,
  });
  addProfile("Norms by layer", {
    pattern: LAYER,
    kinds: [["grad_norm", "gradients"], ["param_norm", "parameters"]],
    xLabel: "layer",
    placeOf: (found) => Number(found[2]),
  });
  const all = metricNames();
  if (all.length) addCurve("Any metric", { metric: all[0], choices: all });
  addTimeline();
}

build();
refresh();
addEventListener("resize", refresh);
