// What every part of the page shares: the data, elements, and numbers as text.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

// A message in the language of the page, with values in its places in braces.
function gettext(message, values = {}) {
  return (data.messages?.[message] ?? message).replace(/\{(\w+)\}/g, (place, name) => values[name] ?? place);
}

const columns = new Map(data.columns.map((column) => [column.key, column]));

function element(tag, attributes = {}, text = null) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== null) made.textContent = text;
  return made;
}

// The name space is read from the page, so that the file holds no address at all.
const drawingSpace = byId("scatter").namespaceURI;

function shape(tag, attributes = {}, text = null) {
  const made = document.createElementNS(drawingSpace, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== null) made.textContent = text;
  return made;
}

// Three digits, and never an exponent.
function significant(value) {
  const rounded = Number(value.toPrecision(3));
  const text = String(rounded);
  if (!text.includes("e-")) return text;
  const places = 2 - Math.floor(Math.log10(Math.abs(rounded)));
  return rounded.toFixed(Math.min(places, 20)).replace(/0+$/, "");
}

// Errors span many powers of ten.
const errorText = (value) => value === 0 || value >= 0.001 ? significant(value) : value.toExponential(1);

function bytesText(value) {
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  let place = 0;
  while (Math.abs(value) >= 999.5 && place < units.length - 1) {
    value /= 1000;
    place += 1;
  }
  return `${significant(value)} ${units[place]}`;
}

// The text of a tick of an axis; rows bring their own texts with them.
function tickText(column, value) {
  if (value === 0) return "0";
  if (column.kind === "bytes") return bytesText(value);
  if (column.kind === "percent") return `${significant(100 * value)} %`;
  if (column.kind === "seconds") return Math.abs(value) < 1 ? `${significant(1000 * value)} ms` : `${significant(value)} s`;
  return significant(value);
}

const shortened = (text, length) => (text.length > length ? `${text.slice(0, length - 3)}...` : text);

function axisTitle(column) {
  return column.unit ? `${column.label} (${column.unit})` : column.label;
}
