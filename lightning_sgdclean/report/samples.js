// The list: cards or a table, one page of it at a time.

const largest = Math.max(Math.abs(data.influence[0] ?? 0), Math.abs(data.influence.at(-1) ?? 0)) || 1;

function influenceBar(row) {
  const share = Math.sqrt(Math.abs(data.influence[row]) / largest);
  const bar = make("span", { class: `meter ${effectOf(row)}`, "aria-hidden": "true" });
  bar.style.setProperty("--share", share);
  return bar;
}

function influenceText(row) {
  return make("span", { class: `number ${effectOf(row)}` }, digits(data.influence[row], true));
}

// "7" or, where the model predicts something else, "7 → 1".
function labelLine(row) {
  const [label, prediction] = [labelOf(row), predictionOf(row)];
  if (label === undefined && prediction === undefined) return null;
  const line = make("span", { class: "labels" }, make("span", { class: "label", title: `label: ${label ?? "unknown"}` }, label ?? "?"));
  if (prediction !== undefined && disagreesAt(row) !== false && prediction !== label) {
    line.append(make("span", { class: disagreesAt(row) ? "predicted" : "other", title: `the model predicts ${prediction}` }, `→ ${prediction}`));
  }
  return line;
}

function spoken(row) {
  const words = [`Sample ${idOf(row)}`, `rank ${count(rankOf(row))}`, `influence ${digits(data.influence[row])}`];
  if (labelOf(row) !== undefined) words.push(`label ${labelOf(row)}`);
  if (predictionOf(row) !== undefined) words.push(`model predicts ${predictionOf(row)}`);
  words.push(decisionInWords(row));
  return words.join(", ");
}

function picture(sample, name) {
  const isSmall = Math.max(...sample.size) <= 64;
  return make("img", { src: sample.picture, alt: name, class: isSmall ? "pixels" : null, decoding: "async", draggable: "false" });
}

function preview(row) {
  const sample = sampleOf(row);
  const parts = [];
  if (sample.picture) parts.push(make("span", { class: "picture" }, picture(sample, "")));
  if (sample.text) parts.push(make("span", { class: "text" }, sample.text.slice(0, 400)));
  else if (sample.features && !sample.picture) {
    const pairs = sample.features.slice(0, 6).flatMap(([name, value]) => [
      make("span", { class: "feature" }, name),
      make("span", { class: "value" }, value),
    ]);
    parts.push(make("span", { class: "features" }, ...pairs));
  }
  return parts.length ? parts : [make("span", { class: "text aside" }, sample.note ?? "nothing to show")];
}

const isDropped = (row) => decisions.get(idOf(row))?.choice === "drop";

const badge = (row) => {
  const decision = decisions.get(idOf(row));
  if (!decision) return null;
  const text = decision.choice === "relabel" ? `→ ${choiceNames.get(decision.label) ?? decision.label}` : WORDS[decision.choice];
  return make("span", { class: `badge ${decision.choice}` }, text);
};

function card(row) {
  return make(
    "div",
    {
      class: isDropped(row) ? "card dropped" : "card",
      role: "option",
      id: `row-${row}`,
      "aria-selected": row === state.selected,
      "aria-label": spoken(row),
      onclick: () => select(row, { fromPointer: true }),
    },
    ...preview(row),
    make("span", { class: "caption" }, labelLine(row), influenceText(row)),
    influenceBar(row),
    make("span", { class: "id" }, idOf(row)),
    badge(row),
  );
}

function cards(rows) {
  const isWide = !rows.some((row) => sampleOf(row).picture);
  return make(
    "div",
    {
      class: isWide ? "cards wide" : "cards",
      role: "listbox",
      id: "options",
      tabindex: "0",
      "aria-label": "Samples",
      "aria-activedescendant": rows.includes(state.selected) ? `row-${state.selected}` : null,
    },
    ...rows.map(card),
  );
}

const TABLE = [
  ["Rank", "end", (row) => count(rankOf(row))],
  ["Sample", "", (row) => make("button", { type: "button", class: "id", onclick: () => select(row, { fromPointer: true }) }, idOf(row))],
  ["Label", "", labelLine, () => labelField !== undefined || hasSamples],
  ["Influence", "end", (row) => make("span", { class: "measure" }, influenceText(row), influenceBar(row))],
  ["Loss", "end", (row) => (lossOf(row) === undefined ? "" : digits(lossOf(row))), () => data.loss !== null],
  ["Visits", "end", (row) => count(data.visits[row])],
  ["Decision", "", badge],
];

const columns = TABLE.filter(([, , , isShown]) => !isShown || isShown());

function tableRow(row) {
  return make(
    "tr",
    { id: `row-${row}`, "aria-current": row === state.selected ? "true" : null, class: isDropped(row) ? "dropped" : null },
    ...columns.map(([, align, content]) => make("td", { class: align || null }, content(row))),
  );
}

function table(rows) {
  return make(
    "div",
    { class: "scroll" },
    make(
      "table",
      {},
      make("caption", { class: "hidden" }, "Samples in the order of their influence"),
      make("thead", {}, make("tr", {}, ...columns.map(([name, align]) => make("th", { scope: "col", class: align }, name)))),
      make("tbody", {}, ...rows.map(tableRow)),
    ),
  );
}

// Draw a row anew where it stands; the others, and their pictures, stay.
function refreshRow(row) {
  const old = row === null ? null : byId(`row-${row}`);
  if (!old) return;
  old.replaceWith(state.view === "cards" ? card(row) : tableRow(row));
}

function markSelected(before) {
  refreshRow(before);
  refreshRow(state.selected);
  if (state.selected === null) byId("options")?.removeAttribute("aria-activedescendant");
  else byId("options")?.setAttribute("aria-activedescendant", `row-${state.selected}`);
}

function statusText() {
  const what = state.view === "cards" ? `${plural(state.rows.length, "sample")} to look at` : plural(state.rows.length, "sample");
  if (state.view === "cards" && !isFiltered()) return `${what}: the most harmful and the most helpful of ${count(data.num)}`;
  if (state.view === "table" && data.skipped.count && !isFiltered()) {
    return `${what} of ${count(data.num)}; the ${count(data.skipped.count)} in between are in influence.csv`;
  }
  return isFiltered() ? `${what} pass the filters` : what;
}

function emptyList() {
  const others = state.view === "cards" ? passing(() => true).length : 0;
  const words = make("div", { class: "empty" }, make("p", {}, "No sample passes the filters."));
  if (others) {
    words.firstChild.textContent = `None of the samples that can be looked at passes, but ${plural(others, "row")} of the table do.`;
    words.append(make("button", { type: "button", onclick: () => setView("table") }, "Show them in the table"));
  }
  return words;
}

function showList() {
  state.page = Math.min(state.page, numPages() - 1);
  const rows = state.rows.slice(state.page * perPage(), (state.page + 1) * perPage());
  byId("list").replaceChildren(rows.length ? (state.view === "cards" ? cards(rows) : table(rows)) : emptyList());
  byId("status").textContent = statusText();
  byId("pager").hidden = numPages() === 1;
  byId("page-number").textContent = `Page ${count(state.page + 1)} of ${count(numPages())}`;
  byId("earlier").disabled = state.page === 0;
  byId("later").disabled = state.page === numPages() - 1;
}
