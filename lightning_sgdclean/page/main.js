// Wires the parts together: selecting, stepping, deciding, filtering, the theme.

const THEME_STORE = "sgdclean:theme";
const THEMES = { auto: "light dark", light: "light", dark: "dark" };

const isNarrow = () => matchMedia("(max-width: 859px)").matches;

function showAll() {
  showList();
  showTally();
  showDetail();
  showDecisionCounts();
  drawCharts(state.selected);
}

function refilter() {
  applyFilters();
  state.page = 0;
  if (!isNarrow() || state.selected !== null) {
    const stays = state.rows.includes(state.selected);
    state.selected = stays ? state.selected : isNarrow() ? null : (state.rows[0] ?? null);
    if (stays) state.page = Math.floor(state.rows.indexOf(state.selected) / perPage());
  }
  showAll();
}

function select(row, { fromPointer = false } = {}) {
  const wasFocused = document.activeElement?.closest("#list, #detail") !== null;
  const [before, page] = [state.selected, state.page];
  state.selected = row;
  const place = state.rows.indexOf(row);
  if (place >= 0) state.page = Math.floor(place / perPage());
  if (state.page === page) markSelected(before);
  else showList();
  showDetail();
  drawCharts(row);
  if (row === null) return byId("options")?.focus({ preventScroll: true });
  if (wasFocused || fromPointer) focusSelected();
  if (!fromPointer) byId(`row-${row}`)?.scrollIntoView({ block: "nearest" });
}

// The list is drawn anew at each step, so what had the focus is gone.
function focusSelected() {
  const target = isNarrow() ? byId("detail") : (byId("options") ?? byId(`row-${state.selected}`)?.querySelector("button"));
  target?.focus({ preventScroll: true });
}

function goTo(place) {
  if (!state.rows.length) return;
  select(state.rows[Math.max(0, Math.min(place, state.rows.length - 1))]);
  say(spoken(state.selected));
}

function step(by) {
  const place = state.rows.indexOf(state.selected);
  goTo(place < 0 ? 0 : place + by);
}

function decide(row, decision) {
  const place = state.rows.indexOf(row);
  const next = decision ? (state.rows[place + 1] ?? row) : row;
  setDecision(row, decision);
  const done = `Sample ${idOf(row)}: ${decisionInWords(row)}.`;
  showDecided(row);
  select(state.rows.includes(next) ? next : (state.rows[Math.min(place, state.rows.length - 1)] ?? null));
  say(next === row ? done : `${done} Next: ${spoken(next)}`);
}

// After a decision: its row, or the whole list where the filters ask for decisions.
function showDecided(row) {
  showDecisionCounts();
  if (state.decision === "any") return refreshRow(row);
  applyFilters();
  showList();
}

function undo() {
  const last = history.pop();
  if (!last) return;
  const row = rowOfId.get(last[0]);
  setDecision(row, last[1], true);
  showDecided(row);
  select(row);
  say(`Undone. Sample ${idOf(row)}: ${decisionInWords(row)}`);
}

function forget() {
  if (!confirm(`Clear all ${plural(decisions.size, "decision")} on this run?`)) return;
  decisions.clear();
  history.length = 0;
  remember();
  refilter();
}

function setView(view) {
  state.view = view;
  for (const radio of document.querySelectorAll("#view input")) radio.checked = radio.value === view;
  refilter();
}

function turnPage(by) {
  state.page += by;
  showList();
  byId("samples").scrollIntoView({ block: "start" });
}

function setTheme(name) {
  document.documentElement.style.colorScheme = THEMES[name];
  byId("theme").textContent = `Theme: ${name}`;
}

function setUpTheme() {
  const names = Object.keys(THEMES);
  let theme = names.includes(memory.read(THEME_STORE)) ? memory.read(THEME_STORE) : "auto";
  setTheme(theme);
  byId("theme").addEventListener("click", () => {
    theme = names[(names.indexOf(theme) + 1) % names.length];
    memory.write(THEME_STORE, theme);
    setTheme(theme);
  });
}

function setUpFilters() {
  byId("view").hidden = !hasSamples;
  byId("view").addEventListener("change", (event) => setView(event.target.value));
  byId("order").addEventListener("change", (event) => {
    state.bestFirst = event.target.value === "best";
    state.selected = null;
    refilter();
  });
  const knowsDisagreement = data.disagrees !== null || Object.values(data.samples).some((sample) => "disagrees" in sample);
  byId("disagrees-field").hidden = !knowsDisagreement;
  let waiting;
  byId("search").addEventListener("input", (event) => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      state.search = event.target.value;
      refilter();
    }, 120);
  });
  for (const name of ["effect", "decision"]) {
    byId(name).addEventListener("change", (event) => {
      state[name] = event.target.value;
      refilter();
    });
  }
  byId("disagrees").addEventListener("change", (event) => {
    state.disagrees = event.target.checked;
    refilter();
  });
  byId("grouping").addEventListener("change", showTally);
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").addEventListener("reset", () => {
    clearTimeout(waiting);
    Object.assign(state, { search: "", effect: "all", decision: "any", disagrees: false });
    state.groups.clear();
    setTimeout(refilter); // when the controls have their first values again
  });
  if (isNarrow()) byId("filter-fold").open = false;
}

function setUpButtons() {
  byId("earlier").addEventListener("click", () => turnPage(-1));
  byId("later").addEventListener("click", () => turnPage(1));
  byId("download").addEventListener("click", download);
  byId("undo").addEventListener("click", undo);
  byId("forget").addEventListener("click", forget);
}

readDecisions();
setUpTheme();
setUpGroupings();
setUpFilters();
setUpButtons();
setUpKeys();
setView(state.view);
new ResizeObserver(() => drawCharts(state.selected)).observe(byId("histogram"));
