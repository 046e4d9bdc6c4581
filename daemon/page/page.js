// The page of ovl: shows what the API says (docs/page.md). It writes text only as text: there is no HTML in a string here.
"use strict";

// Rows that a table shows at first, and that a press of the button adds.
const ROWS = 200;
// Events that the history shows at most.
const MOST_EVENTS = 500;
// Endpoints that count as chatty.
const CHATTIEST = 10;
// Flows that are kept at most, and for how long after they were last seen, in milliseconds.
const MOST_FLOWS = 2000;
const FLOW_KEPT = 60000;
// Interval at which flows are shown, in milliseconds.
const FLOWS_SHOWN = 500;
// Time until the next attempt to connect, in milliseconds.
const RETRY = 3000;

const state = {
  overview: null,
  reports: { hosts: [], unanswered: [] },
  rates: new Map(), // By key of an endpoint: packets, sent, received, drops a second; and the drops so far.
  before: new Map(), // The last report of each host, by its name.
  events: null, // null: not asked for yet.
  refused: [],
  flows: new Map(), // By ends, port and verdict: the flow, when it was last seen, and what each host counted of it.
  flowHosts: new Map(), // What is to be said of a host besides its flows.
  watch: null, // Ends the stream of flows. null: it is not open.
  view: "map",
  rows: ROWS,
  opener: null,
  chatty: "",
};

const at = (id) => document.getElementById(id);

// Makes an element. What is not an element becomes text.
function el(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "onclick") made.addEventListener("click", value);
    else if (value !== undefined && value !== false) made.setAttribute(name, value);
  }
  made.append(...children.map((child) => (child instanceof Node ? child : String(child ?? ""))));
  return made;
}

// Replaces the content of an element. What had the focus keeps it, if it is still there.
function fill(parent, children) {
  const key = parent.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
  parent.replaceChildren(...children);
  if (key) [...parent.querySelectorAll("[data-key]")].find((each) => each.dataset.key === key)?.focus();
}

// Asks the API. The token is in the header, so that no log of addresses has it.
const token = takeToken();

function takeToken() {
  const found = /^#token=([\w-]+)$/.exec(location.hash);
  if (found) {
    sessionStorage.setItem("token", found[1]);
    history.replaceState(null, "", location.pathname);
  }
  return sessionStorage.getItem("token");
}

async function ask(part, query, signal) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const response = await fetch(`/api/v1/${part}${query ? `?${new URLSearchParams(query)}` : ""}`, { headers, signal });
  if (!response.ok) throw new Error((await response.text()).trim() || response.statusText);
  return response;
}

const askJson = async (part, query) => (await ask(part, query)).json();

// Reads an event stream until it ends.
async function read(part, signal) {
  const response = await ask(part, undefined, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    text += value;
    let end;
    while ((end = text.indexOf("\n\n")) >= 0) {
      take(text.slice(0, end));
      text = text.slice(end + 2);
    }
  }
  throw new Error("the daemon closed the connection");
}

// Reads an event stream, again and again, until it is aborted.
async function follow(part, failed, signal) {
  while (!signal?.aborted) {
    try {
      await read(part, signal);
    } catch (error) {
      if (signal?.aborted) return;
      failed(error.message);
    }
    await new Promise((resolve) => setTimeout(resolve, RETRY));
  }
}

function disconnected(why) {
  at("summary").textContent = `not connected: ${why}`;
  at("summary").className = "error";
}

function take(event) {
  const [first, second] = event.split("\n");
  const data = JSON.parse(second.slice("data: ".length));
  switch (first.slice("event: ".length)) {
    case "overview":
      state.overview = data;
      state.chatty = "";
      fillChoices();
      render();
      break;
    case "reports":
      takeReports(data);
      update();
      break;
    case "flows":
      takeFlows(data);
      break;
    case "event":
      state.events?.push(data);
      if (state.view === "history") renderHistory();
      break;
  }
}

const keyOf = (endpoint) => `${endpoint.namespace}/${endpoint.name} ${endpoint.network}`;

function takeReports(reports) {
  state.reports = reports;
  state.rates = new Map();
  for (const report of reports.hosts) {
    const last = state.before.get(report.host);
    const seconds = last && last.run === report.run ? (report.at_ms - last.at_ms) / 1000 : 0;
    const old = new Map((last?.endpoints ?? []).map((each) => [keyOf(each), each]));
    for (const now of report.endpoints) {
      const then = old.get(keyOf(now));
      const dropped = (it) => it.dropped_packets + it.refused_frames + it.policy_packets;
      const rate = (of) => (then && seconds > 0 ? Math.max(0, of(now) - of(then)) / seconds : null);
      state.rates.set(keyOf(now), {
        packets: rate((it) => it.sent_packets + it.received_packets),
        sent: rate((it) => it.sent_bytes),
        received: rate((it) => it.received_bytes),
        drops: rate(dropped),
        dropped: dropped(now),
      });
    }
  }
  state.before = new Map(reports.hosts.map((report) => [report.host, report]));
}

// What the views show.

const views = {
  map: renderMap,
  pairs: renderPairs,
  endpoints: renderEndpoints,
  services: renderServices,
  problems: renderProblems,
  policy: () => {},
  drops: renderDrops,
  history: renderHistory,
  flows: renderFlows,
};

function render() {
  if (!state.overview) return;
  renderSummary();
  views[state.view]();
}

// Shows new reports: the map keeps its elements.
function update() {
  if (!state.overview) return;
  renderSummary();
  if (state.view === "map") updateMap();
  else if (state.view === "drops") askDrops();
  else if (state.view !== "history" && state.view !== "flows") views[state.view]();
}

const plural = (count, thing) => (count === 1 ? `1 ${thing}` : `${count} ${thing}s`);

const problems = () =>
  state.reports.hosts.flatMap((report) => report.problems.map((problem) => ({ host: report.host, ...problem })));

function renderSummary() {
  const { node, hosts, endpoints, networks } = state.overview;
  const alive = hosts.filter((host) => host.state === "alive").length;
  const count = problems().length;
  const parts = [`seen from ${node}`, `${alive} of ${plural(hosts.length, "host")} alive`, plural(endpoints.length, "endpoint"),
    plural(networks.length, "network"), plural(count, "problem")];
  if (state.reports.unanswered.length) parts.push(`no report of ${state.reports.unanswered.join(", ")}`);
  at("summary").textContent = parts.join(", ");
  at("summary").className = count || alive < hosts.length ? "warning" : "";
}

const words = () => at("search").value.toLowerCase().split(/\s+/).filter(Boolean);

// Whether a text has all the words that are searched for.
function matches(text) {
  const lower = text.toLowerCase();
  return words().every((word) => lower.includes(word));
}

const labelsOf = (endpoint) => Object.entries(endpoint.labels).map(([key, value]) => `${key}=${value}`);

const textOf = (endpoint) =>
  [endpoint.namespace, endpoint.name, endpoint.network, endpoint.node, ...endpoint.addresses, ...endpoint.aliases,
    ...labelsOf(endpoint)].join(" ");

function chattiest() {
  const rates = [...state.rates].filter(([, rate]) => rate.packets > 0);
  rates.sort((a, b) => b[1].packets - a[1].packets);
  return rates.slice(0, CHATTIEST).map(([key]) => key);
}

function shownEndpoints() {
  const network = at("network").value;
  const mode = at("chatty").value;
  const chatty = new Set(mode ? chattiest() : []);
  return state.overview.endpoints.filter((endpoint) =>
    (!network || endpoint.network === network) &&
    (!mode || chatty.has(keyOf(endpoint)) === (mode === "only")) &&
    matches(textOf(endpoint)));
}

// Replaces the choices of a list, and keeps what is chosen.
function fillChoice(select, names) {
  const chosen = select.value;
  const all = [select.options[0], ...names.map((name) => el("option", { value: name }, name))];
  select.replaceChildren(...all);
  select.value = names.includes(chosen) ? chosen : "";
}

function fillChoices() {
  fillChoice(at("network"), state.overview.networks.map((network) => network.name));
  const names = new Set(state.overview.endpoints.map((endpoint) => `${endpoint.namespace}/${endpoint.name}`));
  at("names").replaceChildren(...[...names].slice(0, 2000).map((name) => el("option", { value: name })));
}

function renderMap() {
  const byHost = new Map(state.overview.hosts.map((host) => [host.name, new Map()]));
  const shown = shownEndpoints();
  for (const endpoint of shown) {
    const networks = byHost.get(endpoint.node) ?? new Map();
    byHost.set(endpoint.node, networks);
    networks.set(endpoint.network, [...(networks.get(endpoint.network) ?? []), endpoint]);
  }
  const total = state.overview.endpoints.length;
  at("shown").textContent = shown.length === total ? "" : `${shown.length} of ${total} endpoints`;
  fill(at("hosts"), state.overview.hosts.map((host) => hostCard(host, byHost.get(host.name))));
  const first = at("hosts").querySelector(".chip");
  if (first) first.tabIndex = 0;
  updateMap();
  if (!performance.getEntriesByName("map").length) performance.mark("map");
}

function hostCard(host, networks) {
  const title = el("button", { "data-key": `host ${host.name}`, onclick: (event) => showHost(host, event) }, host.name);
  const groups = [...networks].map(([name, endpoints]) => el("div", {},
    el("h3", {}, el("button", { "data-key": `network ${host.name} ${name}`, onclick: (event) => showNetwork(name, event) }, name)),
    el("div", { class: "chips" }, ...endpoints.map(chip))));
  return el("article", { class: "host", "data-host": host.name }, el("h2", {}, title),
    el("p", { class: "facts" }), ...groups);
}

function chip(endpoint) {
  const off = endpoint.state !== "ready" || !endpoint.ready;
  return el("button", {
    class: off ? "chip off" : "chip", tabindex: -1, "data-key": keyOf(endpoint),
    title: `${endpoint.namespace}/${endpoint.name} ${endpoint.addresses.join(" ")}${off ? ` (${stateOf(endpoint)})` : ""}`,
    onclick: (event) => showEndpoint(endpoint, event),
  }, endpoint.name);
}

const stateOf = (endpoint) => (endpoint.state === "ready" && !endpoint.ready ? "not ready" : endpoint.state);

function updateMap() {
  const now = at("chatty").value ? chattiest().sort().join() : "";
  if (now !== state.chatty) {
    state.chatty = now;
    renderMap();
    return;
  }
  const reports = new Map(state.reports.hosts.map((report) => [report.host, report]));
  for (const card of at("hosts").children) {
    const host = state.overview.hosts.find((each) => each.name === card.dataset.host);
    const report = reports.get(host.name);
    const found = report?.problems.length ?? 0;
    const facts = [host.state, plural(host.endpoints, "endpoint"), host.version];
    if (found) facts.push(plural(found, "problem"));
    if (!host.member) facts.push("not a member");
    card.querySelector(".facts").textContent = facts.join(", ");
    const level = host.state === "dead" ? " bad" : found || host.state !== "alive" ? " warn" : "";
    card.className = `host${level}`;
  }
  for (const each of at("hosts").querySelectorAll(".chip")) {
    each.classList.toggle("drops", (state.rates.get(each.dataset.key)?.drops ?? 0) > 0);
  }
}

const table = (id, headings, rows) => fill(at(id), [
  el("thead", {}, el("tr", {}, ...headings.map((text) => el("th", { scope: "col" }, text)))),
  el("tbody", {}, ...rows),
]);

const row = (...cells) => el("tr", {}, ...cells.map((cell) => (cell instanceof Node && cell.tagName === "TD" ? cell : el("td", {}, cell))));

const number = (text) => el("td", { class: "number" }, text);

const milliseconds = (us) => (us === null || us === undefined ? "" : `${(us / 1000).toFixed(us < 10000 ? 2 : 0)} ms`);

function bytesRate(rate) {
  if (rate === null || rate === undefined) return "";
  const units = ["B/s", "KiB/s", "MiB/s", "GiB/s"];
  let unit = 0;
  while (rate >= 1024 && unit < units.length - 1) [rate, unit] = [rate / 1024, unit + 1];
  return `${rate.toFixed(unit && rate < 10 ? 1 : 0)} ${units[unit]}`;
}

const countRate = (rate) => (rate === null || rate === undefined ? "" : rate.toFixed(rate > 0 && rate < 10 ? 1 : 0));

// How one host sees another one, in words, with the class of its colour.
function pairText(pair) {
  if (pair.state !== "alive") return [pair.state, pair.state === "suspect" ? "warning" : "error"];
  if (!pair.reachable) return ["nothing arrives directly", "error"];
  if (!pair.paths.length) return [`no path probed ${milliseconds(pair.rtt_us)}`, ""];
  let level = "good";
  const texts = pair.paths.map((path) => {
    const ways = [["sent", path.sent], ["received", path.received]];
    const wrong = ways.filter(([, way]) => way.state === "broken" || way.state === "small-only");
    const lost = ways.filter(([, way]) => way.loss_percent > 0);
    if (wrong.length) level = "error";
    else if (lost.length && level === "good") level = "warning";
    const notes = [...wrong.map(([name, way]) => `${name}: ${way.state === "broken" ? "broken" : "only small packets"}`),
      ...lost.map(([name, way]) => `${name}: ${way.loss_percent} % lost`)];
    return [path.encapsulation, milliseconds(path.rtt_us), ...notes].filter(Boolean).join(" ");
  });
  if (pair.encryption !== "none") texts.push(pair.encryption);
  return [texts.join("; "), level];
}

function renderPairs() {
  const names = state.overview.hosts.map((host) => host.name);
  const reports = new Map(state.reports.hosts.map((report) => [report.host, report]));
  table("matrix", ["from \\ to", ...names], names.map((from) => {
    const pairs = new Map((reports.get(from)?.pairs ?? []).map((pair) => [pair.to, pair]));
    const cells = names.map((to) => {
      if (to === from) return el("td", {}, "-");
      const pair = pairs.get(to);
      const [text, level] = pair ? pairText(pair) : ["no report", ""];
      return el("td", { class: level }, text);
    });
    return el("tr", {}, el("th", { scope: "row" }, from), ...cells);
  }));
}

function renderEndpoints() {
  const found = state.overview.endpoints.filter((endpoint) => matches(textOf(endpoint)));
  const rows = found.slice(0, state.rows).map((endpoint) => {
    const rate = state.rates.get(keyOf(endpoint));
    const name = el("button", { "data-key": keyOf(endpoint), onclick: (event) => showEndpoint(endpoint, event) }, endpoint.name);
    return row(endpoint.namespace, name, endpoint.network, endpoint.node, endpoint.addresses.join(", "), stateOf(endpoint),
      number(bytesRate(rate?.sent)), number(bytesRate(rate?.received)), number(countRate(rate?.drops)));
  });
  table("endpoint-table", ["Namespace", "Name", "Network", "Host", "Addresses", "State", "Sent", "Received", "Drops/s"], rows);
  at("more").hidden = found.length <= state.rows;
}

function renderServices() {
  const found = state.overview.services.filter((service) => matches(`${service.namespace} ${service.name}`));
  table("service-table", ["Namespace", "Name", "Port", "Backends", "Ready", "Notes"], found.flatMap((service) =>
    (service.ports.length ? service.ports : [{ backends: [] }]).map((port) => {
      // A backend with addresses of both families is there twice.
      const backends = [...new Map(port.backends.map((each) => [`${each.name || each.address} ${each.node}`, each])).values()];
      const ready = backends.filter((backend) => backend.ready).length;
      const names = backends.slice(0, 8).map((backend) => backend.name || backend.address);
      if (backends.length > names.length) names.push(`and ${backends.length - names.length} more`);
      return row(service.namespace, service.name, port.port ? `${port.port}/${port.protocol} ${port.name}` : "", names.join(", "),
        el("td", { class: ready ? "number" : "number error" }, `${ready} of ${backends.length}`), service.notes.join(" "));
    })));
}

function renderProblems() {
  const found = problems().filter((problem) => matches(Object.values(problem).join(" ")));
  found.sort((a, b) => a.severity.localeCompare(b.severity) || a.host.localeCompare(b.host));
  const items = found.map((problem) => el("li", { class: problem.severity },
    el("strong", {}, problem.code), ` ${problem.severity} on ${problem.host}${problem.object ? `: ${problem.object}` : ""}`,
    el("br"), problem.message));
  fill(at("problem-list"), items.length ? items : [el("li", { class: "good" }, "No problems.")]);
}

async function askPolicy(event) {
  event?.preventDefault();
  const query = { from: at("from").value.trim(), to: at("to").value.trim() };
  if (at("port").value) Object.assign(query, { port: at("port").value, protocol: at("protocol").value });
  try {
    const verdicts = await askJson("policy", query);
    fill(at("verdicts"), verdicts.map((verdict) => el("article", {},
      el("h2", { class: verdict.passes ? "good" : "error" },
        `${verdict.from} may ${verdict.passes ? "" : "not "}reach ${verdict.to}`),
      ...[["egress", "At the source"], ["ingress", "At the destination"]].map(([side, where]) =>
        el("p", { class: verdict[side].passes ? "" : "error" }, `${where}: ${verdict[side].why}`)))));
  } catch (error) {
    fill(at("verdicts"), [el("p", { class: "error" }, error.message)]);
  }
}

async function askDrops() {
  try {
    state.refused = await askJson("drops");
  } catch {
    state.refused = [];
  }
  if (state.view === "drops") renderDrops(false);
}

function renderDrops(asks = true) {
  const dropping = state.overview.endpoints.filter((endpoint) => state.rates.get(keyOf(endpoint))?.dropped && matches(textOf(endpoint)));
  dropping.sort((a, b) => state.rates.get(keyOf(b)).dropped - state.rates.get(keyOf(a)).dropped);
  const counters = new Map(state.reports.hosts.flatMap((report) => report.endpoints.map((each) => [keyOf(each), each])));
  table("drop-table", ["Endpoint", "Network", "Host", "By policies", "Not its addresses", "By its device", "Drops/s"],
    dropping.slice(0, ROWS).map((endpoint) => {
      const counted = counters.get(keyOf(endpoint));
      return row(`${endpoint.namespace}/${endpoint.name}`, endpoint.network, endpoint.node, number(counted.policy_packets),
        number(counted.refused_frames), number(counted.dropped_packets), number(countRate(state.rates.get(keyOf(endpoint)).drops)));
    }));
  table("refused-table", ["Direction", "From", "To", "Protocol", "Port", "Packets", "Seconds ago", "Policies"], state.refused.map((drop) =>
    row(drop.direction, drop.from_endpoint ?? drop.from, drop.to_endpoint ?? drop.to, drop.protocol, drop.port ?? "",
      number(drop.packets), number(Math.round(drop.last_ms / 1000)), drop.policies.join(", "))));
  if (asks) askDrops();
}

const moment = (ms) => new Date(ms).toISOString().replace("T", " ").replace("Z", "");

async function renderHistory() {
  if (!state.events) {
    state.events = [];
    try {
      state.events = await askJson("events");
    } catch (error) {
      state.events = null;
      disconnected(error.message);
      return;
    }
  }
  const kinds = [...new Set(state.events.map((event) => event.kind))].sort();
  if (kinds.length + 1 !== at("kind").options.length) fillChoice(at("kind"), kinds);
  const now = Math.max(Date.now(), state.events.at(-1)?.time_ms ?? 0);
  const oldest = state.events[0]?.time_ms ?? now;
  const part = Number(at("until").value) / 1000;
  const until = part === 1 ? Infinity : oldest + (now - oldest) * part;
  const span = Number(at("span").value);
  const since = span ? Math.min(until, now) - span : -Infinity;
  const kind = at("kind").value;
  const found = state.events.filter((event) => event.time_ms <= until && event.time_ms >= since &&
    (!kind || event.kind === kind) && matches(`${event.kind} ${event.object} ${event.message}`));
  at("until-text").textContent = `${part === 1 ? "now" : moment(until)}, ${plural(found.length, "event")}`;
  table("event-table", ["Time (UTC)", "Kind", "Object", "What"], found.slice(-MOST_EVENTS).reverse().map((event) =>
    row(moment(event.time_ms), event.kind, event.object, event.message)));
}

// Watches flows while they are shown. For no other reason do the hosts count them.
function watchFlows() {
  const wanted = state.view === "flows" && !document.hidden;
  if (wanted === (state.watch !== null)) return;
  if (wanted) {
    state.watch = new AbortController();
    follow("flows", (why) => {
      state.flowHosts.set("", { error: why });
      showFlows();
    }, state.watch.signal);
  } else {
    state.watch.abort();
    state.watch = null;
    state.flows = new Map();
    state.flowHosts = new Map();
  }
}

function takeFlows({ host, flows, incomplete, error }) {
  if (!state.watch) return;
  const now = Date.now();
  state.flowHosts.delete("");
  state.flowHosts.set(host, { error, incomplete });
  for (const [key, each] of state.flows) {
    if (now - each.seen > FLOW_KEPT) state.flows.delete(key);
  }
  for (const flow of flows) {
    const key = [flow.from, flow.to, flow.port, flow.protocol, flow.verdict].join(" ");
    let kept = state.flows.get(key);
    if (!kept) {
      if (state.flows.size >= MOST_FLOWS) {
        state.flowHosts.get(host).incomplete = true;
        continue;
      }
      kept = { hosts: new Map() };
      state.flows.set(key, kept);
    }
    const before = kept.hosts.get(host) ?? { count: 0, sent: 0, received: 0 };
    const count = flow.verdict === "dropped" ? flow.dropped : flow.opened;
    kept.flow = flow;
    kept.seen = now;
    kept.hosts.set(host, {
      now: count, at: now, count: before.count + count,
      sent: before.sent + (flow.sent_bytes ?? 0), received: before.received + (flow.received_bytes ?? 0),
    });
  }
  showFlows();
}

let flowsDue = false;

// Shows flows soon: all that comes until then at once.
function showFlows() {
  if (flowsDue) return;
  flowsDue = true;
  setTimeout(() => {
    flowsDue = false;
    if (state.view === "flows") renderFlows();
  }, FLOWS_SHOWN);
}

const flowEnd = (name, address) => (name ? `${name} (${address})` : address);

const textOfFlow = ({ flow, hosts }) => [flow.from_name, flow.from, flow.to_name, flow.to, flow.port, flow.protocol, flow.backend_name,
  flow.why, ...(flow.policies ?? []), ...hosts.keys()].join(" ");

// A flow between two hosts is counted by both, so the larger count is that of the flow.
const most = (kept, of) => Math.max(0, ...[...kept.hosts.values()].map(of));

function bytes(count) {
  return bytesRate(count).replace("/s", "");
}

function renderFlows() {
  const now = Date.now();
  const verdict = at("verdict").value;
  const mode = at("flow-chatty").value;
  const chatty = new Set(mode ? chattiest().map((key) => key.split(" ")[0]) : []);
  const isChatty = ({ flow }) => chatty.has(flow.from_name) || chatty.has(flow.to_name) || chatty.has(flow.backend_name);
  const all = [...state.flows.values()];
  const found = all.filter((each) => (!verdict || each.flow.verdict === verdict) && (!mode || isChatty(each) === (mode === "only")) &&
    matches(textOfFlow(each)));
  const count = new Map(found.map((each) => [each, most(each, (it) => it.count)]));
  found.sort((a, b) => a.flow.verdict.localeCompare(b.flow.verdict) || count.get(b) - count.get(a));
  const shown = found.slice(0, ROWS);
  const notes = [shown.length === all.length ? plural(all.length, "flow") : `${shown.length} of ${plural(all.length, "flow")}`];
  for (const [host, { error, incomplete }] of state.flowHosts) {
    if (error) notes.push(host ? `${host}: ${error}` : `not connected: ${error}`);
    else if (incomplete) notes.push(`${host}: more than are shown`);
  }
  at("flow-notes").textContent = state.flowHosts.size ? notes.join("; ") : "waiting for the first second";
  table("flow-table", ["From", "To", "Port", "Verdict", "Seen by", "Count", "Per second", "Sent", "Received", "Decided by"],
    shown.map((each) => {
      const { flow, hosts } = each;
      const backend = flow.backend ? ` at ${flowEnd(flow.backend_name, flow.backend.join(" port "))}` : "";
      return row(flowEnd(flow.from_name, flow.from), flowEnd(flow.to_name, flow.to) + backend,
        flow.port === undefined ? flow.protocol : `${flow.port}/${flow.protocol}`,
        el("td", { class: flow.verdict === "dropped" ? "error" : "" }, flow.verdict), [...hosts.keys()].sort().join(", "),
        number(count.get(each)), number(most(each, (it) => (now - it.at < 2500 ? it.now : 0))),
        number(bytes(most(each, (it) => it.sent))), number(bytes(most(each, (it) => it.received))), flow.why ?? "");
    }));
}

// Details.

function show(event, title, pairs, ...rest) {
  state.opener = event?.currentTarget ?? null;
  const shown = pairs.filter(([, value]) => value !== "" && value !== undefined && value !== null);
  at("detail").replaceChildren(el("button", { onclick: hide }, "Close"), el("h2", {}, title),
    el("dl", {}, ...shown.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])), ...rest);
  at("detail").hidden = false;
  at("detail").focus();
}

function hide() {
  at("detail").hidden = true;
  const key = state.opener?.dataset.key;
  const again = state.opener?.isConnected ? state.opener :
    [...document.querySelectorAll("[data-key]")].find((each) => each.dataset.key === key);
  again?.focus();
}

function showEndpoint(endpoint, event) {
  const rate = state.rates.get(keyOf(endpoint));
  const services = state.overview.services.filter((service) =>
    service.ports.some((port) => port.backends.some((backend) => backend.name === endpoint.name && backend.node === endpoint.node)));
  const name = `${endpoint.namespace}/${endpoint.name}`;
  const put = (field) => () => {
    at(field).value = name;
    hide();
    open("policy");
    at(field === "from" ? "to" : "from").focus();
  };
  show(event, name, [
    ["Network", endpoint.network], ["Host", endpoint.node], ["State", stateOf(endpoint)],
    ["Addresses", endpoint.addresses.join(", ")], ["MAC address", endpoint.mac], ["Labels", labelsOf(endpoint).join(", ")],
    ["Aliases", endpoint.aliases.join(", ")], ["Services", services.map((it) => `${it.namespace}/${it.name}`).join(", ")],
    ["Sent", bytesRate(rate?.sent)], ["Received", bytesRate(rate?.received)], ["Packets/s", countRate(rate?.packets)],
    ["Dropped packets", rate?.dropped],
  ], el("p", {}, el("button", { onclick: put("from") }, "What may it reach?"), " ",
    el("button", { onclick: put("to") }, "What may reach it?")));
}

function showHost(host, event) {
  const report = state.reports.hosts.find((each) => each.host === host.name);
  show(event, host.name, [
    ["State", host.state], ["Member", host.member ? "yes" : "no"], ["Address", host.address], ["VTEP", host.vtep],
    ["Release", host.version], ["Endpoints", host.endpoints], ["Path MTU", host.path_mtu], ["Daemon", report?.state],
  ], ...(report?.problems ?? []).map((problem) => el("p", { class: problem.severity }, `${problem.code}: ${problem.message}`)));
}

function showNetwork(name, event) {
  const network = state.overview.networks.find((each) => each.name === name);
  if (!network) return;
  show(event, network.name, [
    ["Driver", network.driver], ["Mode", network.mode], ["VNI", network.vni], ["Subnets", network.subnets.join(", ")],
    ["Gateways", network.gateways.join(", ")], ["MTU", network.mtu], ["Encrypted", network.encrypt],
    ["Internal", network.internal ? "yes" : "no"], ["Endpoints", network.endpoints], ["Hosts", network.nodes.join(", ")],
  ]);
}

// Views and keys.

const order = Object.keys(views);

function open(view) {
  state.view = view;
  state.rows = ROWS;
  for (const name of order) {
    at(name).hidden = name !== view;
    const tab = at(`tab-${name}`);
    tab.setAttribute("aria-selected", name === view);
    tab.tabIndex = name === view ? 0 : -1;
  }
  watchFlows();
  render();
}

function moveTab(step) {
  const next = order[(order.indexOf(state.view) + step + order.length) % order.length];
  open(next);
  at(`tab-${next}`).focus();
}

// Moves the focus on the map: to the next endpoint, or to the next host.
function moveChip(from, key) {
  const chips = [...at("hosts").querySelectorAll(".chip")];
  let to = chips[chips.indexOf(from) + (key === "ArrowRight" ? 1 : -1)];
  if (key === "ArrowDown" || key === "ArrowUp") {
    const cards = [...at("hosts").children].filter((card) => card.querySelector(".chip"));
    const card = cards[cards.indexOf(from.closest(".host")) + (key === "ArrowDown" ? 1 : -1)];
    to = card?.querySelector(".chip");
  }
  if (!to) return;
  from.tabIndex = -1;
  to.tabIndex = 0;
  to.focus();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const target = event.target;
  if (event.key === "Escape") {
    if (!at("detail").hidden) hide();
    else if (target === at("search")) {
      at("search").value = "";
      render();
    }
    return;
  }
  if (event.key.startsWith("Arrow")) {
    if (target.classList.contains("chip")) {
      event.preventDefault();
      moveChip(target, event.key);
    } else if (target.getAttribute("role") === "tab" && (event.key === "ArrowLeft" || event.key === "ArrowRight")) {
      moveTab(event.key === "ArrowRight" ? 1 : -1);
    }
    return;
  }
  if (target.matches("input, select")) return;
  if (event.key === "/") {
    event.preventDefault();
    at("search").focus();
  } else if (event.key >= "1" && event.key <= String(order.length)) {
    open(order[Number(event.key) - 1]);
    at(`tab-${state.view}`).focus();
  }
});

for (const name of order) at(`tab-${name}`).addEventListener("click", () => open(name));
for (const id of ["search", "network", "chatty"]) at(id).addEventListener("input", render);
for (const id of ["verdict", "flow-chatty"]) at(id).addEventListener("input", renderFlows);
document.addEventListener("visibilitychange", watchFlows);
for (const id of ["until", "span", "kind"]) at(id).addEventListener("input", renderHistory);
at("more").addEventListener("click", () => {
  state.rows += ROWS;
  render();
});
at("question").addEventListener("submit", askPolicy);
for (const id of ["filters", "period", "flow-filters"]) at(id).addEventListener("submit", (event) => event.preventDefault());
open("map");
follow("stream", disconnected);
