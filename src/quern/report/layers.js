// The error of every linear: one grid of squares a recipe, one colour scale for all.

function cellText(grid, cell) {
  const figures = { place: placeText(grid, cell), error: errorText(cell.error), bits: significant(cell.bits) };
  return gettext("{place}: {error} at {bits} bits/weight", figures);
}

function layersCard(grid) {
  const largest = [...grid.cells, ...grid.outside].reduce((one, other) => (other.error > one.error ? other : one));
  const worst = element("p", { class: "worst" }, gettext("Largest: {cell}", { cell: cellText(grid, largest) }));
  const card = gridCard(grid, gettext("Errors of the linears of {name}; arrow keys move", { name: grid.name }), worst);
  if (grid.outside.length > 0) {
    const told = grid.outside.map((cell) => cellText(grid, cell)).join(gettext("; "));
    card.insertBefore(element("p", { class: "outside" }, told), card.querySelector(".readout"));
  }
  return card;
}

function startLayers() {
  if (data.layers.length === 0) return () => {};
  const errors = data.layers.flatMap((grid) => grid.cells.map((cell) => cell.error)).filter((error) => error > 0);
  const low = Math.min(...errors);
  const high = Math.max(...errors);
  byId("layers").hidden = false;
  drawScale("scale", errors, errorText);
  const cards = data.layers.map((grid) => {
    const card = layersCard(grid);
    byId("grids").append(card);
    startCursor(card, grid, (cell) => cellText(grid, cell));
    return [card, grid];
  });
  const paint = (cell) => ({ classes: `q${shadeOf(cell.error, low, high)}`, text: "" });
  return () => cards.forEach(([card, grid]) => drawGrid(card, grid, paint));
}
