"use strict";
// Charts: read values by pointer or arrow keys, zoom by dragging.
const NS = "http://www.w3.org/2000/svg";

function make(name, attributes, text) {
  const element = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function ticks(low, high, most, least = 0) {
  let step = 10 ** Math.floor(Math.log10((high - low) / most));
  step *= [1, 2, 5, 10].find((factor) => (high - low) / (step * factor) <= most);
  step = Math.max(step, least);
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n <= high / step + 1e-9; n++) found.push(n * step);
  return found;
}

const short = (value) => Number(value.toPrecision(4)).toString();

function enliven(figure) {
  const { lines, log, place: where, frame } = JSON.parse(figure.querySelector("script").textContent);
  const { width: WIDTH, height: HEIGHT, left: LEFT, right: RIGHT, top: TOP, bottom: BOTTOM } = frame;
  const svg = figure.querySelector("svg"), reading = figure.querySelector(".reading");
  const steps = [...new Set(lines.flatMap((line) => line.points.map((point) => point[0])))].sort((a, b) => a - b);
  const whole = [steps[0], Math.max(steps.at(-1), steps[0] + 1)];
  let [from, to] = whole, at = null, dragged = null;
  const scale = (value) => (log ? Math.log10(value) : value);
  const x = (step) => LEFT + ((step - from) / (to - from)) * (WIDTH - LEFT - RIGHT);
  const stepAt = (place) => from + ((place - LEFT) / (WIDTH - LEFT - RIGHT)) * (to - from);
  const place = (event) => ((event.clientX - svg.getBoundingClientRect().left) / svg.getBoundingClientRect().width) * WIDTH;
  const within = (step) => Math.min(Math.max(step, from), to);

  function draw() {
    const shown = lines.map((line) => ({ ...line, points: line.points.filter(([step]) => step >= from && step <= to) }));
    const values = shown.flatMap((line) => line.points.map((point) => scale(point[1])));
    let low = Math.min(...values), high = Math.max(...values);
    const room = (high - low) * 0.05 || Math.abs(high) * 0.05 || 1;
    low -= room; high += room;
    const y = (value) => HEIGHT - BOTTOM - ((scale(value) - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
    svg.replaceChildren();
    const marks = make("g", { class: "ticks" });
    const decades = log && high - low > 1; // within one, round values are even ones
    const places = log && !decades ? ticks(10 ** low, 10 ** high, 5) : ticks(low, high, 5);
    for (const tick of places) {
      const value = decades ? 10 ** tick : tick;
      marks.append(make("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }));
      marks.append(make("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, short(value)));
    }
    for (const tick of ticks(from, to, 6, 1)) marks.append(make("text", { x: x(tick), y: HEIGHT - 8, "text-anchor": "middle" }, tick.toLocaleString("en")));
    svg.append(marks);
    for (const line of shown) {
      const colour = "c" + (line.colour % 8);
      if (line.points.length === 1) svg.append(make("circle", { class: colour, r: 3, cx: x(line.points[0][0]), cy: y(line.points[0][1]) }));
      svg.append(make("polyline", { class: "line " + colour, points: line.points.map(([s, v]) => x(s).toFixed(1) + "," + y(v).toFixed(1)).join(" ") }));
    }
    if (dragged) svg.append(make("rect", { class: "zoom", x: Math.min(x(dragged[0]), x(dragged[1])), width: Math.abs(x(dragged[0]) - x(dragged[1])), y: TOP, height: HEIGHT - TOP - BOTTOM }));
    if (at !== null) svg.append(make("line", { class: "cursor", x1: x(at), x2: x(at), y1: TOP, y2: HEIGHT - BOTTOM }));
  }

  function read(step) {
    at = steps.reduce((best, each) => (Math.abs(each - step) < Math.abs(best - step) ? each : best));
    at = within(at);
    const found = lines.map((line) => line.name + " " + short(line.points.reduce((best, each) => (Math.abs(each[0] - at) < Math.abs(best[0] - at) ? each : best))[1]));
    reading.textContent = where.replace("#", at.toLocaleString("en")) + ": " + found.join(", ");
    draw();
  }

  function zoom(first, last) {
    const inside = steps.filter((step) => step >= first && step <= last);
    if (inside.length > 1) [from, to] = [inside[0], inside.at(-1)];
    at = null; draw();
  }

  svg.addEventListener("pointermove", (event) => {
    if (dragged) dragged[1] = within(stepAt(place(event)));
    read(stepAt(place(event)));
  });
  svg.addEventListener("pointerdown", (event) => { const step = within(stepAt(place(event))); dragged = [step, step]; });
  window.addEventListener("pointerup", () => {
    if (!dragged) return;
    const [first, last] = dragged.toSorted((a, b) => a - b);
    dragged = null;
    if (x(last) - x(first) > 8) zoom(first, last); else draw();
  });
  svg.addEventListener("dblclick", () => { [from, to] = whole; draw(); });
  svg.addEventListener("pointerleave", () => { at = null; reading.textContent = ""; draw(); });
  figure.addEventListener("keydown", (event) => {
    const now = at === null ? steps.length - 1 : steps.findIndex((step) => step >= at);
    if (event.key === "ArrowLeft") read(steps[Math.max(now - 1, 0)]);
    else if (event.key === "ArrowRight") read(steps[Math.min(now + 1, steps.length - 1)]);
    else if (event.key === "+") { const middle = at ?? (from + to) / 2, half = (to - from) / 4; zoom(middle - half, middle + half); }
    else if (event.key === "0") { [from, to] = whole; draw(); }
    else return;
    event.preventDefault();
  });
}

document.querySelectorAll(".chart").forEach(enliven);

// Confusion matrices: read a square by pointer or arrow keys.
document.querySelectorAll(".matrix").forEach((figure) => {
  const { margin, cell, names, counts, totals, counted } = JSON.parse(figure.querySelector("script").textContent);
  const svg = figure.querySelector("svg"), reading = figure.querySelector(".reading");
  const mark = make("rect", { class: "at", width: cell, height: cell, visibility: "hidden" });
  let row = 0, column = 0, read = false;
  svg.append(mark);

  function show() {
    read = true;
    const count = counts[row][column], share = totals[row] ? Math.round((1000 * count) / totals[row]) / 10 : 0;
    const what = row === column ? names[row] + " is right" : names[row] + " is taken for " + names[column];
    reading.textContent = what + ": " + count.toLocaleString("en") + " of " + totals[row].toLocaleString("en") + " " + counted + " (" + share + " %)";
    for (const [name, value] of Object.entries({ x: margin + column * cell, y: margin + row * cell, visibility: "visible" })) mark.setAttribute(name, value);
  }
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const [down, over] = [event.clientY - box.top, event.clientX - box.left].map((place) => Math.floor((place - margin) / cell));
    if (down < 0 || over < 0 || down >= names.length || over >= names.length) return;
    [row, column] = [down, over];
    show();
  });
  figure.addEventListener("keydown", (event) => {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!move) return;
    const within = (place) => Math.min(Math.max(place, 0), names.length - 1);
    if (read) [row, column] = [within(row + move[0]), within(column + move[1])];
    show();
    mark.scrollIntoView({ block: "nearest", inline: "nearest" });
    event.preventDefault();
  });
});

// Tables of classes: a heading sorts by its column.
document.querySelectorAll(".classes").forEach((table) => {
  const headings = [...table.querySelectorAll("thead th")], body = table.tBodies[0];
  const value = (row, column) => {
    const text = row.cells[column].textContent, number = Number(text.replaceAll(",", ""));
    return column === 0 ? text : text === "–" ? Infinity : number;
  };
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const sign = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      headings.forEach((each) => each.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const order = (a, b) => (column === 0 ? sign * a.localeCompare(b) : a === b ? 0 : b === Infinity ? -1 : a === Infinity ? 1 : sign * (a - b));
      body.append(...[...body.rows].sort((a, b) => order(value(a, column), value(b, column))));
    });
  });
});

document.querySelectorAll(".panels").forEach((figure) => {
  const images = figure.querySelectorAll("img"), output = figure.querySelector("output");
  figure.querySelector("input").addEventListener("input", (event) => {
    images.forEach((image, number) => { image.hidden = number !== Number(event.target.value); });
    output.textContent = images[event.target.value].dataset.step;
  });
});

document.querySelectorAll(".map").forEach((figure) => {
  const names = JSON.parse(figure.querySelector("script").textContent), dots = [...figure.querySelectorAll("circle")];
  const thumbnail = figure.querySelector(".thumbnail"), label = figure.querySelector(".name");
  const columns = Number(thumbnail.dataset.columns), side = 2 * Number(thumbnail.dataset.side);
  thumbnail.style.backgroundSize = columns * side + "px auto";

  function show(number) {
    thumbnail.style.backgroundPosition = -(number % columns) * side + "px " + -Math.floor(number / columns) * side + "px";
    label.textContent = names[number];
  }
  figure.querySelector("svg").addEventListener("pointerover", (event) => {
    const number = dots.indexOf(event.target);
    if (number >= 0) show(number);
  });
  figure.querySelector("input").addEventListener("input", (event) => {
    const wanted = event.target.value.toLowerCase();
    const found = names.map((name) => name.toLowerCase().includes(wanted));
    dots.forEach((dot, number) => dot.classList.toggle("faint", !found[number]));
    if (wanted && found.includes(true)) show(found.indexOf(true));
    else if (wanted) label.textContent = "no name has " + event.target.value;
  });
});
