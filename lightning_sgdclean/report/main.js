// Wires the parts together: selecting, stepping, deciding, filtering, the theme.

const THEME_STORE = "sgdclean:theme";
const THEMES = { auto: "light dark", light: "light", dark: "dark" };

const narrow = matchMedia("(max-width: 859px)");
const isNarrow = () => narrow.matches;

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

// To be asked before anything is drawn anew, since what had the focus is then gone.
const isAmongSamples = () => document.activeElement !== null && document.activeElement.closest("#list, #detail") !== null;

function select(row, { fromPointer = false, wasFocused = isAmongSamples() } = {}) {
  const [before, page] = [state.selected, state.page];
  state.selected = row;
  const place = state.rows.indexOf(row);
  if (place >= 0) state.page = Math.floor(place / perPage());
  if (state.page === page) markSelected(before);
  else showList();
  showDetail();
  drawCharts(row);
  if (row === null) return focusList();
  if (wasFocused || fromPointer) focusSelected();
  if (!fromPointer) byId(`row-${row}`)?.scrollIntoView({ block: "nearest" });
}

function focusSelected() {
  if (isNarrow()) byId("detail").focus({ preventScroll: true });
  else focusList();
}

// The cards together, the button of a row, or the place where there would be some.
function focusList() {
  const target = byId("options") ?? byId(`row-${state.selected}`)?.querySelector("button") ?? byId("list");
  target.focus({ preventScroll: true });
}

function goTo(place) {
  if (!state.rows.length) return;
  const isInList = document.activeElement?.id === "options"; // which tells its active option itself
  select(state.rows[Math.max(0, Math.min(place, state.rows.length - 1))]);
  say(isInList ? "" : spoken(state.selected));
}

function step(by) {
  const place = state.rows.indexOf(state.selected);
  goTo(place < 0 ? state.page * perPage() : place + by);
}

function decide(row, decision) {
  const place = state.rows.indexOf(row);
  const next = decision ? (state.rows[place + 1] ?? row) : row;
  const wasFocused = isAmongSamples();
  setDecision(row, decision);
  const done = `Sample ${idOf(row)}: ${decisionInWords(row)}.`;
  showDecided(row);
  const shown = state.rows.includes(next) ? next : (state.rows[Math.min(place, state.rows.length - 1)] ?? null);
  select(shown, { wasFocused });
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
  const wasFocused = isAmongSamples();
  setDecision(row, last[1], true);
  showDecided(row);
  select(row, { wasFocused });
  say(`Undone. Sample ${idOf(row)}: ${decisionInWords(row)}`);
}

// What another tab decided on this run.
function takeOver(event) {
  if (event.key !== STORE) return;
  const [wasFocused, before] = [isAmongSamples(), state.selected === null ? null : decisionInWords(state.selected)];
  readDecisions();
  if (state.decision !== "any") applyFilters();
  showList();
  showDecisionCounts();
  if (before !== null && decisionInWords(state.selected) !== before) showDetail();
  if (wasFocused && !isAmongSamples()) focusSelected();
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
  if (!isNarrow()) select(state.rows[state.page * perPage()], { wasFocused: false });
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
  byId("filter-fold").open = !isNarrow();
  narrow.addEventListener("change", foldFilters);
}

// Wide screens have no line to unfold them by; on narrow ones what is being typed into stays.
function foldFilters() {
  const fold = byId("filter-fold");
  fold.open = !isNarrow() || fold.contains(document.activeElement);
}

function setUpButtons() {
  byId("earlier").addEventListener("click", () => turnPage(-1));
  byId("later").addEventListener("click", () => turnPage(1));
  byId("download").addEventListener("click", download);
  byId("undo").addEventListener("click", undo);
  byId("forget").addEventListener("click", forget);
  addEventListener("storage", takeOver);
}

readDecisions();
setUpTheme();
setUpGroupings();
setUpFilters();
setUpButtons();
setUpKeys();
setView(state.view);
new ResizeObserver(() => drawCharts(state.selected)).observe(byId("histogram"));
