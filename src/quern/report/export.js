// The table as it is shown (rows, order, filters) as CSV with plain numbers, or as Markdown with the written ones. Headings
// of the CSV are the same in every language of the page.

function shownRows() {
  return [...byId("rows").tBodies[0].rows].filter((row) => !row.hidden).map((row) => data.rows[Number(row.dataset.id)]);
}

const origin = [
  ["Contender", (row) => row.name, gettext("Contender")],
  ["Tool", (row) => `${row.tool} ${row.version}`.trim(), gettext("Tool")],
  ["Place", (row) => row.place, gettext("Place")],
  ["Licence", (row) => row.licence, gettext("Licence")],
  ["Ran in", (row) => row.runtime, gettext("Ran in")],
  ["Loads in", (row) => row.targets.join(", "), gettext("Loads in")],
];

function plainUnit(column) {
  return { bytes: "bytes", percent: "fraction", seconds: "s" }[column.kind] ?? column.unit;
}

// RFC 4180. A text that a spreadsheet would take for a formula gets an apostrophe in front.
function csvField(value) {
  if (value === null || value === undefined) return "";
  const text = typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function asCsv() {
  const rows = shownRows();
  const fields = [...origin, ["Reason for the place", (row) => row.reason]];
  for (const column of data.columns) {
    const unit = plainUnit(column);
    fields.push([unit ? `${column.title} (${unit})` : column.title, (row) => row.values[column.key]]);
    if (data.rows.some((row) => row.ranges[column.key])) {
      fields.push([`${column.title}, low`, (row) => row.ranges[column.key]?.[0]]);
      fields.push([`${column.title}, high`, (row) => row.ranges[column.key]?.[1]]);
    }
  }
  const lines = [fields.map(([label]) => label), ...rows.map((row) => fields.map(([, read]) => read(row)))];
  return lines.map((line) => `${line.map(csvField).join(",")}\r\n`).join("");
}

function asMarkdown() {
  const fields = [...origin, ...data.columns.map((column) => [column.title, (row) => row.texts[column.key] ?? "-", column.label])];
  const cell = (text) => text.replaceAll("\\", "\\\\").replaceAll("|", "\\|").replaceAll("<", "&lt;").replace(/\s+/g, " ");
  const line = (cells) => `| ${cells.map(cell).join(" | ")} |\n`;
  const rule = `|${fields.map((_, place) => (place < origin.length ? "---|" : "---:|")).join("")}\n`;
  return line(fields.map(([, , shown]) => shown)) + rule
    + shownRows().map((row) => line(fields.map(([, read]) => read(row)))).join("");
}

function download(name, type, text) {
  const link = element("a", { download: name, href: URL.createObjectURL(new Blob([text], { type })) });
  link.click();
  // Later, because the browser reads it after this function has returned.
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function startExport() {
  const bar = byId("export");
  if (!bar) return;
  byId("export-csv").addEventListener("click", () => download(`${data.file_name}.csv`, "text/csv;charset=utf-8", asCsv()));
  byId("export-markdown").addEventListener("click", () => download(`${data.file_name}.md`, "text/markdown;charset=utf-8", asMarkdown()));
  bar.hidden = false;
}
