// The keyboard: single keys while nothing is being typed; they can be turned off.

const KEYS_STORE = "sgdclean:keys";

const isTyping = (target) => target.closest("input, select, textarea, dialog") !== null;

const actions = {
  ArrowRight: () => step(1),
  ArrowLeft: () => step(-1),
  d: () => state.selected !== null && decide(state.selected, { choice: "drop", label: "" }),
  k: () => state.selected !== null && decide(state.selected, { choice: "keep", label: "" }),
  r: () => byId("new-label")?.focus(),
  u: () => undo(),
  "/": () => search(),
  "?": () => byId("keys").showModal(),
};

function search() {
  if (isNarrow() && state.selected !== null) select(null); // the sheet would cover it
  byId("filter-fold").open = true;
  byId("search").focus();
}

function stepsInList(event) {
  if (!event.target.closest("#list")) return null;
  return { ArrowDown: () => step(columnsOfCards()), ArrowUp: () => step(-columnsOfCards()), Home: () => goTo(0), End: () => goTo(state.rows.length - 1) }[event.key];
}

// How many cards stand in a row, so that the arrow keys go where they point.
function columnsOfCards() {
  const shown = [...document.querySelectorAll(".card")];
  return Math.max(1, shown.filter((card) => card.offsetTop === shown[0].offsetTop).length);
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
  if (event.key === "Escape" && !byId("keys").open && state.selected !== null && isNarrow()) return select(null);
  if (event.key === "Enter" && event.target.id === "new-label") {
    event.preventDefault(); // Enter takes the label instead of opening the choice
    return event.target.form.requestSubmit();
  }
  if (isTyping(event.target)) return;
  const action = stepsInList(event) ?? (byId("use-keys").checked ? actions[event.key.length === 1 ? event.key.toLowerCase() : event.key] : null);
  if (!action) return;
  event.preventDefault();
  action();
}

function setUpKeys() {
  byId("use-keys").checked = memory.read(KEYS_STORE) !== "off";
  byId("use-keys").addEventListener("change", (event) => memory.write(KEYS_STORE, event.target.checked ? "on" : "off"));
  byId("show-keys").addEventListener("click", () => byId("keys").showModal());
  document.addEventListener("keydown", onKey);
}
