// Linears as squares, roles down and depth across: drawing, the cursor that pointer and arrow keys move, the colour scale.

const SHADES = 9;

function shadeOf(value, low, high) {
  if (!(value > 0) || high <= low) return 0;
  const place = (Math.log(value) - Math.log(low)) / (Math.log(high) - Math.log(low));
  return Math.max(0, Math.min(SHADES - 1, Math.floor(place * SHADES)));
}

function placeText(grid, cell) {
  return typeof cell.depth === "number" ? gettext("block {depth}, {role}", { depth: cell.depth, role: grid.roles[cell.role] }) : cell.linear;
}

// A cell without a depth stands for all of them. `paint` gives a cell's classes and what is written in it.
function drawGrid(card, grid, paint) {
  const canvas = card.querySelector("svg.squares");
  const width = Math.max(220, card.clientWidth - 32);
  const left = 94;
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
    const whole = cell.depth === null;
    const [start, room] = whole ? [left, width - left] : [left + cell.depth * step, step];
    const { classes, text } = paint(cell);
    canvas.append(shape("rect", {
      class: `cell ${classes}`, "data-place": place,
      x: start, y: cell.role * row, width: Math.max(0.5, room - gap), height: row - 1.5,
    }));
    if (text && room > 26) {
      canvas.append(shape("text", { class: `within ${classes}`, x: start + (room - gap) / 2, y: cell.role * row + 13, "text-anchor": "middle" }, text));
    }
  });
  const every = Math.ceil(grid.depths / Math.max(1, Math.floor((width - left) / 34)));
  for (let depth = 0; depth < grid.depths; depth += every) {
    canvas.append(shape("text", { class: "tick", x: left + (depth + 0.5) * step, y: height - 4, "text-anchor": "middle" }, depth));
  }
}

function startCursor(card, grid, tell) {
  const canvas = card.querySelector("svg.squares");
  const readout = card.querySelector(".readout");
  const cursor = { place: -1, depth: 0 };
  const show = (place) => {
    cursor.place = place;
    cursor.depth = grid.cells[place].depth ?? cursor.depth;
    canvas.querySelector(".cursor")?.classList.remove("cursor");
    const square = canvas.querySelector(`[data-place="${place}"]`);
    square?.classList.add("cursor");
    readout.textContent = tell(grid.cells[place]);
  };
  const find = (role, depth) => grid.cells.findIndex((cell) => cell.role === role && (cell.depth === null || cell.depth === depth));
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
    const next = find(grid.cells[cursor.place].role + move[0], cursor.depth + move[1]);
    if (next >= 0) show(next);
  });
}

function gridCard(grid, label, headline) {
  const card = element("div", { class: "card grid-card" });
  const head = element("div", { class: "grid-head" });
  head.append(element("h3", {}, grid.name), headline);
  card.append(head, shape("svg", { class: "squares", width: "100%", tabindex: 0, role: "img", "aria-label": label }));
  card.append(element("p", { class: "readout", "aria-live": "polite" }));
  return card;
}

function drawScale(name, values, text) {
  byId(`${name}-low`).textContent = values.length > 0 ? text(Math.min(...values)) : "";
  byId(`${name}-high`).textContent = values.length > 0 ? text(Math.max(...values)) : "";
  for (let place = 0; place < SHADES; place += 1) {
    byId(name).append(shape("rect", { class: `cell q${place}`, x: place * 20, width: 20, height: 12 }));
  }
}
