// The live page: asks for what was appended to the run folder, and draws it. Text of models only ever becomes textContent.
"use strict";

const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];
const CARDS = [
  ["Loss and divergences", ["loss", "forward_kl_nats", "reverse_kl_nats", "cross_entropy_nats"]],
  ["Reward", ["reward", "zero_signal_frac"]],
  ["Entropy, nats", ["student_entropy_nats", "teacher_entropy_nats"]],
  ["Response length, tokens", ["response_tokens", "horizon_tokens"]],
  ["Truncated and repetitive, share", ["truncated_frac", "repetition_frac"]],
  ["Gradient norm", ["grad_norm"]],
  ["Sampler gap, nats", ["sampler_gap_nats"]],
  ["Seconds a step", ["step_s", "rollout_s", "score_s", "train_s", "sync_s"]],
  ["Tokens a second", ["tokens_per_s"]],
];
const WHAT = {train: "#0072b2", sync: "#e69f00", evaluate: "#cc79a7", decide: "#555555", busy: "#009e73"};
const ROWS = ["trainer", "student", "teacher", "evaluation"];
const byId = (id) => document.getElementById(id);

let run = null, state = null, log = null;
let steps, samples, spans, events, offsets;
forget();

function forget() {
  steps = new Map(); samples = []; spans = []; events = [];
  offsets = {};  // of each file, by its name; a role may begin one of events at any time
}

function make(tag, text, attributes = {}) {
  const svg = ["svg", "path", "line", "rect", "text", "g", "circle", "title"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

// What is not finite comes as null.
const fixed = (x) => x === null ? "-" : x.toFixed(3);
const short = (x) => x === null ? "-" : x === 0 ? "0" : Math.abs(x) >= 1000 ? x.toFixed(0) : Math.abs(x) < 1e-3 ? x.toExponential(1) : String(+x.toPrecision(3));

function clock(seconds) {
  const s = Math.round(seconds), h = Math.floor(s / 3600), m = Math.floor(s % 3600 / 60), two = (x) => String(x).padStart(2, "0");
  return h ? `${h}:${two(m)}:${two(s % 60)}` : `${m}:${two(s % 60)}`;
}

// --- asking ----------------------------------------------------------------------------------------------------------

async function ask(path) {
  const reply = await fetch(path);
  if (!reply.ok) throw new Error(`${path}: ${reply.status}`);
  return reply.json();
}

async function look() {
  try {
    if (!run) run = await ask("run");
    const news = await ask("records?" + new URLSearchParams(offsets));
    if (news.restarted) {
      forget();
    } else {
      for (const record of news.metrics.records) steps.set(record.step, record);
      samples.push(...news.samples.records);
      spans.push(...news.timeline.records);
      for (const [name, part] of Object.entries(news)) {
        if (name.startsWith("events")) events.push(...part.records);
        offsets[name] = part.offset;
      }
      events.sort((a, b) => a.time - b.time);
      state = await ask("state");
      if (log) byId("log").textContent = (await ask("log?" + new URLSearchParams({name: log}))).text;
    }
    document.body.dataset.looked = String(steps.size);
    draw();
  } catch (error) {
    byId("status").textContent = "the page's server does not answer: " + error.message;
    byId("status").className = "failed";
  }
  setTimeout(look, 1000);
}

// --- drawing ---------------------------------------------------------------------------------------------------------

function draw() {
  if (!run || !state) return;
  drawHead();
  const tab = document.querySelector("nav .chosen").dataset.tab;
  if (tab === "curves") drawCurves();
  if (tab === "timeline") drawTimeline();
  if (tab === "samples") drawSamples();
  if (tab === "processes") drawProcesses();
}

function drawHead() {
  const config = run.config, last = Math.max(0, ...steps.keys());
  document.title = `${config.name} ${last}/${config.num_steps}`;
  byId("name").textContent = config.name;
  const word = state.finished ? "finished" : state.failure ? "failed" : state.processes.length || state.job ? "under way" : "not running here";
  byId("status").textContent = word;
  byId("status").className = word;
  byId("done").style.width = `${100 * last / config.num_steps}%`;
  const facts = [`step ${last} of ${config.num_steps}`];
  const recent = [...steps.values()].slice(-20).map((record) => record.step_s).sort((a, b) => a - b);
  if (recent.length && !state.finished) facts.push(`about ${clock((config.num_steps - last) * recent[recent.length >> 1])} left`);
  const measured = state.evaluations[state.evaluations.length - 1];
  if (measured) facts.push(`Avg@${measured.k} ${fixed(measured.avg_at_k)} at step ${measured.step} (start ${fixed(state.evaluations[0].avg_at_k)})`);
  if (events.length && !state.finished) facts.push(`${events[events.length - 1].role}: ${events[events.length - 1].text}`);
  byId("facts").textContent = facts.join(" · ");
  byId("failure").hidden = !state.failure;
  byId("failure").textContent = state.failure;
}

function drawCurves() {
  const all = [...steps.values()].sort((a, b) => a.step - b.step);
  const cards = CARDS.map(([title, names]) => [title, names.map((name) => [name, all.filter((r) => name in r).map((r) => [r.step, r[name]])])]);
  const accuracy = (found) => [["Avg@k", found.map((e) => [e.step, e.avg_at_k])], ["Pass@k", found.map((e) => [e.step, e.pass_at_k])]];
  const further = Object.entries(state.further).map(([name, found]) => [`Accuracy on ${name}`, accuracy(found)]);
  cards.unshift(["Held-out accuracy", accuracy(state.evaluations)], ...further);
  const shown = cards.map(([title, series]) => [title, series.filter(([, points]) => points.length)]).filter(([, series]) => series.length);
  if (!shown.length) {
    byId("cards").replaceChildren(make("p", "Nothing was measured yet.", {class: "soft"}));
    return;
  }
  byId("cards").replaceChildren(...shown.map(([title, series]) => card(title, series)));
}

function card(title, series) {
  const box = make("div", undefined, {class: "card"});
  box.append(make("h3", title));
  const legend = make("div", undefined, {class: "legend"});
  series.forEach(([name, points], i) => {
    const item = make("span"), swatch = make("span", undefined, {class: "swatch"});
    swatch.style.background = COLOURS[i];
    const meaning = run.metrics.find((metric) => metric.name === name);
    if (meaning) item.title = `${meaning.meaning}\nGood: ${meaning.good}\nBad: ${meaning.bad}`;
    item.append(swatch, name.replace(/_(nats|frac|tokens|s)$/, "").replace(/_/g, " ").replace("kl", "KL") + " ", make("b", short(points[points.length - 1][1])));
    legend.append(item);
  });
  box.append(legend, curves(series, legend));
  return box;
}

function curves(series) {
  const W = 480, H = 176, left = 44, bottom = 20, top = 6;
  const xs = series.flatMap(([, points]) => points.map((p) => p[0])), ys = series.flatMap(([, points]) => points.map((p) => p[1])).filter(Number.isFinite);
  const x0 = Math.min(...xs), x1 = Math.max(...xs, x0 + 1), low = Math.min(...ys), high = Math.max(...ys);
  const pad = (high - low || Math.abs(high) || 1) * 0.06, y0 = low >= 0 && low <= 0.4 * high ? 0 : low - pad, y1 = high + pad;
  const x = (v) => left + (v - x0) / (x1 - x0) * (W - left - 8), y = (v) => H - bottom - (v - y0) / (y1 - y0) * (H - bottom - top);
  const svg = make("svg", undefined, {viewBox: `0 0 ${W} ${H}`});
  for (const value of ticks(y0, y1, 4)) {
    svg.append(make("line", undefined, {x1: left, x2: W - 8, y1: y(value), y2: y(value), stroke: "#e6e6e6"}));
    svg.append(make("text", short(value), {x: left - 6, y: y(value) + 4, "text-anchor": "end"}));
  }
  for (const value of ticks(x0, x1, 6).filter(Number.isInteger)) {
    svg.append(make("text", String(value), {x: x(value), y: H - 5, "text-anchor": "middle"}));
  }
  series.forEach(([name, points], i) => {
    const kept = thin(points.filter((p) => Number.isFinite(p[1])));
    const path = kept.map((p, n) => `${n ? "L" : "M"}${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`).join("");
    svg.append(make("path", undefined, {d: path, fill: "none", stroke: COLOURS[i], "stroke-width": 1.6, "data-name": name}));
    if (kept.length < 30) for (const p of kept) {
      const dot = make("circle", undefined, {cx: x(p[0]), cy: y(p[1]), r: 2.4, fill: COLOURS[i]});
      dot.append(make("title", `step ${p[0]}: ${short(p[1])}`));
      svg.append(dot);
    }
  });
  return svg;
}

// Longer curves are drawn as means of equal stretches.
function thin(points, most = 300) {
  if (points.length <= most) return points;
  const size = points.length / most, kept = [];
  for (let i = 0; i < most; i++) {
    const part = points.slice(Math.floor(i * size), Math.floor((i + 1) * size));
    kept.push([part[part.length >> 1][0], part.reduce((sum, p) => sum + p[1], 0) / part.length]);
  }
  return kept;
}

function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const size = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw), out = [];
  for (let v = Math.ceil(low / size) * size; v <= high + size * 1e-9; v += size) out.push(+v.toPrecision(12));
  return out;
}

function drawTimeline() {
  const seconds = Number(byId("window").value), last = spans.reduce((most, span) => Math.max(most, span.ended), 0);
  const end = state.finished || state.failure || !state.processes.length ? last : Math.max(last, state.time), begin = end - seconds;
  const shown = spans.filter((span) => span.ended > begin && WHAT[span.what]), rows = ROWS.filter((who) => spans.some((span) => span.who === who));
  if (!rows.length) {
    byId("gantt").replaceChildren(make("p", "Nobody's time was recorded yet.", {class: "soft"}));
  } else {
    const W = 1200, left = 70, row = 34, H = 24 + row * rows.length + 22, x = (t) => left + (t - begin) / seconds * (W - left - 4);
    const svg = make("svg", undefined, {viewBox: `0 0 ${W} ${H}`});
    Object.entries(WHAT).forEach(([what, colour], i) => {
      svg.append(make("rect", undefined, {x: left + i * 90, y: 2, width: 11, height: 11, fill: colour, rx: 2}));
      svg.append(make("text", what, {x: left + i * 90 + 16, y: 12}));
    });
    rows.forEach((who, i) => {
      svg.append(make("text", who, {x: left - 8, y: 24 + i * row + row / 2 + 4, "text-anchor": "end"}));
      svg.append(make("line", undefined, {x1: left, x2: W - 4, y1: 24 + (i + 1) * row, y2: 24 + (i + 1) * row, stroke: "#e3e6ea"}));
    });
    for (const span of shown) {
      const from = Math.max(span.began, begin), bar = make("rect", undefined, {
        x: x(from), y: 24 + rows.indexOf(span.who) * row + 5, width: Math.max(0.6, x(span.ended) - x(from)), height: row - 10, fill: WHAT[span.what]});
      bar.append(make("title", `${span.who}: ${span.what}, ${(span.ended - span.began).toFixed(2)} s`));
      svg.append(bar);
    }
    for (let ago = 0; ago < seconds; ago += seconds / 6) {
      svg.append(make("text", ago ? `-${clock(ago)}` : "now", {x: x(end - ago), y: H - 4, "text-anchor": ago ? "middle" : "end"}));
    }
    byId("gantt").replaceChildren(svg);
  }
  const share = (who, what) => shown.filter((s) => s.who === who && s.what === what).reduce((sum, s) => sum + s.ended - Math.max(s.began, begin), 0);
  const whole = share("trainer", "train") + spans.filter((s) => s.who === "trainer" && s.what === "wait" && s.ended > begin).reduce((sum, s) => sum + s.ended - Math.max(s.began, begin), 0);
  byId("shares").textContent = whole ? `In this window the trainer trained ${Math.round(100 * share("trainer", "train") / whole)}% of the time that steps took, and waited for samples the rest.` : "";
  byId("events").replaceChildren(...events.slice(-40).reverse().map((event) => {
    const line = make("tr"), text = event.evaluation ? `evaluated ${event.set || "heldout"}: Avg@${event.evaluation.k} ${short(event.evaluation.avg_at_k)}` : event.text;
    line.append(make("td", new Date(1000 * event.time).toLocaleTimeString("en-GB"), {class: "soft"}), make("td", event.role), make("td", text));
    return line;
  }));
}

function drawSamples() {
  const numbers = [...new Set(samples.map((sample) => sample.step))].sort((a, b) => b - a), select = byId("sample-step");
  if (select.options.length !== numbers.length) {
    const chosen = select.value, latest = !select.options.length || chosen === select.options[0].value;
    select.replaceChildren(...numbers.map((number) => make("option", String(number))));
    if (!latest) select.value = chosen;
  }
  const wanted = select.value, key = wanted + "/" + samples.length;
  if (byId("sample-list").dataset.key === key) return;  // what somebody points at stays
  byId("sample-list").dataset.key = key;
  byId("sample-list").replaceChildren(...samples.filter((sample) => String(sample.step) === wanted).map(sampleBox));
}

function sampleBox(sample) {
  const box = make("div", undefined, {class: "sample"});
  const ended = sample.stop_reason === "length" ? "cut at the horizon" : "ended by itself";
  const facts = [`step ${sample.step}`, sample.id, `written by ${sample.written_by}`, ended, `reference answer ${sample.answer}`];
  if ("reward" in sample) facts.push(`reward ${short(sample.reward)}`);
  if (sample.gap_nats) facts.push(`mean gap ${short(sample.gap_nats.reduce((a, b) => a + b, 0) / Math.max(1, sample.gap_nats.length))} nats`);
  const text = make("div", undefined, {class: "text"});
  if (sample.pieces) {
    sample.pieces.forEach((piece, i) => {
      const token = make("span", piece), gap = sample.gap_nats[i], strength = Math.min(1, Math.abs(gap) / 3);
      token.title = `${gap} nats`;
      if (strength > 0.02) token.style.background = gap > 0 ? `rgb(213 94 0 / ${strength * 65}%)` : `rgb(0 114 178 / ${strength * 60}%)`;
      text.append(token);
    });
  } else {
    text.textContent = sample.response;
  }
  box.append(make("p", facts.join(" · "), {class: "soft"}), make("div", sample.prompt, {class: "text prompt"}), text);
  return box;
}

function drawProcesses() {
  byId("process-rows").replaceChildren(...state.processes.map((one) => {
    const line = make("tr");
    line.append(make("td", one.name), make("td", String(one.pid)), make("td", one.cpu_s.toFixed(0)), make("td", one.memory_gib.toFixed(2)));
    return line;
  }));
  byId("elsewhere").textContent = state.job ? `Slurm job ${state.job.job_id} on ${state.job.cluster}: its processes are on the job's nodes; their logs are below.`
    : state.processes.length ? "" : "No process of this run on this machine.";
  byId("log-names").replaceChildren(...state.logs.map((one) => {
    const button = make("button", `${one.name} (${one.bytes < 1e4 ? one.bytes + " B" : Math.round(one.bytes / 1024) + " KiB"})`, {class: one.name === log ? "chosen" : ""});
    button.addEventListener("click", async () => {
      log = one.name;
      byId("log").textContent = (await ask("log?" + new URLSearchParams({name: log}))).text;
      byId("log").scrollTop = byId("log").scrollHeight;
      drawProcesses();
    });
    return button;
  }));
}

function show(tab) {
  for (const one of document.querySelectorAll("nav button")) {
    one.classList.toggle("chosen", one.dataset.tab === tab);
    byId(one.dataset.tab).hidden = one.dataset.tab !== tab;
  }
  draw();
}

for (const button of document.querySelectorAll("nav button")) button.addEventListener("click", () => { location.hash = button.dataset.tab; });
addEventListener("hashchange", () => show(location.hash.slice(1) || "curves"));
byId("window").addEventListener("change", draw);
byId("sample-step").addEventListener("change", draw);
if (location.hash) show(location.hash.slice(1));
look();
