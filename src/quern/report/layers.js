// The error of every linear: one grid of squares a recipe, roles down, depth across, one colour scale for all.

const SHADES = 9;

function shadeOf(error, low, high) {
  if (!(error > 0) || high <= low) return 0;
  const place = (Math.log(error) - Math.log(low)) / (Math.log(high) - Math.log(low));
  return Math.max(0, Math.min(SHADES - 1, Math.floor(place * SHADES)));
}

function cellText(grid, cell) {
  const where = cell.depth === undefined ? cell.linear : `block ${cell.depth}, ${grid.roles[cell.role]}`;
  return `${where}: ${errorText(cell.error)} at ${significant(cell.bits)} bits/weight`;
}

function drawGrid(card, grid, low, high) {
  const canvas = card.querySelector("svg");
  const width = Math.max(220, card.clientWidth - 32);
  const left = 78;
  const row = 19;
  const step = (width - left) / Math.max(1, grid.depths);
  const gap = step > 6 ? 1.5 : 0;
  const height = grid.roles.length * row + 20;
  canvas.setAttribute("viewBox", `0 0 ${width} ${height}`);
  canvas.setAttribute("height", height);
  canvas.replaceChildren();
  grid.roles.forEach((role, place) => {
    canvas.append(shape("text", { class: "tick", x: left - 8, y: place * row + 13, "text-anchor": "end" }, shortened(role, 12)));
  });
  grid.cells.forEach((cell, place) => {
    canvas.append(shape("rect", {
      class: `cell q${shadeOf(cell.error, low, high)}`, "data-place": place,
      x: left + cell.depth * step, y: cell.role * row, width: Math.max(0.5, step - gap), height: row - 1.5,
    }));
  });
  const every = Math.ceil(grid.depths / Math.max(1, Math.floor((width - left) / 34)));
  for (let depth = 0; depth < grid.depths; depth += every) {
    canvas.append(shape("text", { class: "tick", x: left + (depth + 0.5) * step, y: height - 4, "text-anchor": "middle" }, depth));
  }
}

function startCursor(card, grid) {
  const canvas = card.querySelector("svg");
  const readout = card.querySelector(".readout");
  const cursor = { place: -1 };
  const show = (place) => {
    cursor.place = place;
    canvas.querySelector(".cursor")?.classList.remove("cursor");
    const square = canvas.querySelector(`[data-place="${place}"]`);
    square?.classList.add("cursor");
    readout.textContent = cellText(grid, grid.cells[place]);
  };
  const find = (role, depth) => grid.cells.findIndex((cell) => cell.role === role && cell.depth === depth);
  canvas.addEventListener("pointermove", (event) => {
    if (event.target.dataset.place) show(Number(event.target.dataset.place));
  });
  canvas.addEventListener("click", (event) => {
    if (event.target.dataset.place) show(Number(event.target.dataset.place));
  });
  canvas.addEventListener("focus", () => {
    if (cursor.place < 0 && grid.cells.length > 0) show(0);
  });
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!move || cursor.place < 0) return;
    event.preventDefault();
    const here = grid.cells[cursor.place];
    const next = find(here.role + move[0], here.depth + move[1]);
    if (next >= 0) show(next);
  });
}

function gridCard(grid) {
  const card = element("div", { class: "card grid-card" });
  const largest = [...grid.cells, ...grid.outside].reduce((one, other) => (other.error > one.error ? other : one));
  const head = element("div", { class: "grid-head" });
  head.append(element("h3", {}, grid.name), element("p", { class: "worst" }, `Largest: ${cellText(grid, largest)}`));
  const canvas = shape("svg", { width: "100%", tabindex: 0, role: "img", "aria-label": `Errors of the linears of ${grid.name}; arrow keys move` });
  card.append(head, canvas);
  if (grid.outside.length > 0) {
    card.append(element("p", { class: "outside" }, grid.outside.map((cell) => cellText(grid, cell)).join("; ")));
  }
  card.append(element("p", { class: "readout", "aria-live": "polite" }));
  return card;
}

function startLayers() {
  if (data.layers.length === 0) return () => {};
  const errors = data.layers.flatMap((grid) => grid.cells.map((cell) => cell.error)).filter((error) => error > 0);
  const low = Math.min(...errors);
  const high = Math.max(...errors);
  byId("layers").hidden = false;
  byId("scale-low").textContent = errors.length > 0 ? errorText(low) : "";
  byId("scale-high").textContent = errors.length > 0 ? errorText(high) : "";
  for (let place = 0; place < SHADES; place += 1) {
    byId("scale").append(shape("rect", { class: `cell q${place}`, x: place * 20, width: 20, height: 12 }));
  }
  const cards = data.layers.map((grid) => {
    const card = gridCard(grid);
    byId("grids").append(card);
    startCursor(card, grid);
    return [card, grid];
  });
  return () => cards.forEach(([card, grid]) => drawGrid(card, grid, low, high));
}
