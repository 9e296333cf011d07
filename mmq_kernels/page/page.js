"use strict";
// What a page does once it is open: plots are drawn from the JSON beside them, tables sort and filter, text is copied.

const root = document.documentElement;

// --- plots -----------------------------------------------------------------------------------------------------------

const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f"];

function theme(name) {
  return getComputedStyle(root).getPropertyValue(name).trim();
}

// The colours of the page, for every axis and scene that a layout has.
function coloured(layout) {
  const text = theme("--text"), grid = theme("--grid"), changes = {"font.color": text};
  for (const key of Object.keys(layout)) {
    if (/^[xy]axis\d*$/.test(key)) {
      changes[key + ".gridcolor"] = grid;
      changes[key + ".zerolinecolor"] = grid;
      changes[key + ".linecolor"] = theme("--line");
    } else if (/^scene\d*$/.test(key)) {
      for (const axis of ["xaxis", "yaxis", "zaxis"]) {
        changes[key + "." + axis + ".gridcolor"] = theme("--line");
        changes[key + "." + axis + ".color"] = text;
      }
    }
  }
  (layout.updatemenus || []).forEach((_, i) => {
    changes["updatemenus[" + i + "].bgcolor"] = theme("--panel");
    changes["updatemenus[" + i + "].bordercolor"] = theme("--line");
    changes["updatemenus[" + i + "].font.color"] = "#3b82c4";
  });
  return changes;
}

function drawn(place) {
  const figure = JSON.parse(place.querySelector("script").textContent);
  const layout = Object.assign({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", colorway: COLOURS,
    hoverlabel: {align: "left"}, margin: {l: 64, r: 24, t: 56, b: 56},
  }, figure.layout);
  layout.title = Object.assign({x: 0, xref: "paper", xanchor: "left"}, layout.title);
  layout.font = Object.assign({family: "system-ui, sans-serif", size: 13}, layout.font);
  const target = document.createElement("div");
  target.style.height = (layout.height || 420) + "px";
  place.append(target);
  return Plotly.newPlot(target, figure.data, layout, {responsive: true, displaylogo: false})
    .then(() => Plotly.relayout(target, coloured(layout)));
}

function drawAll() {
  const places = [...document.querySelectorAll(".plot")];
  const next = () => places.length ? drawn(places.shift()).then(next) : root.setAttribute("data-drawn", "");
  return next();
}

function setTheme(name) {
  root.dataset.theme = name;
  document.querySelectorAll(".js-plotly-plot").forEach(plot => Plotly.relayout(plot, coloured(plot.layout)));
}

// --- tables ----------------------------------------------------------------------------------------------------------

function key(row, column) {
  const cell = row.cells[column];
  return cell.dataset.value === undefined ? cell.textContent.trim().toLowerCase() : Number(cell.dataset.value);
}

// Cells without a value come last, whichever way a column is sorted.
function compare(a, b, way) {
  if (a === "" || b === "") return (a === "") - (b === "");
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
  return way * (typeof a === "number" ? a - b : a.localeCompare(b, undefined, {numeric: true}));
}

function sort(table, column) {
  const heads = [...table.tHead.rows[0].cells], head = heads[column], body = table.tBodies[0];
  const order = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
  heads.forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", order);
  const way = order === "ascending" ? 1 : -1;
  const rows = [...body.rows].map(row => [key(row, column), row]);
  rows.sort((a, b) => compare(a[0], b[0], way));
  body.append(...rows.map(pair => pair[1]));
}

// ">4", "<=3.5", "3..5" and "4" for numbers, a part of the text for the rest.
function wanted(text) {
  const query = text.trim().toLowerCase(), number = "(-?\\d+(?:\\.\\d+)?)";
  const range = query.match(new RegExp("^" + number + "\\s*\\.\\.\\s*" + number + "$"));
  if (range) return value => typeof value === "number" && value >= +range[1] && value <= +range[2];
  const bound = query.match(new RegExp("^(<=|>=|<|>|=)\\s*" + number + "$"));
  if (bound) {
    const test = {
      "<": (a, b) => a < b, ">": (a, b) => a > b, "<=": (a, b) => a <= b, ">=": (a, b) => a >= b, "=": (a, b) => a === b,
    }[bound[1]];
    return value => typeof value === "number" && test(value, +bound[2]);
  }
  return (value, shown) => shown.toLowerCase().includes(query);
}

function filter(table) {
  const tests = [...table.tHead.querySelectorAll("input")]
    .map((input, column) => [column, input.value.trim() && wanted(input.value)]).filter(pair => pair[1]);
  let left = 0;
  for (const row of table.tBodies[0].rows) {
    row.hidden = !tests.every(([column, test]) => test(key(row, column), row.cells[column].textContent));
    left += !row.hidden;
  }
  const count = table.caption.querySelector("output");
  count.textContent = tests.length ? " Showing " + left + " of " + table.tBodies[0].rows.length + "." : "";
}

function readied(table) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button"), input = document.createElement("input");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(table, column));
    input.type = "search";
    input.placeholder = head.classList.contains("text") ? "filter" : ">, <, a..b";
    input.setAttribute("aria-label", "filter " + button.textContent);
    input.addEventListener("input", () => filter(table));
    head.append(button, input);
  });
}

// --- copying ---------------------------------------------------------------------------------------------------------

function copied(text) {
  if (navigator.clipboard && window.isSecureContext) return navigator.clipboard.writeText(text);
  const area = document.createElement("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done ? Promise.resolve() : Promise.reject(new Error("not allowed"));
}

function copies(button) {
  button.addEventListener("click", () => {
    const shown = button.previousElementSibling;
    const say = word => {
      button.textContent = word;
      setTimeout(() => { button.textContent = "copy"; }, 1500);
    };
    copied(shown.textContent).then(() => say("copied"), () => {
      getSelection().selectAllChildren(shown);
      say("press Ctrl+C");
    });
  });
}

// --- start -----------------------------------------------------------------------------------------------------------

const dark = matchMedia("(prefers-color-scheme: dark)");
setTheme(dark.matches ? "dark" : "light");
dark.addEventListener("change", event => setTheme(event.matches ? "dark" : "light"));
document.getElementById("theme").addEventListener("click", () => {
  setTheme(root.dataset.theme === "dark" ? "light" : "dark");
});
document.querySelectorAll("table.sorted").forEach(readied);
document.querySelectorAll(".recipe button").forEach(copies);
drawAll();
