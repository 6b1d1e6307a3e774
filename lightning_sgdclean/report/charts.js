// The two charts, drawn for the width that they have, and drawn again when it changes.

const HEIGHT = 168;
const MARGIN = { right: 12, top: 8, bottom: 34 };

function niceTicks(low, high, wanted) {
  const rough = (high - low) / wanted || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  const ticks = [];
  for (let i = Math.ceil(low / step); i <= Math.floor(high / step); i++) ticks.push(i * step);
  return ticks;
}

function compact(number) {
  const size = Math.abs(number);
  if (size >= 1e6) return `${digits(number / 1e6)}M`;
  return size >= 1e4 ? `${digits(number / 1e3)}k` : digits(number);
}

// Room for the longest number beside the chart.
const leftOf = (ticks) => 16 + 6.6 * Math.max(...ticks.map((tick) => compact(tick).length));

// Axes, as far as they can be shared: a grid of y ticks, marks along x, a name below.
function frame(width, left, label, x, y, xTicks, yTicks, name) {
  const bottom = HEIGHT - MARGIN.bottom;
  const chart = drawn("svg", { width, height: HEIGHT, role: "img", "aria-label": label });
  for (const tick of yTicks) {
    chart.append(
      drawn("line", { class: "grid", x1: left, x2: width - MARGIN.right, y1: y(tick), y2: y(tick) }),
      drawn("text", { class: "tick", x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, compact(tick)),
    );
  }
  for (const tick of xTicks) {
    const anchor = x(tick) > width - 40 ? "end" : x(tick) < left + 20 ? "start" : "middle";
    chart.append(drawn("text", { class: "tick", x: x(tick), y: bottom + 14, "text-anchor": anchor }, compact(tick)));
  }
  const middle = (left + width - MARGIN.right) / 2;
  chart.append(drawn("text", { class: "axis", x: middle, y: HEIGHT - 4, "text-anchor": "middle" }, name));
  return chart;
}

const nothing = () => make("p", { class: "aside" }, data.num ? "All influences are 0." : "There are no samples.");

function histogramChart(width, marked) {
  const { edges, counts, stretch, ticks, zeros } = data.histogram;
  const bend = stretch ? (value) => Math.asinh(value / stretch) : (value) => value;
  const [low, high] = [bend(edges[0]), bend(edges.at(-1))];
  const most = Math.max(...counts, 1);
  const yTicks = niceTicks(0, most, 4).filter(Number.isInteger);
  const left = leftOf(yTicks);
  const inner = width - left - MARGIN.right;
  const bottom = HEIGHT - MARGIN.bottom;
  const x = (value) => left + ((bend(value) - low) / (high - low)) * inner;
  const y = (value) => bottom - (value / most) * (bottom - MARGIN.top);
  const xTicks = stretch ? ticks : niceTicks(low, high, width < 420 ? 3 : 6);
  const { harmful, helpful } = data.counts;
  const label = `Histogram. ${count(harmful)} samples are harmful, ${count(helpful)} helpful, ${count(zeros)} exactly 0; `
    + `influences from ${digits(data.influence[0])} to ${digits(data.influence.at(-1))}.`;
  const name = `influence on ${data.objective.name}${stretch ? " (logarithmic away from 0)" : ""}`;
  const chart = frame(width, left, label, x, y, xTicks, yTicks, name);
  counts.forEach((number, i) => {
    if (!number) return;
    const [start, end] = [x(edges[i]), x(edges[i + 1])];
    const top = Math.min(y(number), bottom - 1.5);
    const bar = drawn("rect", {
      class: edges[i + 1] <= 0 ? "bar harmful" : "bar helpful",
      x: start + 0.5,
      width: Math.max(end - start - 1, 1),
      y: top,
      height: bottom - top,
    });
    bar.append(drawn("title", {}, `${plural(number, "sample")} from ${digits(edges[i])} to ${digits(edges[i + 1])}`));
    chart.append(bar);
  });
  chart.append(drawn("line", { class: "zero", x1: x(0), x2: x(0), y1: MARGIN.top, y2: bottom }));
  if (marked !== null) {
    const place = x(data.influence[marked]);
    chart.append(drawn("path", { class: "marker", d: `M${place},${bottom} l-5,-9 h10 z` }));
  }
  return chart;
}

function sumChart(width, marked) {
  const { ranks, sums, harmful } = data.runningSum;
  const [low, high] = [Math.min(...sums), Math.max(...sums)];
  const yTicks = niceTicks(low, high, 5);
  const left = leftOf(yTicks);
  const inner = width - left - MARGIN.right;
  const bottom = HEIGHT - MARGIN.bottom;
  const x = (rank) => left + (rank / data.num) * inner;
  const y = (sum) => bottom - ((sum - low) / (high - low || 1)) * (bottom - MARGIN.top);
  const turn = ranks.indexOf(harmful);
  const label = `Running sum. All ${count(harmful)} harmful samples together: ${digits(sums[turn])}; all samples: ${digits(sums.at(-1))}.`;
  const xTicks = niceTicks(0, data.num, width < 420 ? 3 : 6).filter(Number.isInteger);
  const chart = frame(width, left, label, x, y, xTicks, yTicks, "samples, from the most harmful on");
  const path = (from, to) =>
    ranks.slice(from, to + 1).map((rank, i) => `${i ? "L" : "M"}${x(rank)},${y(sums[from + i])}`).join("");
  chart.append(
    drawn("line", { class: "zero", x1: left, x2: width - MARGIN.right, y1: y(0), y2: y(0) }),
    drawn("path", { class: "line harmful", d: path(0, turn) }),
    drawn("path", { class: "line helpful", d: path(turn, ranks.length - 1) }),
  );
  if (marked !== null) {
    const rank = rankOf(marked);
    const after = Math.max(1, ranks.findIndex((other) => other >= rank));
    const share = (rank - ranks[after - 1]) / (ranks[after] - ranks[after - 1]);
    const height = y(sums[after - 1] + share * (sums[after] - sums[after - 1]));
    chart.append(drawn("circle", { class: "marker", cx: x(rank), cy: height, r: 4.5 }));
  }
  return chart;
}

function drawCharts(marked) {
  const charts = [["histogram", data.histogram, histogramChart], ["sum", data.runningSum, sumChart]];
  for (const [id, content, draw] of charts) {
    const host = byId(id);
    host.replaceChildren(content ? draw(Math.max(host.clientWidth, 240), marked) : nothing());
  }
}
