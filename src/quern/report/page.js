// Tabs, theme, and the start of everything else.

function startTabs() {
  const tabs = [...document.querySelectorAll('[role="tab"]')];
  const select = (chosen) => {
    for (const tab of tabs) {
      const on = tab === chosen;
      tab.setAttribute("aria-selected", String(on));
      tab.tabIndex = on ? 0 : -1;
      byId(tab.getAttribute("aria-controls")).hidden = !on;
    }
  };
  tabs.forEach((tab, place) => {
    tab.addEventListener("click", () => select(tab));
    tab.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move) return;
      const next = tabs[(place + move + tabs.length) % tabs.length];
      select(next);
      next.focus();
    });
  });
  document.querySelector('[role="tablist"]').hidden = false;
  document.body.classList.add("tabbed");
  select(tabs.find((tab) => tab.getAttribute("aria-selected") === "true"));
}

function startTheme() {
  const root = document.documentElement;
  const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : prefersDark.matches);
  const label = () => {
    byId("theme-label").textContent = isDark() ? gettext("Light") : gettext("Dark");
    byId("theme").setAttribute("aria-label", isDark() ? gettext("Switch to light colours") : gettext("Switch to dark colours"));
  };
  byId("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    label();
  });
  prefersDark.addEventListener("change", label);
  byId("theme").hidden = false;
  label();
}

startTabs();
startTheme();
startTable();
startTools();
startExport();
startChart();
const drawGrids = [startPlans(), startLayers()];
applyFilter();
drawGrids.forEach((draw) => draw());
let drawnWidth = window.innerWidth;
window.addEventListener("resize", () => {
  if (window.innerWidth === drawnWidth) return;
  drawnWidth = window.innerWidth;
  drawChart();
  drawGrids.forEach((draw) => draw());
});
