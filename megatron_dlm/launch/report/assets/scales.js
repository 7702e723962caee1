"use strict";
// Numbers to pixels, and the ticks of an axis.

// low < high; on a logarithmic scale both are above 0.
function makeScale(low, high, from, to, isLog) {
  const warp = isLog ? Math.log10 : (value) => value;
  const unwarp = isLog ? (value) => 10 ** value : (value) => value;
  const first = warp(low), length = warp(high) - first || 1;
  return {
    isLog,
    low,
    high,
    at: (value) => from + ((warp(value) - first) / length) * (to - from),
    back: (pixel) => unwarp(first + ((pixel - from) / (to - from)) * length),
  };
}

function ticks(scale, count) {
  return scale.isLog ? logTicks(scale, count) : linearTicks(scale.low, scale.high, count);
}

function linearTicks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const found = [];
  const first = Math.ceil(low / step - 1e-9);
  // Bounded: far from 0, a step can be less than what numbers are apart.
  for (let number = first; number <= first + 2 * count + 2; number++) {
    if (number * step <= high + step * 1e-9) found.push(number * step);
  }
  return found;
}

// Powers of ten, with 2 and 5 or 3 between them where there is room; even steps within one power.
function logTicks(scale, count) {
  for (const factors of [[1, 2, 5], [1, 3], [1]]) {
    const found = logValues(scale, factors, 1);
    if (found.length < 3) break;
    if (found.length <= count + 3) return found;
  }
  const powers = logValues(scale, [1], 1);
  if (powers.length >= 3) return logValues(scale, [1], Math.ceil(powers.length / (count + 1)));
  return linearTicks(scale.low, scale.high, count).filter((value) => value > 0);
}

function logValues({ low, high }, factors, stride) {
  const found = [];
  const last = Math.ceil(Math.log10(high));
  for (let power = Math.floor(Math.log10(low)); power <= last; power += stride) {
    found.push(...factors.map((factor) => factor * 10 ** power));
  }
  return found.filter((value) => value >= low * 0.999 && value <= high * 1.001);
}

// 1.5M, 0.25, 3e-4: at most `digits` significant ones.
function formatNumber(value, digits = 4) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e");
  const units = [[1e15, null], [1e12, "T"], [1e9, "B"], [1e6, "M"], [1e4, "k"]];
  for (const [unit, letter] of units) {
    if (size < unit) continue;
    const scaled = unit === 1e4 ? value / 1e3 : value / unit;
    return letter === null ? value.toExponential(2) : trimmed(scaled, digits) + letter;
  }
  return trimmed(value, digits);
}

function trimmed(value, digits) {
  return String(Number(value.toPrecision(digits)));
}

// Place of the entry of sorted `values` that is nearest to `wanted`; -1 where there are none.
function nearest(values, wanted) {
  let low = 0, high = values.length - 1;
  if (high < 0) return -1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (values[middle] < wanted) low = middle;
    else high = middle;
  }
  return Math.abs(values[low] - wanted) <= Math.abs(values[high] - wanted) ? low : high;
}

// Exponential mean whose first values are not drawn to 0; holes stay holes.
function smoothed(values, weight) {
  let mean = 0, total = 0;
  return values.map((value) => {
    if (value === null) return null;
    mean = weight * mean + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return mean / total;
  });
}
