// Harm by class and by group: one bar to the left for harm, one to the right for help; a click filters.

const CLASSES_NOTES = {
  shown: "Classes are known only of the samples that can be looked at, and counted of these. ",
  none: "No classes are known here. ",
};
const HOW_TO_KNOW = 'SGDInfluence(columns=("label",)) puts those of all samples into the ranking.';

function setUpGroupings() {
  const note = numRows ? CLASSES_NOTES[data.classesOf] : undefined;
  byId("classes-note").hidden = note === undefined;
  byId("classes-note").textContent = note === undefined ? "" : note + HOW_TO_KNOW;
  if (!groupings.length) return;
  byId("groups").hidden = false;
  byId("grouping").append(...groupings.map((field, i) => make("option", { value: i }, titleOf(field))));
}

function showTally() {
  const field = groupings[Number(byId("grouping").value)];
  if (!field) return;
  const most = Math.max(...field.tally.map((group) => Math.max(-group.harm, group.help))) || 1;
  const lines = field.tally.map((group) => {
    const { name } = field.values[group.group];
    const isChosen = state.groups.get(field) === group.group;
    const bars = make("span", { class: "two-bars", "aria-hidden": "true" });
    bars.style.setProperty("--harm", -group.harm / most);
    bars.style.setProperty("--help", group.help / most);
    const label = `${name}: ${plural(group.count, "sample")}, ${count(group.harmful)} of them harmful, `
      + `harm ${digits(-group.harm)}, help ${digits(group.help)}`;
    return make(
      "li",
      {},
      make(
        "button",
        { type: "button", "aria-pressed": isChosen, "aria-label": label, title: label, onclick: () => choose(field, isChosen ? null : group.group) },
        make("span", { class: "group" }, name),
        make("span", { class: "share" }, `${count(group.harmful)} / ${count(group.count)}`),
        bars,
      ),
    );
  });
  byId("tally").replaceChildren(...lines);
}

function choose(field, code) {
  if (code === null) state.groups.delete(field);
  else state.groups.set(field, code);
  const place = [...byId("tally").querySelectorAll("button")].indexOf(document.activeElement);
  refilter();
  if (place >= 0) byId("tally").querySelectorAll("button")[place]?.focus({ preventScroll: true });
}
