// The table: sorting by a column and filtering by name and tag. The chart shows the rows that the table shows.

const tableRows = [...byId("rows").tBodies[0].rows];
const sorting = { key: "", ascending: true };

function visibleIds() {
  return new Set(tableRows.filter((row) => !row.hidden).map((row) => Number(row.dataset.id)));
}

function applyFilter() {
  const wanted = byId("search").value.trim().toLowerCase();
  const tags = [...document.querySelectorAll("#filters [data-tag]")].filter((box) => box.checked).map((box) => box.dataset.tag);
  for (const row of tableRows) {
    const name = data.rows[Number(row.dataset.id)].name.toLowerCase();
    const own = row.dataset.tags.split(" ");
    row.hidden = !(name.includes(wanted) && tags.every((tag) => own.includes(tag)) && fitsToolFilters(data.rows[Number(row.dataset.id)]));
  }
  const shown = visibleIds().size;
  byId("count").textContent = gettext("{shown} of {all} shown", { shown, all: tableRows.length });
  byId("empty").hidden = shown > 0;
  drawChart();
}

// Rows without a number come last whichever way the column is sorted; equal ones keep the order of measuring.
function compareRows(one, other) {
  const order = Number(one.dataset.id) - Number(other.dataset.id);
  if (!sorting.key) return order;
  const first = data.rows[Number(one.dataset.id)].values[sorting.key];
  const second = data.rows[Number(other.dataset.id)].values[sorting.key];
  if (first === null || second === null) return first === second ? order : first === null ? 1 : -1;
  return (sorting.ascending ? first - second : second - first) || order;
}

function sortBy(key, ascending) {
  sorting.key = key;
  sorting.ascending = ascending;
  for (const head of document.querySelectorAll("#rows thead th[data-key]")) {
    if (head.dataset.key === key) head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    else head.removeAttribute("aria-sort");
  }
  byId("sort").value = key;
  byId("rows").tBodies[0].append(...[...tableRows].sort(compareRows));
}

function startTable() {
  byId("filters").hidden = false;
  byId("search").addEventListener("input", applyFilter);
  for (const box of document.querySelectorAll("#filters [data-tag]")) box.addEventListener("change", applyFilter);
  for (const head of document.querySelectorAll("#rows thead th[data-key]")) {
    // The first click puts the best on top.
    const bestFirst = head.dataset.better === "low";
    head.querySelector("button").addEventListener("click", () => {
      const again = sorting.key === head.dataset.key;
      sortBy(head.dataset.key, again ? !sorting.ascending : bestFirst);
    });
  }
  byId("sort").addEventListener("change", (event) => {
    const column = columns.get(event.target.value);
    sortBy(event.target.value, !column || column.better === "low");
  });
}
