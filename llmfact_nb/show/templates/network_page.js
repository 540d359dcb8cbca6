"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);
const state = { network: 0, alpha: data.own.at, own: true, tail: data.own.tail, text: 0, token: -1 };
const number = n => n.toLocaleString("en");
const share = s => (100 * s).toPrecision(s >= 0.1 ? 3 : 2) + " %";
const oneLine = text => text.replace(/\r?\n|\r/g, "↵").replace(/\t/g, "⇥");

// Elements. Children that are strings become text, never markup.
function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
const make = (tag, attributes = {}, ...children) => build(document.createElement(tag), attributes, children);
const draw = (tag, attributes = {}, ...children) => build(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

// Units come as steps from one unit number to the next.
const starts = [0];
for (const width of data.widths) starts.push(starts.at(-1) + width);
for (const network of data.networks) {
  let unit = 0, layer = 0;
  network.units = network.steps.map((step, i) => {
    unit += step;
    while (unit >= starts[layer + 1]) layer++;
    return { layer, unit: unit - starts[layer], flat: unit, z: network.z[i] / 1000 };
  });
}
const threshold = () => state.own ? data.own.text : state.alpha.toFixed(1);
const passes = u => (state.tail === "both" ? Math.abs(u.z) : u.z) >= state.alpha - 1e-9;

function perLayer(network) {
  const counts = data.widths.map(() => 0);
  for (const u of network.units) if (passes(u)) counts[u.layer]++;
  return counts;
}

function stability(network) {
  return network.stability === null ? "stability not known" : "stability " + network.stability.toFixed(2);
}

// The list of networks: radio buttons, so that arrow keys work as everywhere.
function showList() {
  const order = data.networks.map((_, i) => i), by = at("order").value;
  const units = data.networks.map(n => n.units.filter(passes).length);
  if (by === "stability") order.sort((a, b) => (data.networks[b].stability ?? -1) - (data.networks[a].stability ?? -1));
  if (by === "units") order.sort((a, b) => units[b] - units[a]);
  at("networks").replaceChildren(...order.map(i => {
    const network = data.networks[i], counts = perLayer(network), top = Math.max(1, ...counts), wide = 60 / counts.length;
    const input = make("input", { type: "radio", name: "network", value: i });
    input.checked = i === state.network;
    const words = [...new Set(network.strongest.filter(t => !t.sink).map(t => oneLine(t.token).trim() || "␣"))].slice(0, 4).join(" ");
    const hint = words || number(units[i]) + " units";
    const picture = draw("svg", { viewBox: "0 0 60 26", "aria-hidden": "true" }, ...counts.map((n, layer) =>
      draw("rect", { x: layer * wide, y: 26 - 25 * n / top, width: Math.max(wide - 0.5, 0.5), height: 25 * n / top })));
    const label = make("label", {}, input, make("b", {}, String(i)), make("span", { class: "hint" }, hint, make("br"), stability(network)), picture);
    label.title = hint;
    return label;
  }));
}

function showSummary() {
  const network = data.networks[state.network], counts = perLayer(network), n = counts.reduce((a, b) => a + b, 0);
  const most = counts.map((c, i) => [c, i]).filter(([c]) => c).sort((a, b) => b[0] - a[0]).slice(0, 3).map(([, i]) => data.depths[i]);
  at("name").textContent = "Network " + state.network;
  at("summary").textContent = (n ? number(n) + " of " + number(starts.at(-1)) + " units" : "No unit") + " beyond " + threshold()
    + (most.length ? ", most in layer" + (most.length > 1 ? "s " : " ") + most.join(", ") : "") + "; " + stability(network) + ".";
  const union = new Set();
  for (const other of data.networks) for (const u of other.units) if (passes(u)) union.add(u.flat);
  const above = state.own ? data.own.gaussian : data.gaussian[Math.round((state.alpha - data.floor) * 10)];
  const chance = above * (state.tail === "both" ? 2 : 1);
  at("union").textContent = "All " + data.networks.length + " networks together hold " + number(union.size) + " units (" + share(union.size / starts.at(-1))
    + ") at this threshold; as many maps of Gaussian noise would hold " + share(1 - (1 - chance) ** data.networks.length) + ".";
  at("alpha").value = state.alpha;
  at("alpha-value").textContent = threshold();
  return counts;
}

function showMap() {
  const network = data.networks[state.network], counts = showSummary(), layers = data.widths.length;
  const width = Math.max(240, at("map").parentNode.clientWidth), row = Math.max(5, Math.min(26, 420 / layers)), left = 34, right = Math.min(150, width * 0.25);
  const height = row * layers + 22, field = width - left - right - 12, top = Math.max(1, ...counts), parts = [];
  const paths = {}, dot = Math.max(1.5, field / 300);
  for (const u of network.units) {
    const x = left + field * u.unit / data.widths[u.layer];
    const kind = (u.z > 0 ? "high" : "low") + (passes(u) ? "" : " pale");
    paths[kind] = (paths[kind] ?? "") + "M" + x.toFixed(1) + " " + (u.layer * row).toFixed(1) + "h" + dot.toFixed(1) + "v" + (row - 1).toFixed(1) + "h-" + dot.toFixed(1) + "z";
  }
  data.widths.forEach((_, i) => parts.push(draw("rect", { class: "band", x: left, y: i * row, width: field, height: row - 1 })));
  for (const kind of ["low pale", "high pale", "low", "high"]) if (paths[kind]) parts.push(draw("path", { class: kind, d: paths[kind] }));
  const every = Math.ceil(14 / row), bar = left + field + 12;
  counts.forEach((n, i) => {
    if (i % every === 0) parts.push(draw("text", { x: left - 5, y: i * row + row / 2 + 4, "text-anchor": "end" }, String(data.depths[i])));
    parts.push(draw("rect", { class: "high", x: bar, y: i * row, width: Math.max(n ? 1 : 0, (right - 34) * n / top), height: row - 1 }));
    const strongest = network.units.filter(u => u.layer === i).reduce((a, u) => Math.max(a, Math.abs(u.z)), 0);
    parts.push(draw("rect", { class: "hit", x: 0, y: i * row, width, height: row },
      draw("title", {}, "layer " + data.depths[i] + ": " + n + " of " + number(data.widths[i]) + " units pass" + (strongest ? ", largest |z| " + strongest.toFixed(1) : ""))));
    if (n === top) parts.push(draw("text", { x: bar + (right - 34) + 4, y: i * row + row / 2 + 4 }, String(n)));
  });
  parts.push(draw("text", { x: left, y: height - 6 }, "layer ↓, unit →"), draw("text", { x: bar, y: height - 6 }, "units"));
  at("map").setAttribute("viewBox", "0 0 " + width + " " + height);
  at("map").setAttribute("aria-label", "Map of network " + state.network + ". " + at("summary").textContent);
  at("map").replaceChildren(...parts);
}

function showTables() {
  const network = data.networks[state.network];
  const strongest = [...network.units].sort((a, b) => Math.abs(b.z) - Math.abs(a.z)).slice(0, 8);
  at("units").tBodies[0].replaceChildren(...strongest.map(u =>
    make("tr", {}, make("th", { scope: "row" }, String(data.depths[u.layer])), make("td", { class: "number" }, String(u.unit)), make("td", { class: "number" }, u.z.toFixed(2)))));
  const near = data.networks.map((_, i) => i).filter(i => i !== state.network)
    .sort((a, b) => Math.abs(network.near[b]) - Math.abs(network.near[a])).slice(0, 5);
  at("near").tBodies[0].replaceChildren(...near.map(i => {
    const button = make("button", { type: "button", "aria-label": "Show network " + i }, String(i));
    button.onclick = () => choose(i);
    const courses = network.together === null ? [] : [make("td", { class: "number" }, network.together[i].toFixed(2))];
    return make("tr", {}, make("th", { scope: "row" }, button), make("td", { class: "number" }, network.near[i].toFixed(2)), ...courses);
  }));
  at("tokens").tBodies[0].replaceChildren(...network.strongest.map(t => {
    const place = data.texts.findIndex(text => t.row >= text.row && t.row < text.row + text.tokens.length);
    const button = make("button", { type: "button" }, make("bdi", {}, oneLine(t.token)));
    button.disabled = place < 0;
    button.title = place < 0 ? "in text " + t.text + ", which this page does not hold" : "show it in text " + t.text;
    button.onclick = () => { state.text = place; showText(); point(t.row - data.texts[place].row, true); };
    const mark = t.sink ? [make("span", { class: "badge" }, "sink: artefact"), " "] : [];
    const words = make("td", { class: "context" }, make("bdi", {}, oneLine(t.before)), button, make("bdi", {}, oneLine(t.after)));
    return make("tr", {}, words, make("td", { class: "number" }, ...mark, t.z.toFixed(1)));
  }));
}

const activity = () => data.texts[state.text].courses[state.network].map(v => v / 10);

function showText() {
  if (!data.texts.length) return;
  const text = data.texts[state.text], course = activity(), sinks = new Set(text.sinks);
  at("text").value = state.text;
  at("words").setAttribute("aria-label", "Text " + text.text + ", coloured by the activity of network " + state.network);
  at("words").replaceChildren(...text.tokens.map((token, i) => {
    const span = make("span", sinks.has(i) ? { class: "sink" } : {}, token.replace(/\r?\n|\r/g, "↵\n"));
    const strength = Math.min(Math.abs(course[i]) / 4, 1) * 0.75;
    if (strength > 0.09) span.style.backgroundColor = "rgba(" + (course[i] > 0 ? "213,94,0," : "0,114,178,") + strength.toFixed(2) + ")";
    span.title = course[i].toFixed(1) + " SD" + (sinks.has(i) ? ", sink token" : "");
    return span;
  }));
  if (text.cut) at("words").append(make("em", {}, " (" + number(text.cut) + " more tokens are not on this page)"));
  showCourse();
  at("readout").textContent = "Network " + state.network + " over text " + text.text + ": " + number(text.tokens.length) + " tokens.";
  state.token = -1;
}

function showCourse() {
  const course = activity(), text = data.texts[state.text], sinks = new Set(text.sinks), width = Math.max(240, at("course").parentNode.clientWidth), height = 84;
  const ordinary = course.filter((_, i) => !sinks.has(i)), low = Math.min(-1, ...ordinary), high = Math.max(1, ...ordinary);
  const x = i => 34 + (width - 40) * (i + 0.5) / course.length, y = v => 6 + (height - 12) * (high - Math.max(low, Math.min(high, v))) / (high - low);
  at("course").setAttribute("viewBox", "0 0 " + width + " " + height);
  at("course").setAttribute("aria-label", "Time course of network " + state.network + " over text " + text.text + ", from " + low.toFixed(1) + " to " + high.toFixed(1) + " standard deviations");
  at("course").replaceChildren(
    draw("path", { class: "axis", d: "M34 " + y(0) + "H" + (width - 6) }),
    draw("text", { x: 29, y: y(high) + 8, "text-anchor": "end" }, high.toFixed(1)), draw("text", { x: 29, y: y(low), "text-anchor": "end" }, low.toFixed(1)),
    draw("path", { class: "curve", d: course.map((v, i) => (i ? "L" : "M") + x(i).toFixed(1) + " " + y(v).toFixed(1)).join("") }),
    draw("path", { class: "cursor", d: "" }));
  at("course").onpointermove = at("course").onclick = event => {
    const box = at("course").getBoundingClientRect(), along = (event.clientX - box.left) * width / box.width;
    point(Math.floor((along - 34) / (width - 40) * course.length), event.type === "click");
  };
  at("course").dataset.width = width;
}

// One token is looked at: it is framed, its value is read out, and the cursor stands on it.
function point(i, scroll) {
  const text = data.texts[state.text], words = at("words"), course = activity();
  i = Math.max(0, Math.min(text.tokens.length - 1, i));
  words.children[state.token]?.classList.remove("now");
  const span = words.children[state.token = i];
  span.classList.add("now");
  if (scroll) words.scrollTop = span.offsetTop - words.clientHeight / 2;
  const x = 34 + (at("course").dataset.width - 40) * (i + 0.5) / course.length;
  at("course").lastChild.setAttribute("d", "M" + x.toFixed(1) + " 2V82");
  at("readout").textContent = "token " + i + " “" + oneLine(text.tokens[i]) + "”: " + course[i].toFixed(1) + " SD" + (text.sinks.includes(i) ? ", a sink token: artefact" : "");
}

function choose(i) {
  state.network = (i + data.networks.length) % data.networks.length;
  const input = document.querySelector('input[name="network"][value="' + state.network + '"]');
  input.checked = true;
  const list = input.closest("aside"), around = list.getBoundingClientRect(), box = input.parentNode.getBoundingClientRect();
  if (box.top < around.top || box.bottom > around.bottom) list.scrollTop += box.top - around.top - around.height / 2;
  showMap();
  showTables();
  const token = state.token;
  showText();
  if (token >= 0) point(token, false);
}

function rethreshold(alpha, tail, own = false) {
  state.own = own;
  state.alpha = own ? data.own.at : Math.max(data.floor, Math.min(data.ceiling, Math.round(alpha * 10) / 10));
  state.tail = at("tail").value = tail;
  showList();
  showMap();
}

function begin() {
  at("page").hidden = false;
  at("alpha").min = data.floor;
  at("alpha").max = data.ceiling;
  at("tail").value = state.tail;
  at("own").textContent = "back to " + data.own.text;
  at("own").title = data.own.says;
  at("reading").hidden = at("r-courses").hidden = !data.texts.length;
  at("text").replaceChildren(...data.texts.map((text, i) => make("option", { value: i }, text.text + ": " + oneLine(text.tokens.slice(0, 12).join("")).trim().slice(0, 40))));
  at("order").onchange = showList;
  at("networks").onchange = event => choose(Number(event.target.value));
  at("previous").onclick = () => choose(state.network - 1);
  at("next").onclick = () => choose(state.network + 1);
  at("alpha").oninput = event => rethreshold(Number(event.target.value), state.tail);
  at("tail").onchange = event => rethreshold(state.alpha, event.target.value, state.own);
  at("own").onclick = () => rethreshold(data.own.at, data.own.tail, true);
  at("text").onchange = event => { state.text = Number(event.target.value); showText(); };
  at("words").onpointerover = event => { const i = [...at("words").children].indexOf(event.target); if (i >= 0 && event.target.tagName === "SPAN") point(i, false); };
  at("words").onkeydown = event => {
    const moves = { ArrowRight: state.token + 1, ArrowDown: state.token + 1, ArrowLeft: state.token - 1, ArrowUp: state.token - 1, Home: 0, End: Infinity };
    if (event.key in moves) { event.preventDefault(); point(moves[event.key], true); }
  };
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; showMap(); if (data.texts.length) showCourse(); } });
  showList();
  const filled = Math.max(0, data.networks.findIndex(network => network.units.some(passes)));
  choose(Number(location.hash.match(/^#network-(\d+)$/)?.[1] ?? filled) % data.networks.length);
}
begin();
