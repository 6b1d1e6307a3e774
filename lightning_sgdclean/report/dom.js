// Elements made from plain values. Nothing from the data is ever parsed as HTML.

const byId = (id) => document.getElementById(id);

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (typeof value === "boolean" && !/^(aria|data)-/.test(name)) node.toggleAttribute(name, value);
    else node.setAttribute(name, String(value));
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const make = (tag, attributes = {}, ...children) => filled(document.createElement(tag), attributes, children);

const drawn = (tag, attributes = {}, ...children) =>
  filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const count = (number) => number.toLocaleString("en-US");

const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;

// Three digits, with a real minus sign, and a sign in front where asked for.
function digits(number, withSign = false) {
  if (number === 0) return "0";
  const size = Math.abs(number);
  let text;
  if (size >= 1e6 || size < 1e-4) {
    const [mantissa, power] = size.toExponential(2).split("e");
    text = `${mantissa}e${power.replace("-", "−").replace("+", "")}`;
  } else {
    text = size >= 1000 ? count(Math.round(size)) : String(Number(size.toPrecision(3)));
  }
  return (number < 0 ? "−" : withSign ? "+" : "") + text;
}

const percent = (share) => `${Math.round(100 * share)}%`;

function say(text) {
  byId("said").textContent = text;
}
