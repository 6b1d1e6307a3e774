// The selected sample, large, with all that is known of it, and the buttons to decide.

function fact(term, ...content) {
  return make("div", {}, make("dt", {}, term), make("dd", {}, ...content));
}

function exhibit(row) {
  const sample = sampleOf(row);
  if (!sample) return [make("p", { class: "aside" }, "Only the most harmful and the most helpful samples can be looked at here.")];
  const parts = [];
  if (sample.picture) parts.push(make("div", { class: "picture" }, picture(sample, `Picture of sample ${idOf(row)}`)));
  if (sample.text) parts.push(make("blockquote", { class: "text", tabindex: "0", "aria-label": "Text of the sample" }, sample.text));
  if (sample.features) {
    parts.push(make("dl", { class: "features", tabindex: "0", "aria-label": "Values of the sample" }, ...sample.features.map(([name, value]) => fact(name, value))));
  }
  if (sample.note) parts.push(make("p", { class: "aside" }, sample.note));
  return parts;
}

function influenceFact(row) {
  const size = digits(Math.abs(data.influence[row]));
  const isLower = data.influence[row] < 0 !== isMax;
  const words = data.influence[row] === 0 ? "no effect" : `without it, ${data.objective.name} would be about ${size} ${isLower ? "lower" : "higher"}`;
  return fact("Influence", influenceText(row), make("span", { class: "aside" }, ` ${words}`));
}

function facts(row) {
  const loss = lossOf(row);
  const list = [influenceFact(row)];
  if (loss !== undefined) list.push(fact("Loss now", digits(loss)));
  list.push(fact("Visits", `${count(data.visits[row])} in the window`));
  for (const field of data.fields) {
    if (field === labelField || field === predictionField || nameIn(field, row) === undefined) continue;
    list.push(fact(titleOf(field), nameIn(field, row)));
  }
  for (const [name, value] of sampleOf(row)?.more ?? []) list.push(fact(name.replaceAll("_", " "), value));
  if (sampleOf(row)?.source) list.push(fact("Source", sampleOf(row).source));
  return make("dl", { class: "facts" }, ...list);
}

// What stands against what: the label and what the model now predicts.
function verdict(row) {
  const [label, prediction] = [labelOf(row), predictionOf(row)];
  if (label === undefined && prediction === undefined) return null;
  const predicted = make("dd", { class: disagreesAt(row) ? "predicted" : null }, prediction ?? "unknown");
  const parts = [make("div", {}, make("dt", {}, "Label"), make("dd", {}, label ?? "unknown"))];
  if (prediction !== undefined) parts.push(make("div", {}, make("dt", {}, "Model predicts"), predicted));
  return make("dl", { class: "verdict" }, ...parts);
}

function choiceButton(row, choice, key) {
  const isChosen = decisions.get(idOf(row))?.choice === choice;
  return make(
    "button",
    { type: "button", class: choice, "aria-pressed": isChosen, "aria-keyshortcuts": key, onclick: () => decide(row, isChosen ? null : { choice, label: "" }) },
    WORDS[choice],
    make("kbd", { "aria-hidden": "true" }, key),
  );
}

function relabelForm(row) {
  const decision = decisions.get(idOf(row));
  const now = decision?.choice === "relabel" ? decision.label : null;
  const predicted = data.choices.find((choice) => choice.name === predictionOf(row))?.text;
  const own = labelInDataset(row);
  let input;
  if (data.choices.length) {
    const wanted = now ?? (predicted !== own ? predicted : null);
    const options = data.choices.filter((choice) => choice.text !== own || now === own);
    input = make("select", { id: "new-label", required: true }, make("option", { value: "" }, "choose …"),
      ...options.map(({ text, name }) => make("option", { value: text, selected: text === wanted }, name)));
  } else {
    input = make("input", { id: "new-label", required: true, autocomplete: "off", value: now ?? "" });
  }
  const submit = (event) => {
    event.preventDefault();
    if (input.value !== "") decide(row, { choice: "relabel", label: input.value });
  };
  return make(
    "form",
    { class: "relabel", onsubmit: submit },
    make("label", { for: "new-label" }, "New label"),
    input,
    make("button", { class: "relabel", "aria-pressed": now !== null, "aria-keyshortcuts": "R" }, "Relabel", make("kbd", { "aria-hidden": "true" }, "R")),
  );
}

function showDetail() {
  const row = state.selected;
  const host = byId("detail");
  document.body.classList.toggle("has-selection", row !== null);
  if (row === null) {
    host.replaceChildren(make("p", { class: "aside" }, "Select a sample to look at it."));
    return;
  }
  host.replaceChildren(
    make(
      "div",
      { class: "title" },
      make("h3", {}, make("span", { class: "aside" }, "Sample "), idOf(row)),
      make("span", { class: `chip ${effectOf(row)}` }, effectOf(row) === "none" ? "no effect" : effectOf(row)),
      make("span", { class: "aside" }, `rank ${count(rankOf(row))} of ${count(data.num)}`),
      make("button", { type: "button", class: "quiet close", "aria-label": "Close", onclick: () => select(null) }, "✕"),
    ),
    make("div", { class: "exhibit" }, ...exhibit(row)),
    ...[verdict(row)].filter(Boolean),
    make("div", { class: "choices", role: "group", "aria-label": "Decision" }, choiceButton(row, "drop", "D"), choiceButton(row, "keep", "K")),
    relabelForm(row),
    facts(row),
    make(
      "div",
      { class: "steps" },
      make("button", { type: "button", class: "quiet", onclick: () => step(-1), "aria-keyshortcuts": "ArrowLeft" }, "← Previous"),
      make("button", { type: "button", class: "quiet", onclick: () => step(1), "aria-keyshortcuts": "ArrowRight" }, "Next →"),
    ),
  );
}
