// Names beside the marks of the scatter: each where it covers nothing, the important ones first.

const overlaps = (one, other) => one.left < other.right && other.left < one.right && one.top < other.bottom && other.top < one.bottom;

// Places for a name around a mark, nearest first. Those further away need a line that leads to the mark.
function placesAround(mark, width) {
  const [px, py] = mark.at;
  const near = mark.radius + 8;
  const places = [
    [px + near, py + 4], [px - near - width, py + 4], [px - width / 2, py - near], [px - width / 2, py + near + 10],
    [px + near, py - near], [px + near, py + near + 6], [px - near - width, py - near], [px - near - width, py + near + 6],
  ].map(([left, base]) => ({ left, base, led: false }));
  for (const far of [mark.radius + 26, mark.radius + 44, mark.radius + 64]) {
    for (const [left, base] of [
      [px + 8, py - far], [px - width - 8, py - far], [px + 8, py + far + 8], [px - width - 8, py + far + 8],
      [px + far, py - far / 2], [px - far - width, py - far / 2], [px + far, py + far / 2], [px - far - width, py + far / 2],
    ]) places.push({ left, base, led: true });
  }
  return places.map((place) => ({ ...place, right: place.left + width, top: place.base - 12, bottom: place.base + 4 }));
}

const urgency = (mark) => (mark.row.choice ? 0 : mark.row.front ? 1 : mark.row.reference ? 2 : 3);

// Returns how many marks had to go without a name; the recommended row never does.
function drawLabels(canvas, marks, obstacles, size) {
  const taken = [...marks, ...obstacles];
  const longest = marks.length > MANY ? 24 : 28;
  let nameless = 0;
  for (const mark of [...marks].sort((one, other) => urgency(one) - urgency(other))) {
    const label = shape("text", { class: mark.row.choice ? "label choice" : "label" }, shortened(mark.row.name, longest));
    canvas.append(label);
    const fits = (box) => box.left >= margin.left && box.right <= size.width - 4 && box.top >= 0
      && box.bottom <= size.height - margin.bottom && !taken.some((other) => other.row !== mark.row && overlaps(box, other));
    const places = placesAround(mark, label.getBBox().width);
    const found = places.find(fits) ?? (mark.row.choice ? places[0] : null);
    if (!found) {
      label.remove();
      nameless += 1;
      continue;
    }
    if (found.led) {
      const end = { x: Math.min(found.right, Math.max(found.left, mark.at[0])), y: found.base > mark.at[1] ? found.top + 1 : found.bottom };
      canvas.insertBefore(shape("line", { class: "leader", x1: mark.at[0], y1: mark.at[1], x2: end.x, y2: end.y }), canvas.querySelector(".point"));
    }
    label.setAttribute("x", found.left);
    label.setAttribute("y", found.base);
    taken.push(found);
  }
  return nameless;
}
