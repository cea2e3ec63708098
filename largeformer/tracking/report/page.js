// The page around the charts. Everything is built from text nodes: nothing that a run holds is ever read as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = id => document.getElementById(id);
const view = {axis: "step", smoothing: 0.6, logarithmic: false, marks: true, hidden: new Set(), range: null, at: null};

function make(name, properties = {}, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

function swatch(number) {
  const node = make("span", {className: "swatch"});
  node.style.background = color(number);
  return node;
}

function show(id) { byId(id).hidden = false; }

function header() {
  byId("title").textContent = data.runs.map(run => run.name).filter((name, i, all) => all.indexOf(name) === i).join(" · ") || "largeformer report";
  document.title = `${byId("title").textContent} – largeformer`;
  byId("made").textContent = `largeformer ${data.version}, ${data.made}`;
  byId("theme").addEventListener("click", () => {
    const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
  const problems = data.runs.flatMap(run => [...run.problems, ...(run.error ? [`${run.name} failed: ${run.error}`] : [])]);
  byId("problems").append(...problems.map(text => make("p", {className: "problem", textContent: text})));
  byId("problems").hidden = !problems.length;
}

function facts() {
  const labels = data.curves.length ? data.curves[0].facts.map(fact => fact[0]) : [];
  const heads = ["Run", ...labels].map((text, i) => make("th", {textContent: text, className: i ? "number" : ""}));
  const rows = data.curves.map((curve, number) => make("tr", {},
    make("td", {}, swatch(number), curve.label), ...curve.facts.map(fact => make("td", {className: "number", textContent: fact[1]}))));
  byId("facts").append(make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...rows));
  byId("facts").parentElement.hidden = !rows.length;
  byId("summary").append(make("div", {className: "chips"}, ...data.runs.map(run => make("span", {className: "chip"}, `${run.path} `,
    make("span", {className: `status ${run.status}`, textContent: run.status})))));
}

function curves() {
  if (!data.charts.length) return;
  show("curves");
  const moved = change => {
    const told = change.told;
    delete change.told;
    Object.assign(view, change);
    byId("whole").hidden = view.range === null;
    const again = Object.keys(change).some(key => key !== "at");
    for (const chart of charts) { if (again) chart.render(); else chart.point(); }
    if (told) byId("readout").textContent = told.point();
  };
  const charts = data.charts.map(spec => new Chart(spec, data.curves, view, moved));
  charts[0].node.classList.add("wide");
  byId("charts").append(...charts.map(chart => chart.node));
  byId("smoothing").addEventListener("input", event => {
    const smoothing = +event.target.value;
    byId("smoothed").textContent = smoothing ? smoothing.toFixed(2) : "off";
    moved({smoothing});
  });
  for (const radio of document.querySelectorAll("input[name=axis]")) radio.addEventListener("change", () => moved({axis: radio.value, range: null, at: null}));
  byId("logarithmic").addEventListener("change", event => moved({logarithmic: event.target.checked}));
  byId("marks").addEventListener("change", event => moved({marks: event.target.checked}));
  byId("whole").addEventListener("click", () => moved({range: null}));
  byId("controls").addEventListener("submit", event => event.preventDefault());
  if (data.curves.length > 1) byId("legend").append(...data.curves.map((curve, number) => {
    const button = make("button", {type: "button", onclick: () => {
      view.hidden.has(number) ? view.hidden.delete(number) : view.hidden.add(number);
      button.setAttribute("aria-pressed", !view.hidden.has(number));
      moved({range: null});
    }}, swatch(number), curve.label);
    button.setAttribute("aria-pressed", true);
    return button;
  }));
  addEventListener("resize", () => moved({range: view.range}));
  moved({range: null});
}

function events() {
  const counts = data.curves.flatMap(curve => Object.entries(curve.counts).map(([kind, n]) => `${data.curves.length > 1 ? curve.label + ": " : ""}${n} ${kind}`));
  const all = data.curves.flatMap((curve, number) => curve.events.map(event => ({...event, number})));
  if (!counts.length && !all.length) return;
  show("events");
  byId("counts").append(make("div", {className: "chips"}, ...counts.map(text => make("span", {className: "chip", textContent: text}))));
  byId("eventlist").parentElement.hidden = !all.length;
  const heads = ["Step", "Event", "", "When"].map((text, i) => make("th", {textContent: text, className: i ? "" : "number"}));
  byId("eventlist").append(make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...all.map(event => make("tr", {},
    make("td", {className: "number", textContent: event.step.toLocaleString("en")}), make("td", {}, swatch(event.number), event.kind),
    make("td", {className: "wrap", textContent: event.text}), make("td", {textContent: event.time})))));
}

function differences() {
  if (!data.differences.length) return;
  show("differences");
  const heads = [make("th", {textContent: "Key"}), ...data.curves.map((curve, number) => make("th", {}, swatch(number), curve.label))];
  byId("differing").append(make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...data.differences.map(row => make("tr", {},
    make("td", {textContent: row.key}), ...row.values.map(value => make("td", {className: "wrap", textContent: value}))))));
}

function lineage() {
  if (!data.runs.some(run => run.stages.length)) return;
  show("lineage");
  byId("stages").append(...data.runs.map(run => make("div", {className: "flow"}, make("h3", {textContent: run.name}), ...run.stages.flatMap((stage, i) => {
    const made = stage.parents.map(([kind, identity]) => `from ${kind} ${identity.slice(0, 8)}`).join(", ");
    const numbers = make("dl", {}, ...stage.metrics.flatMap(([key, value]) => [make("dt", {textContent: key}), make("dd", {textContent: value})]));
    const card = make("div", {className: stage.finished ? "stage" : "stage open"}, make("b", {textContent: stage.name}),
      make("code", {textContent: stage.finished ? stage.identity : "not finished"}), make("div", {className: "hint", textContent: made}), numbers);
    return i ? [make("span", {className: "arrow", textContent: "→"}), card] : [card];
  }))));
}

function samples() {
  const all = data.runs.flatMap(run => run.samples.map(sample => ({...sample, run: run.name}))).reverse();
  if (!all.length) return;
  show("samples");
  byId("texts").append(...all.map((sample, i) => make("details", {open: i < 3},
    make("summary", {textContent: `${sample.run} / ${sample.stage}${sample.step === null ? "" : ", step " + sample.step.toLocaleString("en")}`}),
    make("pre", {}, make("mark", {textContent: sample.prompt}), sample.text))));
}

function recipes() {
  const all = data.runs.flatMap(run => run.configs.map(config => ({...config, run: run.name})));
  if (!all.length) return;
  show("recipes");
  byId("configs").append(...all.map(config => make("details", {}, make("summary", {textContent: `${config.run} / ${config.stage}`}), make("pre", {textContent: config.text}))));
}

for (const part of [header, facts, curves, events, differences, lineage, samples, recipes]) part();
document.documentElement.dataset.ready = "true";
