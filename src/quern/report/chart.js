// The scatter: any two quantities, the best trade-off between them, and every row's figures on hover, focus or tap.

const axes = { x: "size", y: "kl" };
const margin = { top: 18, right: 26, bottom: 50, left: 72 };
const TITLE_ROOM = 40; // of the upright axis title and the gaps on both sides of the labels
const ZERO_BAND = 30;
const MANY = 15;

function niceStep(span, count) {
  const rough = span / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
}

// A scale from values to pixels. `from` is the pixel of the least value, `to` that of the greatest.
function linearScale(values, from, to, count) {
  let low = Math.min(...values);
  let high = Math.max(...values);
  if (low > 0 && low < 0.6 * high) low = 0;
  const pad = (high - low || Math.abs(high) || 1) * 0.08;
  high += pad;
  if (low !== 0) low -= pad;
  const step = niceStep(high - low, count);
  const ticks = [];
  for (let place = Math.ceil(low / step); place * step <= high; place += 1) ticks.push(place * step);
  return { at: (value) => from + ((value - low) / (high - low)) * (to - from), ticks };
}

// Logarithmic, with a band of its own for zero, which has no logarithm but is what the unquantized model has.
function logScale(values, from, to) {
  const positive = values.filter((value) => value > 0);
  if (positive.length === 0) return linearScale(values, from, to, 5);
  const zero = positive.length < values.length;
  const start = zero ? from + Math.sign(to - from) * ZERO_BAND : from;
  // Below the least value there is room for the arrow that tells which way is better.
  const low = Math.log10(Math.min(...positive)) - (zero ? 0.15 : 0.4);
  const high = Math.log10(Math.max(...positive)) + 0.15;
  const factors = high - low > 2.5 ? [1] : [1, 2, 5];
  const ticks = zero ? [0] : [];
  for (let power = Math.floor(low); power <= high; power += 1) {
    for (const factor of factors) {
      const exponent = power + Math.log10(factor);
      if (exponent >= low && exponent <= high) ticks.push(Number(`${factor}e${power}`));
    }
  }
  const at = (value) => value > 0 ? start + ((Math.log10(value) - low) / (high - low)) * (to - start) : from + (start - from) * 0.3;
  return { at, ticks, zero };
}

function scaleOf(column, rows, from, to, count) {
  const values = rows.map((row) => row.values[column.key]);
  for (const row of rows) {
    const range = row.ranges[column.key];
    // A logarithmic axis does not stretch for an interval that reaches down to zero.
    if (range) values.push(...range.filter((value) => value > 0 || !logFor(column)));
  }
  if (column.key === "kl" && data.noise_floor > 0) values.push(data.noise_floor);
  return logFor(column) ? logScale(values, from, to) : linearScale(values, from, to, count);
}

// Sizes of many rows crowd at the small end, where the unquantized model stretches the axis.
const mayBeLog = (key) => key === "kl" || (key === "size" && data.rows.length > MANY);
const logFor = (column) => mayBeLog(column.key) && byId("log").checked;

// Rows that no other row beats in both quantities, ordered along x. Differences below 0.1 % are none, as for the front
// of all three quantities.
function frontOf(rows, x, y) {
  const cost = (row, column) => (column.better === "low" ? 1 : -1) * row.values[column.key];
  const same = (one, other) => Math.abs(one - other) <= 0.001 * Math.max(Math.abs(one), Math.abs(other));
  const beats = (one, other) => {
    const pairs = [x, y].map((column) => [cost(one, column), cost(other, column)]);
    return pairs.every(([mine, theirs]) => mine <= theirs || same(mine, theirs))
      && pairs.some(([mine, theirs]) => mine < theirs && !same(mine, theirs));
  };
  return rows.filter((row) => !rows.some((other) => beats(other, row)))
    .sort((one, other) => one.values[x.key] - other.values[x.key]);
}

// Pixels that the longest of these labels takes.
function widestLabel(canvas, column, ticks) {
  const widths = ticks.map((tick) => {
    const label = shape("text", { class: "tick" }, tickText(column, tick));
    canvas.append(label);
    const width = label.getBBox().width;
    label.remove();
    return width;
  });
  return Math.max(0, ...widths);
}

function drawAxes(canvas, x, y, scales, size) {
  const bottom = size.height - margin.bottom;
  const right = size.width - margin.right;
  let edge = 0;
  for (const tick of scales.x.ticks) {
    const at = scales.x.at(tick);
    canvas.append(shape("line", { class: "grid", x1: at, x2: at, y1: margin.top, y2: bottom }));
    const label = shape("text", { class: "tick", x: at, y: bottom + 20, "text-anchor": "middle" }, tickText(x, tick));
    canvas.append(label);
    const box = label.getBBox();
    if (box.x < edge) label.remove();
    else edge = box.x + box.width + 8;
  }
  for (const tick of scales.y.ticks) {
    const at = scales.y.at(tick);
    canvas.append(shape("line", { class: "grid", x1: margin.left, x2: right, y1: at, y2: at }));
    canvas.append(shape("text", { class: "tick", x: margin.left - 10, y: at + 4, "text-anchor": "end" }, tickText(y, tick)));
  }
  const middle = (margin.top + bottom) / 2;
  canvas.append(shape("text", { class: "axis", x: (margin.left + right) / 2, y: size.height - 8, "text-anchor": "middle" }, axisTitle(x)));
  canvas.append(shape("text", { class: "axis", transform: `translate(16 ${middle}) rotate(-90)`, "text-anchor": "middle" }, axisTitle(y)));
  drawBetter(canvas, x, y, size);
  return drawNoiseFloor(canvas, x, y, scales, size);
}

// Returns the box of its label, so that names keep clear of it.
function drawNoiseFloor(canvas, x, y, scales, size) {
  if (!(data.noise_floor > 0) || (x.key !== "kl" && y.key !== "kl")) return [];
  const upright = y.key !== "kl";
  const at = (upright ? scales.x : scales.y).at(data.noise_floor);
  const right = size.width - margin.right;
  const bottom = size.height - margin.bottom;
  canvas.append(shape("line", upright
    ? { class: "floor", x1: at, x2: at, y1: margin.top, y2: bottom }
    : { class: "floor", x1: margin.left, x2: right, y1: at, y2: at }));
  const place = upright ? { x: at + 5, y: bottom - 6 } : { x: margin.left + (right - margin.left) * 0.4, y: at - 5 };
  const label = shape("text", { class: "floor-label", ...place }, gettext("noise floor"));
  canvas.append(label);
  const box = label.getBBox();
  return [{ left: box.x, right: box.x + box.width, top: box.y, bottom: box.y + box.height }];
}

// A small arrow into the corner where both quantities are best.
function drawBetter(canvas, x, y, size) {
  const left = x.better === "low";
  const low = y.better === "low";
  const at = { x: left ? margin.left + 12 : size.width - margin.right - 12, y: low ? size.height - margin.bottom - 12 : margin.top + 12 };
  const dx = left ? 1 : -1;
  const dy = low ? -1 : 1;
  canvas.append(shape("path", { class: "better", d: `M${at.x + 16 * dx} ${at.y + 16 * dy}L${at.x} ${at.y}m${8 * dx} 0h${-8 * dx}v${8 * dy}` }));
  canvas.append(shape("text", { class: "better-label", x: at.x + 22 * dx, y: at.y + 16 * dy + 4, "text-anchor": left ? "start" : "end" }, gettext("better")));
}

function drawFront(canvas, rows, x, y, scales) {
  const points = frontOf(rows, x, y).map((row) => [scales.x.at(row.values[x.key]), scales.y.at(row.values[y.key])]);
  const path = points.map(([px, py], place) => {
    if (place === 0) return `M${px} ${py}`;
    return x.better === "low" ? `H${px}V${py}` : `V${py}H${px}`;
  });
  canvas.append(shape("path", { class: "front-line", d: path.join("") }));
  // The line's pieces as boxes, so that names keep clear of it.
  return points.slice(1).flatMap(([px, py], place) => {
    const [qx, qy] = points[place];
    const corner = x.better === "low" ? [px, qy] : [qx, py];
    return [[[qx, qy], corner], [corner, [px, py]]].map(([one, other]) => ({
      left: Math.min(one[0], other[0]) - 2, right: Math.max(one[0], other[0]) + 2,
      top: Math.min(one[1], other[1]) - 2, bottom: Math.max(one[1], other[1]) + 2,
    }));
  });
}

function radiusOf(row, rows) {
  const many = rows.length > MANY;
  if (axes.x === "decode" || axes.y === "decode" || !columns.has("decode")) return many ? 5 : 7;
  const greatest = Math.max(...rows.map((other) => other.values.decode ?? 0));
  const largest = many || byId("plot").clientWidth < 480 ? 10 : 14;
  return row.values.decode === null ? 4 : Math.max(4, largest * Math.sqrt(row.values.decode / greatest));
}

function drawRow(canvas, row, rows, x, y, scales) {
  const at = [scales.x.at(row.values[x.key]), scales.y.at(row.values[y.key])];
  const radius = radiusOf(row, rows);
  const group = shape("g", { class: "point", tabindex: 0, role: "img", "data-id": row.id, "aria-label": describe(row, x, y) });
  for (const [column, scale, across] of [[x, scales.x, true], [y, scales.y, false]]) {
    const range = row.ranges[column.key];
    if (!range) continue;
    const [low, high] = range.map(scale.at);
    group.append(shape("line", across
      ? { class: "interval", x1: low, x2: high, y1: at[1], y2: at[1] }
      : { class: "interval", x1: at[0], x2: at[0], y1: low, y2: high }));
  }
  const kind = ["dot", row.front ? "front" : "", row.choice ? "choice" : "", row.reference ? "reference" : ""].join(" ");
  if (row.choice) group.append(shape("circle", { class: "halo", cx: at[0], cy: at[1], r: radius + 5 }));
  group.append(row.reference
    ? shape("rect", { class: kind, x: at[0] - radius * 0.85, y: at[1] - radius * 0.85, width: radius * 1.7, height: radius * 1.7 })
    : shape("circle", { class: kind, cx: at[0], cy: at[1], r: radius }));
  group.addEventListener("pointerenter", () => showTip(row, at, radius));
  group.addEventListener("focus", () => showTip(row, at, radius));
  group.addEventListener("click", () => showTip(row, at, radius));
  group.addEventListener("pointerleave", hideTip);
  group.addEventListener("blur", hideTip);
  canvas.append(group);
  return { left: at[0] - radius - 2, right: at[0] + radius + 2, top: at[1] - radius - 2, bottom: at[1] + radius + 2, at, radius, row };
}

const describe = (row, x, y) => `${row.name}: ${x.label} ${row.texts[x.key]}, ${y.label} ${row.texts[y.key]}`;

function showTip(row, at, radius) {
  const tip = byId("tip");
  const list = element("dl");
  for (const column of data.columns) {
    if (row.texts[column.key] === null) continue;
    const pair = element("div");
    pair.append(element("dt", {}, column.label), element("dd", {}, row.texts[column.key]));
    list.append(pair);
  }
  tip.replaceChildren(element("strong", {}, row.name), list);
  tip.hidden = false;
  const room = byId("plot").clientWidth;
  const left = at[0] + radius + 14 + tip.offsetWidth <= room ? at[0] + radius + 14 : Math.max(0, at[0] - radius - 14 - tip.offsetWidth);
  tip.style.left = `${Math.min(left, Math.max(0, room - tip.offsetWidth))}px`;
  tip.style.top = `${Math.max(0, Math.min(at[1] - tip.offsetHeight / 2, byId("plot").clientHeight - tip.offsetHeight))}px`;
}

function hideTip() {
  byId("tip").hidden = true;
}

function drawChart() {
  const x = columns.get(axes.x);
  const y = columns.get(axes.y);
  const canvas = byId("scatter");
  const width = Math.max(280, byId("plot").clientWidth);
  const visible = visibleIds();
  const size = { width, height: Math.round(visible.size > MANY ? Math.min(640, Math.max(400, width * 0.58)) : Math.min(480, Math.max(340, width * 0.5))) };
  canvas.setAttribute("viewBox", `0 0 ${size.width} ${size.height}`);
  canvas.setAttribute("height", size.height);
  canvas.replaceChildren();
  hideTip();
  byId("log-label").hidden = !mayBeLog(axes.x) && !mayBeLog(axes.y);
  const wanted = data.rows.filter((row) => visible.has(row.id));
  const rows = wanted.filter((row) => row.values[x.key] !== null && row.values[y.key] !== null);
  const left = wanted.filter((row) => !rows.includes(row)).map((row) => row.name);
  const bubbles = rows.length > 0 && columns.has("decode") && axes.x !== "decode" && axes.y !== "decode";
  const notes = bubbles ? [gettext("The area of a mark is its decode speed.")] : [];
  if (left.length > 0) notes.push(gettext("Not shown, because not measured: {names}.", { names: left.join(", ") }));
  byId("chart-note").textContent = notes.join(" ");
  if (rows.length === 0) return;
  const upright = scaleOf(y, rows, size.height - margin.bottom - 8, margin.top, 6);
  margin.left = Math.max(72, widestLabel(canvas, y, upright.ticks) + TITLE_ROOM);
  const across = scaleOf(x, rows, margin.left + 8, size.width - margin.right, Math.max(4, Math.floor(size.width / 130)));
  const scales = { x: across, y: upright };
  const label = drawAxes(canvas, x, y, scales, size);
  const taken = [...label, ...drawFront(canvas, rows, x, y, scales)];
  // Large marks first, so that small ones stay within reach; the recommended one on top of all.
  const ordered = [...rows].sort((one, other) => one.choice - other.choice || radiusOf(other, rows) - radiusOf(one, rows));
  const nameless = drawLabels(canvas, ordered.map((row) => drawRow(canvas, row, rows, x, y, scales)), taken, size);
  if (nameless === 1) notes.push(gettext("1 mark has no room for a name: point at a mark, or move with the Tab key."));
  if (nameless > 1) notes.push(gettext("{count} marks have no room for a name: point at a mark, or move with the Tab key.", { count: nameless }));
  if (scales.x.zero || scales.y.zero) notes.push(gettext("Zero has no place on a log scale and stands at its edge."));
  byId("chart-note").textContent = notes.join(" ");
}

function startChart() {
  const keys = data.columns.map((column) => column.key).filter((key) => key !== "quantize");
  const preferred = (key, otherwise) => keys.includes(key) ? key : otherwise;
  axes.x = preferred("size", keys[0]);
  axes.y = preferred("kl", preferred("perplexity", keys[1]));
  for (const axis of ["x", "y"]) {
    const select = byId(`axis-${axis}`);
    for (const key of keys) select.append(element("option", { value: key }, columns.get(key).label));
    select.value = axes[axis];
    select.addEventListener("change", () => {
      axes[axis] = select.value;
      drawChart();
    });
  }
  if (mayBeLog("size")) byId("log-text").textContent = gettext("Log scale for KL and size");
  byId("log").addEventListener("change", drawChart);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hideTip();
  });
  byId("chart").hidden = false;
}
