// What is shown: the state of the controls, and the rows that pass them.

const CARDS_PER_PAGE = 60;
const ROWS_PER_PAGE = 100;

const state = {
  view: hasSamples ? "cards" : "table",
  bestFirst: false,
  search: "",
  effect: "all",
  decision: "any",
  disagrees: false,
  groups: new Map(), // field -> number of the chosen value
  page: 0,
  selected: null,
  rows: [], // that pass, in the order shown
};

const perPage = () => (state.view === "cards" ? CARDS_PER_PAGE : ROWS_PER_PAGE);
const numPages = () => Math.max(1, Math.ceil(state.rows.length / perPage()));

const isFiltered = () =>
  state.search !== "" || state.effect !== "all" || state.decision !== "any" || state.disagrees || state.groups.size > 0;

function matches(row, text) {
  if (idOf(row).toLowerCase().includes(text)) return true;
  if (labelOf(row)?.toLowerCase().includes(text)) return true;
  const sample = sampleOf(row);
  return Boolean(sample?.text?.toLowerCase().includes(text) || sample?.source?.toLowerCase().includes(text));
}

function passes(row, text) {
  if (state.effect !== "all" && effectOf(row) !== state.effect) return false;
  if (state.decision !== "any" && (decisions.get(idOf(row))?.choice ?? "none") !== state.decision) return false;
  if (state.disagrees && disagreesAt(row) !== true) return false;
  for (const [field, code] of state.groups) if (field.codes[row] !== code) return false;
  return text === "" || matches(row, text);
}

function passing(inView) {
  const text = state.search.trim().toLowerCase();
  const rows = [];
  for (let row = 0; row < numRows; row++) if (inView(row) && passes(row, text)) rows.push(row);
  return state.bestFirst ? rows.reverse() : rows;
}

function applyFilters() {
  state.rows = passing(state.view === "cards" ? (row) => sampleOf(row) !== undefined : () => true);
}
