"use strict";
// Draws the figures of the page's JSON blocks; one legend hides an arm or run in all of them.

const read = (id) => JSON.parse(document.getElementById(id).textContent);
const figures = read("figures");
const details = read("details");
// Nothing leaves the page: plotly's own button would upload the figure.
const config = { responsive: true, displaylogo: false, showSendToCloud: false };
const charts = () => [...document.querySelectorAll(".figure")].filter((div) => div.data);
const armCharts = () => charts().filter((div) => div.id in figures);
const hidden = new Set();

for (const figure of Object.values(figures)) {
  for (const trace of figure.data) {
    if (isShared(trace.legendgroup) && trace.visible === "legendonly") hidden.add(trace.legendgroup);
  }
}
for (const [name, figure] of Object.entries(figures)) draw(document.getElementById(name), figure);

function draw(div, figure) {
  const copy = onAxis(structuredClone(figure));
  // On another axis, layers that were hidden stay so.
  if (div.data && div.figure === figure) {
    copy.data.forEach((trace, index) => (trace.visible = div.data[index].visible ?? true));
  }
  div.figure = figure;
  if (!(div.id in figures)) return Plotly.newPlot(div, { ...copy, config });
  for (const trace of copy.data) trace.visible = visibility(trace);
  return Plotly.newPlot(div, { ...copy, config }).then(() => {
    div.on("plotly_legendclick", (event) => {
      toggle(event.data[event.curveNumber].legendgroup);
      return false;
    });
    div.on("plotly_legenddoubleclick", (event) => {
      isolate(event.data[event.curveNumber].legendgroup);
      return false;
    });
  });
}

function isShared(group) {
  return /^(arm|run) /.test(group ?? "");
}

// Lines of no arm or run (the baseline, layers) aren't in the shared legend and stay as they are.
function visibility(trace) {
  if (!isShared(trace.legendgroup)) return trace.visible ?? true;
  return hidden.has(trace.legendgroup) ? "legendonly" : true;
}

// The x axis of every curve: steps or tokens, logarithmic or linear.
function onAxis(figure) {
  if (figure.layout.meta?.over !== "steps") return figure;
  const [what, type] = document.getElementById("axis").value.split(" ");
  for (const trace of figure.data) {
    if (what === "tokens") trace.x = trace.meta.tokens;
  }
  for (const name of Object.keys(figure.layout).filter((key) => key.startsWith("xaxis"))) {
    const axis = figure.layout[name];
    axis.type = type;
    axis.title.text = what;
    if (type === "linear") delete axis.dtick;
  }
  return figure;
}

// Drawn anew: plotly.js 4.1 hangs when a figure's logarithmic axis is made linear.
document.getElementById("axis").addEventListener("change", () => {
  for (const div of charts()) if (div.layout.meta?.over === "steps") draw(div, div.figure);
});

function groups() {
  const all = armCharts().flatMap((div) => div.data.map((trace) => trace.legendgroup));
  return [...new Set(all)].filter(isShared);
}

function toggle(group) {
  if (hidden.has(group)) hidden.delete(group);
  else hidden.add(group);
  show();
}

// The one alone; once more: all arms, no runs.
function isolate(group) {
  const others = groups().filter((name) => name !== group);
  const alone = !hidden.has(group) && others.every((name) => hidden.has(name));
  hidden.clear();
  for (const name of others) {
    if (!alone || name.startsWith("run ")) hidden.add(name);
  }
  if (alone && group.startsWith("run ")) hidden.add(group);
  show();
}

function show() {
  for (const div of armCharts()) Plotly.restyle(div, { visible: div.data.map(visibility) });
}

// One run: its heat map keeps the step nearest to the one that was looked at.
const chosen = document.getElementById("run");

function drawRun() {
  const heads = document.getElementById("head_maps");
  const norms = document.getElementById("norms_by_layer");
  const slider = heads.layout?.sliders?.[0];
  const step = slider && Number(slider.steps[slider.active].args[0][0]);
  const figure = details[chosen.value];
  for (const [div, one] of [[norms, figure.norms_by_layer], [heads, figure.head_maps]]) {
    Plotly.purge(div);
    div.hidden = !one;
    if (one) draw(div, one).then(() => div === heads && step && goTo(div, step));
  }
}

function goTo(div, step) {
  const { steps } = div.layout.sliders[0];
  const distance = (index) => Math.abs(Math.log(Number(steps[index].args[0][0]) / step));
  const nearest = [...steps.keys()].reduce((a, b) => (distance(b) < distance(a) ? b : a));
  return Plotly.relayout(div, { "sliders[0].active": nearest }).then(() =>
    Plotly.animate(div, ...steps[nearest].args),
  );
}

if (chosen) {
  chosen.addEventListener("change", drawRun);
  drawRun();
}
