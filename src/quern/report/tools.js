// The tools view: filters by tool, runtime and licence, and the provenance of a row on hover, focus or tap.

const toolFilters = [...document.querySelectorAll("#filters [data-filter]")];

// The unquantized model was made by no tool, so no licence of a tool stands against it.
function fitsToolFilters(row) {
  return toolFilters.every(({ value, dataset }) => {
    if (!value) return true;
    if (dataset.filter === "target") return row.targets.includes(value);
    return row[dataset.filter] === value || (dataset.filter === "licence" && row.licence === "");
  });
}

function showAbout(button) {
  const row = data.rows[Number(button.dataset.about)];
  const tip = byId("about-tip");
  const list = element("dl");
  for (const [label, text] of row.provenance) {
    const pair = element("div");
    pair.append(element("dt", {}, label), element("dd", {}, text));
    list.append(pair);
  }
  tip.replaceChildren(element("strong", {}, row.name), list);
  tip.hidden = false;
  button.setAttribute("aria-describedby", tip.id);
  const box = button.getBoundingClientRect();
  const page = document.documentElement;
  const left = Math.min(box.right + 10, page.clientWidth - tip.offsetWidth - 8);
  // Below the button where there is room on the screen, else above it.
  const below = box.bottom + 8 + tip.offsetHeight <= window.innerHeight;
  const top = below ? box.bottom + 8 : Math.max(8, box.top - 8 - tip.offsetHeight);
  tip.style.left = `${Math.max(8, left) + window.scrollX}px`;
  tip.style.top = `${top + window.scrollY}px`;
}

function hideAbout() {
  const tip = byId("about-tip");
  if (!tip || tip.hidden) return;
  tip.hidden = true;
  document.querySelector("[data-about][aria-describedby]")?.removeAttribute("aria-describedby");
}

function startTools() {
  for (const filter of toolFilters) filter.addEventListener("change", applyFilter);
  for (const button of document.querySelectorAll("[data-about]")) {
    const head = button.closest("th");
    head.addEventListener("pointerenter", () => showAbout(button));
    head.addEventListener("pointerleave", hideAbout);
    button.addEventListener("focus", () => showAbout(button));
    button.addEventListener("click", () => showAbout(button));
    button.addEventListener("blur", hideAbout);
  }
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hideAbout();
  });
}
