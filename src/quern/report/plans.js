// The bits of every matrix, where a recipe gives them more than one scheme: grids like those of the errors.

function planText(grid, cell) {
  const parts = [grid.schemes[cell.scheme].text];
  if (cell.bits !== null) parts.push(gettext("{bits} bits/weight", { bits: significant(cell.bits) }));
  if (cell.error !== null) parts.push(gettext("relative error {error}", { error: errorText(cell.error) }));
  if (cell.loss !== null) parts.push(gettext("predicted loss {loss} nats/token", { loss: errorText(cell.loss) }));
  return gettext("{place}: {facts}", { place: placeText(grid, cell), facts: parts.join(gettext("; ")) });
}

function schemeText(scheme) {
  const [low, high] = [scheme.low, scheme.high].map((bits) => (bits === null ? "" : significant(bits)));
  const bits = low === high ? low : gettext("{low} to {high}", { low, high });
  const told = { count: scheme.count, scheme: scheme.text, bits };
  return bits ? gettext("{count} × {scheme}: {bits} bits/weight", told) : gettext("{count} × {scheme}", told);
}

function plansCard(grid, shade) {
  const legend = element("ul", { class: "schemes" });
  for (const scheme of [...grid.schemes].sort((one, other) => (one.low ?? 99) - (other.low ?? 99))) {
    const swatch = shape("svg", { width: 12, height: 12, "aria-hidden": "true" });
    for (const [x, bits] of [[0, scheme.low], [6, scheme.high]]) {
      swatch.append(shape("rect", { class: `cell ${shade(bits)}`, x, width: 6, height: 12 }));
    }
    const line = element("li");
    line.append(swatch, element("span", {}, schemeText(scheme)));
    legend.append(line);
  }
  return gridCard(grid, gettext("Bits per weight of the matrices of {name}; arrow keys move", { name: grid.name }), legend);
}

// On paper nothing can be pointed at: the tables are opened for it.
function printTables() {
  const closed = [...document.querySelectorAll(".plan-table:not([open])")];
  for (const table of closed) table.open = true;
  window.addEventListener("afterprint", () => closed.forEach((table) => { table.open = false; }), { once: true });
}

function startPlans() {
  if (data.plans.length === 0) return () => {};
  const bits = data.plans.flatMap((grid) => grid.cells.map((cell) => cell.bits)).filter((value) => value > 0);
  const low = Math.min(...bits);
  const high = Math.max(...bits);
  const shade = (value) => (value === null ? "kept" : `q${shadeOf(value, low, high)}`);
  drawScale("plan-scale", bits, (value) => gettext("{bits} bits/weight", { bits: significant(value) }));
  byId("plan-picture").hidden = false;
  window.addEventListener("beforeprint", printTables);
  const cards = data.plans.map((grid) => {
    const card = plansCard(grid, shade);
    byId("plan-grids").append(card);
    startCursor(card, grid, (cell) => planText(grid, cell));
    return [card, grid];
  });
  const paint = (cell) => ({ classes: shade(cell.bits), text: cell.bits === null ? "" : String(Number(cell.bits.toFixed(1))) });
  return () => cards.forEach(([card, grid]) => drawGrid(card, grid, paint));
}
