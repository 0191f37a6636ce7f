// Searches and sorts the table of all linear weights, which lie in the page.
const data = JSON.parse(document.getElementById("linears").textContent);
const [find, found, count, more, heads] = ["find", "found", "count", "more", "heads"].map(
  (id) => document.getElementById(id),
);
const names = ["linear weight", "role", "shape", "format", "amax", "global scale", "input amax", "tokens", "relative error"];
const TEXTS = 4, STEP = 100;
const rows = data.rows.map(([group, expert, ...figures]) => {
  const [before, after, ...about] = data.groups[group];
  return [before + (expert ?? "") + after, ...about, ...figures];
});
let column = null, sign = 1, limit = STEP;

function show(value) {
  if (value === null) return "";
  if (typeof value === "string") return value;
  if (value >= 1000) return value.toLocaleString("en");
  return value && Math.abs(value) < 0.01 ? value.toExponential() : String(value);
}

function cell(value, at) {
  const td = document.createElement("td");
  if (at >= TEXTS) td.className = "number";
  td.textContent = show(value);
  return td;
}

function compare(a, b) {
  const [x, y] = [a[column], b[column]];
  if (x === null || y === null) return (x === null) - (y === null);
  return sign * (typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y);
}

function draw() {
  const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
  const hits = rows.filter((row) => words.every((word) => `${row[0]} ${row[1]}`.toLowerCase().includes(word)));
  if (column !== null) hits.sort(compare);
  found.replaceChildren(
    ...hits.slice(0, limit).map((row) => {
      const tr = document.createElement("tr");
      tr.append(...row.map(cell));
      return tr;
    }),
  );
  count.textContent = `${Math.min(limit, hits.length)} of ${hits.length} shown, ${rows.length} in all`;
  more.hidden = hits.length <= limit;
}

names.forEach((name, at) => {
  const th = document.createElement("th"), button = document.createElement("button");
  if (at >= TEXTS) th.className = "number";
  button.textContent = name;
  button.addEventListener("click", () => {
    sign = column === at ? -sign : at < TEXTS ? 1 : -1;
    column = at;
    draw();
  });
  th.append(button);
  heads.append(th);
});
find.addEventListener("input", () => { limit = STEP; draw(); });
more.addEventListener("click", () => { limit *= 10; draw(); });
draw();
