// The rows of the ranking, by row number: 0 is the most harmful sample.

const data = JSON.parse(byId("data").textContent);
const numRows = data.ids.length;
const isMax = data.objective.isMax;

const fieldNamed = (name) => data.fields.find((field) => field.name === name);
const labelField = fieldNamed("label");
const predictionField = fieldNamed("prediction");
const groupings = data.fields.filter((field) => field.values !== null);
const hasSamples = Object.keys(data.samples).length > 0;

const idOf = (row) => String(data.ids[row]);
const rowOfId = new Map(data.ids.map((id, row) => [String(id), row]));
const sampleOf = (row) => data.samples[row];
const rankOf = (row) => (row < data.skipped.after ? row + 1 : row + 1 + data.skipped.count);

const effectOf = (row) => (data.influence[row] < 0 ? "harmful" : data.influence[row] > 0 ? "helpful" : "none");

function nameIn(field, row) {
  if (!field) return undefined;
  if (field.values === null) return field.texts[row] ?? undefined;
  return field.values[field.codes[row]]?.name;
}

const labelOf = (row) => sampleOf(row)?.label ?? nameIn(labelField, row);
const predictionOf = (row) => sampleOf(row)?.prediction ?? nameIn(predictionField, row);
const lossOf = (row) => sampleOf(row)?.loss ?? data.loss?.[row] ?? undefined;

// Whether the model predicts another class: true, false, or undefined where that is not known.
function disagreesAt(row) {
  const seen = sampleOf(row)?.disagrees;
  if (seen !== undefined) return seen;
  return { y: true, n: false }[data.disagrees?.[row]];
}

// The label as the dataset has it, as text; empty where only the loss's is known.
function labelInDataset(row) {
  const seen = sampleOf(row)?.labelText;
  if (seen !== undefined) return seen;
  if (!data.labelsAreOfDataset || !labelField?.values) return "";
  return labelField.values[labelField.codes[row]]?.text ?? "";
}

const choiceNames = new Map(data.choices.map((choice) => [choice.text, choice.name]));

const titles = { label: "class", prediction: "predicted class" };
const titleOf = (field) => titles[field.name] ?? field.name;

// What is remembered between visits; a page in a frame may not remember anything.
const memory = {
  read(name) {
    try {
      return localStorage.getItem(name);
    } catch {
      return null;
    }
  },
  write(name, text) {
    try {
      localStorage.setItem(name, text);
      return true;
    } catch {
      return false;
    }
  },
};
