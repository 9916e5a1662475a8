"use strict";
// All data of the worker is inserted as text, never as HTML: types, ids and reasons can be hostile.

const INTERVAL = 2000, TIMEOUT = 5000; // milliseconds
const MAX_NEWEST = 5; // failures shown without opening the others
const SPAN = 600, HEIGHT = 100; // of a chart: seconds and units
const SVG = "http://www.w3.org/2000/svg";
const CHARTS = [
  { name: "sent", title: "Sent per second" },
  { name: "ignored", title: "Ignored per second" },
  { name: "failed", title: "Failed per second" },
  { name: "age", title: "Oldest in flight", series: ["oldest", "age"], unit: "s", note: "dotted: mean age when sent" },
];
const OUTCOMES = {
  sent: "Sent", ignored: "Ignored", retried: "Retried", dead_lettered: "Dead letters", returned: "Returned",
};
const WHEN = { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit", second: "2-digit" };
const FATES = { retried: "returned to the queue", dead_lettered: "dead letter", held: "held, will be retried" };

const byId = (id) => document.getElementById(id);
const number = (value, digits = 0) => value.toLocaleString("en", { maximumFractionDigits: digits });
const rate = (value) => number(value, value < 10 ? 1 : 0);
const known = (value, show) => (value === null || value === undefined ? "–" : show(value));

function seconds(value) {
  if (value < 10) return `${number(value, 1)} s`;
  if (value < 120) return `${number(value)} s`;
  if (value < 7200) return `${number(value / 60)} min`;
  return value < 172800 ? `${number(value / 3600)} h` : `${number(value / 86400)} days`;
}

function element(tag, content, className) {
  const created = document.createElement(tag);
  if (className) created.className = className;
  if (Array.isArray(content)) created.append(...content);
  else if (content !== undefined) created.textContent = content;
  return created;
}

function set(id, text) {
  const found = byId(id);
  if (found.textContent !== text) found.textContent = text; // an unchanged text must not be read aloud again
}

const shown = new Map();

// Replaces the content of an element only if its data has changed: the reader may have selected text in it.
function fill(id, data, make) {
  const current = JSON.stringify(data);
  if (shown.get(id) === current) return;
  shown.set(id, current);
  byId(id).replaceChildren(...make(data));
}

function entry(name, value, className, more) {
  const description = element("dd", value, className);
  if (more) description.append(" ", element("small", more));
  return element("div", [element("dt", name), description]);
}

function showState({ state, worker, now }) {
  byId("condition").dataset.severity = state.severity;
  set("state", state.state);
  fill("reasons", state.reasons, (reasons) => reasons.map((reason) => element("li", reason)));
  set("advice", state.advice);
  set("version", worker.version);
  const since = seconds((Date.parse(now) - Date.parse(worker.started)) / 1000);
  set("worker", `${worker.host} · process ${worker.process} · ${worker.queue} · up ${since}`);
  document.title = `${state.state} · klaviyo-worker`;
}

function showFigures({ messages }) {
  const unknown = (value) => (value === null ? "unknown" : "");
  fill("figures", messages, (m) => [
    entry("In flight", number(m.in_flight), "", `of ${number(m.max_in_flight)}`),
    entry("Held", number(m.held), m.held ? "worrying" : ""),
    entry("Backlog", known(m.backlog, number), "", unknown(m.backlog)),
    entry("Dead letters", known(m.dead_letters, number), m.dead_letters ? "alarming" : "", unknown(m.dead_letters)),
  ]);
}

// Returns an SVG path through the known points. If a step is missing, a new line starts after it.
function path(ago, values, max, step, closed) {
  let drawn = "", before = null, first = null;
  const x = (seconds) => (SPAN - seconds).toFixed(1);
  const close = () => (closed && before !== null ? `L${x(before)},${HEIGHT}L${x(first)},${HEIGHT}Z` : "");
  values.forEach((value, i) => {
    if (value === null) return;
    const joins = before !== null && before - ago[i] < 2.5 * step;
    if (!joins) { drawn += close(); first = ago[i]; }
    drawn += `${joins ? "L" : "M"}${x(ago[i])},${(HEIGHT - (HEIGHT * value) / max).toFixed(1)}`;
    before = ago[i];
  });
  return drawn + close();
}

function chart({ name, title, series = [name], unit, note }, history) {
  const show = unit === "s" ? seconds : rate;
  const lines = series.map((which) => history[which]);
  const highest = Math.max(0, ...lines.flat().filter((value) => value !== null));
  const last = lines[0].at(-1) ?? null;
  const created = element("figure", undefined, "chart");
  created.dataset.name = highest ? name : "none";
  const drawing = document.createElementNS(SVG, "svg");
  const label = `${title}: now ${known(last, show)}, at most ${show(highest)} in ten minutes`;
  const attributes = { viewBox: `0 0 ${SPAN} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": label };
  for (const [key, value] of Object.entries(attributes)) drawing.setAttribute(key, value);
  const draw = (values, className) => {
    const line = document.createElementNS(SVG, "path");
    line.setAttribute("d", path(history.ago, values, highest || 1, history.step, className === "area"));
    if (className) line.setAttribute("class", className);
    drawing.append(line);
  };
  draw(lines[0], "area");
  draw(lines[0]);
  if (lines[1]) draw(lines[1], "second");
  const value = element("dd", known(last, show), name === "failed" && last ? "alarming" : "");
  value.append(element("small", `max ${show(highest)}`));
  const scale = element("p", [element("span", "10 min ago"), element("span", "now")], "scale");
  created.append(element("dl", [element("dt", title), value]), drawing, scale);
  if (note) created.append(element("p", note, "scale"));
  return created;
}

function showCharts({ history }) {
  byId("charts").replaceChildren(...CHARTS.map((options) => chart(options, history)));
}

function showLanes({ lanes, batch }) {
  fill("lanes", lanes, (all) => Object.entries(all).map(([name, sizes]) => {
    const items = sizes.map((size) => element("li", size ? number(size) : "idle", size ? "busy" : ""));
    return element("div", [element("dt", name), element("dd", [element("ul", items)])]);
  }));
  const mean = batch === null ? "no batches" : `${number(batch, 1)} on average`;
  set("batch", `Messages in the current batch of each lane; ${mean} in the last minute.`);
}

function showServices({ services }) {
  fill("services", services, (all) => all.map(({ service, outage, requests }) => {
    const [status, className] = outage ? ["outage", "worrying"] : ["no outage", ""];
    return entry(service, status, className, `${number(requests)} requests per minute`);
  }));
}

function showExcluded({ excluded, worker }) {
  const reasons = [
    [excluded.project, `of another project than ${worker.project}`],
    [excluded.stores, "of another store"],
    [excluded.countries, "of another country"],
  ];
  const texts = reasons.filter(([count]) => count).map(([count, reason]) => `${number(count)} ${reason}`);
  set("excluded", texts.length ? `Ignored messages that this worker does not serve: ${texts.join(", ")}.` : "");
}

function showOutcomes({ outcomes }) {
  fill("outcomes", outcomes, (rows) => {
    if (!rows.length) return [element("caption", "None yet.", "quiet")];
    const columns = Object.keys(OUTCOMES).filter((o) => o === "sent" || o === "ignored" || rows.some((row) => row[o]));
    const head = ["Type", ...columns.map((column) => OUTCOMES[column])].map((title) => {
      const cell = element("th", title);
      cell.scope = "col";
      return cell;
    });
    const lines = rows.map((row) => {
      const type = element("th", row.type.split(/(?=[A-Z])/).flatMap((word) => [word, element("wbr")]));
      type.scope = "row";
      const cells = columns.map((column) => {
        const className = row[column] && column === "dead_lettered" ? "alarming" : "";
        return element("td", number(row[column]), row[column] ? className : "none");
      });
      return element("tr", [type, ...cells]);
    });
    return [element("thead", [element("tr", head)]), element("tbody", lines)];
  });
}

function limit(line) {
  const share = Math.min(line.used / Math.max(line.steady, 1), 1);
  const filled = element("span", undefined, share > 0.8 ? "worrying" : "");
  filled.style.width = `${(100 * share).toFixed(1)}%`;
  const notes = [
    `${number(line.used)} of ${number(line.steady)} a minute`,
    `${number(100 * line.burst_used)} % of the burst of ${number(line.burst)} a second`,
    `can make ${number(line.pace)} a minute now`,
  ];
  if (line.remaining !== null) notes.push(`the account has ${number(line.remaining)} left`);
  if (line.waiting) notes.push(`${number(line.waiting)} waiting`);
  return element("li", [
    element("span", line.endpoint, "name"),
    element("div", [filled], "bar"),
    element("span", notes.join(" · "), "note quiet"),
  ]);
}

function showLimits({ limits, bulk_events: { in_bulk: inBulk, reason } }) {
  fill("limits", limits, (lines) => (lines.length ? lines.map(limit) : [element("li", "No requests.", "quiet")]));
  set("bulk-events", `Events are sent ${inBulk ? "in bulk" : "individually"}: ${reason}`);
}

function failure(line) {
  const at = element("time", new Date(line.at).toLocaleString("en-GB", WHEN));
  at.dateTime = line.at;
  const times = line.times > 1 ? ` · last of ${number(line.times)}` : "";
  const fate = element("b", FATES[line.outcome], line.outcome === "held" ? "worrying" : "alarming");
  const { message_type: type, resource_type: resource, resource_id: id, message_id: message } = line;
  const parts = [type ?? "unreadable", resource, id, "· message", message].filter(Boolean);
  const texts = parts.flatMap((text) => [element("bdi", text), " "]); // isolates right-to-left text
  return element("li", [
    element("p", [at, " · ", fate, ` in ${line.stage}${times}`]),
    element("p", line.reason ?? line.error),
    element("p", [...texts, line.attempt ? `· attempt ${number(line.attempt)}` : ""], "quiet"),
  ]);
}

function showFailures({ failures }) {
  const newest = failures.slice(0, MAX_NEWEST);
  const earlier = failures.slice(MAX_NEWEST);
  const none = element("li", "None since the start.", "quiet");
  fill("failures", newest, (lines) => (lines.length ? lines.map(failure) : [none]));
  fill("earlier", earlier, (lines) => lines.map(failure));
  byId("more").hidden = !earlier.length;
}

const SHOW = [
  showState, showFigures, showCharts, showLanes, showServices, showFailures, showOutcomes, showExcluded, showLimits,
];
let answeredAt = null;

function showLost(isLost) {
  byId("page").classList.toggle("stale", isLost);
  byId("lost").hidden = !isLost;
  if (!isLost) set("lost", "");
  else if (!answeredAt) set("lost", "The worker does not respond.");
  else set("lost", `No response since ${answeredAt.toLocaleTimeString("en-GB")}. The page shows the last known state.`);
}

async function poll() {
  if (!document.hidden) {
    try {
      const response = await fetch("status.json", { cache: "no-store", signal: AbortSignal.timeout(TIMEOUT) });
      if (!response.ok) throw new Error(response.status);
      const status = await response.json();
      for (const show of SHOW) show(status);
      answeredAt = new Date();
      showLost(false);
    } catch {
      showLost(true);
    }
  }
  setTimeout(poll, INTERVAL);
}

poll();
