// Keep, drop, relabel: remembered in this browser by the run's id, and downloaded as decisions.csv.

const STORE = `sgdclean:${data.run}`;
const WORDS = { keep: "Keep", drop: "Drop", relabel: "Relabel" };

const decisions = new Map(); // id as text -> { choice, label }
const history = []; // [id, decision before]
let isRemembered = true;

// What is remembered, other tabs' decisions among it, takes the place of what is known here.
function readDecisions() {
  let entries;
  try {
    entries = JSON.parse(memory.read(STORE));
  } catch {
    return; // not ours
  }
  if (!Array.isArray(entries)) return;
  decisions.clear();
  for (const entry of entries) {
    const [id, choice, label] = Array.isArray(entry) ? entry : [];
    if (rowOfId.has(id) && Object.hasOwn(WORDS, choice) && typeof label === "string") decisions.set(id, { choice, label });
  }
}

function remember() {
  isRemembered = memory.write(STORE, JSON.stringify([...decisions].map(([id, { choice, label }]) => [id, choice, label])));
}

function setDecision(row, decision, isUndo = false) {
  const id = idOf(row);
  if (isRemembered) readDecisions();
  if (!isUndo) history.push([id, decisions.get(id)]);
  if (decision) decisions.set(id, decision);
  else decisions.delete(id);
  remember();
}

function decisionInWords(row) {
  const decision = decisions.get(idOf(row));
  if (!decision) return "undecided";
  return decision.choice === "relabel" ? `relabel to ${choiceNames.get(decision.label) ?? decision.label}` : decision.choice;
}

// Text that a spreadsheet could take for a formula gets an apostrophe in front, as in influence.csv.
const formula = /(^|;)(?=[ \n\u00a0\u200b-\u200f\u2060\ufeff]*['=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20])/g;
const guarded = (text) => text.replace(formula, "$1'");

const guardedLabel = (text) => (/^-\d+(\.\d+)?(e[-+]?\d+)?$/.test(text) ? text : guarded(text));

const cell = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);

function decisionsAsCsv() {
  const lines = ["sample_id,decision,label,was,run"];
  const rows = [...decisions.keys()].map((id) => rowOfId.get(id)).sort((one, other) => one - other);
  for (const row of rows) {
    const { choice, label } = decisions.get(idOf(row));
    const id = data.textIds ? guarded(idOf(row)) : idOf(row);
    lines.push([id, choice, guardedLabel(label), guardedLabel(labelInDataset(row)), data.run].map(cell).join(","));
  }
  return `${lines.join("\n")}\n`;
}

function download() {
  const address = URL.createObjectURL(new Blob([decisionsAsCsv()], { type: "text/csv" }));
  const link = make("a", { href: address, download: "decisions.csv", hidden: true });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
  say(`decisions.csv with ${plural(decisions.size, "decision")} downloaded`);
}

function showDecisionCounts() {
  const numbers = { drop: 0, relabel: 0, keep: 0 };
  for (const { choice } of decisions.values()) numbers[choice] += 1;
  const words = Object.entries(numbers).map(([choice, number]) => `${count(number)} ${choice}`);
  byId("decided-counts").textContent = decisions.size ? words.join(" · ") : "No decisions yet";
  byId("storage").textContent = isRemembered ? "" : "This browser remembers nothing here: download before you leave.";
  for (const id of ["download", "forget"]) byId(id).disabled = decisions.size === 0;
  byId("undo").disabled = history.length === 0;
}
